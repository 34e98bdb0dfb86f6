"""The training ops and NF4 of csrc/cpu touch no memory but that of their arrays, and do nothing undefined."""

import pytest

from kernels.native import toolchain
from tests.helpers import native

pytestmark = native.needs_cxx


@pytest.mark.parametrize("name", toolchain.instruction_sets())
def test_sanitizers_find_nothing(name, tmp_path_factory, monkeypatch):
    """Both sanitizers over a fuzz of shapes, strides, types and what may be null, beside pages that none may touch."""
    monkeypatch.setenv("CRIA_INSTRUCTION_SET", name)
    found = native.run_sanitized(tmp_path_factory.getbasetemp(), "training")
    if not found.endswith(f" {name}\n"):
        pytest.skip(f"this processor has no {name}")
    assert found == f"240 calls of {name}\n"


@pytest.mark.parametrize("op", ["norm", "attention", "nf4"])  # of each source
def test_a_column_too_many_is_found(op, tmp_path_factory):
    with pytest.raises(AssertionError, match="AddressSanitizer: SEGV"):
        native.run_sanitized(tmp_path_factory.getbasetemp(), "training", op)
