"""The training ops and NF4 of csrc/cpu touch no memory but that of their arrays, and do nothing undefined."""

import pytest

from kernels.native import toolchain
from tests.helpers import native

pytestmark = native.needs_cxx


@pytest.mark.parametrize("name", toolchain.instruction_sets())
def test_sanitizers_find_nothing(name, tmp_path_factory, monkeypatch):
    """Both sanitizers over a fuzz of shapes, strides, types and what may be null, beside pages that none may touch."""
    if name not in native.load_instruction_sets(tmp_path_factory.mktemp("native")):
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("CRIA_INSTRUCTION_SET", name)
    assert native.run_sanitized(tmp_path_factory.getbasetemp(), "training") == f"240 calls of {name}\n"


@pytest.mark.parametrize("op", ["norm", "attention", "nf4"])  # of each source
def test_a_column_too_many_is_found(op, tmp_path_factory):
    with pytest.raises(AssertionError, match="AddressSanitizer: SEGV"):
        native.run_sanitized(tmp_path_factory.getbasetemp(), "training", op)
