"""The ops run compiled: on a GPU, else on the PTX machine in the processes of tests/kernels/test_on_machine.py.

Asked for by name without a GPU, they run in Triton's interpreter, which takes no time to compile.
"""

import os

from tests.helpers.kernels import CHIP, CUDA


def pytest_ignore_collect(config):
    """Leave these tests to test_on_machine.py, unless the command line names them."""
    is_named = any("ops" in argument for argument in config.args)
    return None if CUDA or CHIP or is_named else True


def pytest_collection_modifyitems(config, items):
    """Keep every CRIA_TEST_SHARE-th test, see tests.helpers.on_machine."""
    share = int(os.environ.get("CRIA_TEST_SHARE", "1"))
    left_out = [item for i, item in enumerate(items) if i % share]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[::share]
