"""Flags that go together."""

from argparse import Namespace

import pytest

from data_gen.api import flags
from data_gen.base.cli import UsageError


def test_patience_is_longer_than_one_answer_may_take():
    """Else a run would end while it waits for its first answer."""
    options = Namespace(base_url="http://localhost/v1", timeout=600.0, replay=False, extra={}, prices=None)
    for patience in (599.0, 600.0):
        with pytest.raises(UsageError, match="is not longer than --timeout 600"):
            flags.check_run_flags(Namespace(**vars(options), patience=patience))
    flags.check_run_flags(Namespace(**vars(options), patience=601.0))
