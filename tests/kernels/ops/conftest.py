"""The ops run compiled: on a GPU, else on the PTX machine in the processes of tests/kernels/test_on_machine.py.

Asked for by name without a GPU, they run in Triton's interpreter, which takes no time to compile.
"""

from tests.helpers.kernels import CHIP, CUDA


def pytest_ignore_collect(config):
    """Leave these tests to test_on_machine.py, unless the command line names them."""
    is_named = any("ops" in argument for argument in config.args)
    return None if CUDA or CHIP or is_named else True
