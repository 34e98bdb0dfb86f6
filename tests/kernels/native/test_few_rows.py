"""Products of few rows against fp64, with every instruction set of this processor."""

import ctypes

import pytest
import torch

from kernels.native import toolchain
from kernels.native.arguments import FewRows, Layer, Llama, Tokens
from kernels.native.cpu import find_cpu, load_cpu
from kernels.native.few_rows import Q8, multiply_few_rows
from kernels.native.library import NativeError, check
from tests.helpers import native

pytestmark = pytest.mark.skipif(find_cpu() is None, reason="the CPU library is compiled by g++, which is missing")

SIZES = [(1, 1, 1), (1, 7, 3), (2, 16, 5), (3, 61, 37), (4, 64, 64), (5, 130, 33), (8, 576, 129), (11, 97, 131)]


@pytest.fixture(scope="module", params=toolchain.instruction_sets())
def library(request, tmp_path_factory):
    """The library with one instruction set."""
    found = native.load_instruction_sets(tmp_path_factory.mktemp("native"))
    if request.param not in found:
        pytest.skip(f"this processor has no {request.param}")
    return found[request.param]


def quantize(w):
    """Return w (N, D) as q8_0 bytes, and what they mean in fp64."""
    blocks = w.unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    values = (blocks / scale.float()).nan_to_num().round().clamp(-127, 127).to(torch.int8)
    packed = torch.cat((scale.view(torch.uint8), values.view(torch.uint8)), -1).flatten(1)
    return packed, (values.double() * scale.double()).flatten(1)


def assert_product(library, x, w, truth_of_w, threads=1):
    truth = x.double() @ truth_of_w.T
    ours = multiply_few_rows(library, x, w, threads)
    torchs = (x @ truth_of_w.float().T - truth).abs().max()
    assert (ours - truth).abs().max() <= 2 * torchs + 1e-7 * truth.abs().max()
    return ours


@pytest.mark.parametrize(("rows", "in_", "out"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_as_exact_as_torchs_in_fp32(library, dtype, rows, in_, out):
    torch.manual_seed(0)
    x, w = torch.randn(rows, in_), torch.randn(out, in_).to(dtype)
    one = assert_product(library, x, w, w.double())
    assert torch.equal(one, assert_product(library, x, w, w.double(), threads=2))
    alone = torch.cat([multiply_few_rows(library, row[None].clone(), w, 1) for row in x])
    assert torch.equal(one, alone)  # whatever rows are beside it


@pytest.mark.parametrize(("rows", "in_", "out"), [(1, 32, 1), (2, 64, 5), (3, 96, 37), (8, 576, 130), (5, 1536, 9)])
def test_products_of_q8_0_weights(library, rows, in_, out):
    torch.manual_seed(0)
    w, truth = quantize(torch.randn(out, in_) * torch.rand(out, 1) * 1e-3)  # scales that are subnormal in fp16 too
    one = assert_product(library, torch.randn(rows, in_), w, truth)
    assert one.abs().max() > 0


def test_weights_lie_at_any_address_of_their_type(library):
    torch.manual_seed(0)
    x, memory = torch.randn(3, 61), torch.randn(37 * 61 + 9)
    for dtype in (torch.float32, torch.bfloat16):
        for offset in range(9):
            w = memory.to(dtype)[offset : offset + 37 * 61].view(37, 61)
            assert_product(library, x, w, w.double())


def test_infinities_and_nan_stay(library):
    w = torch.ones(3, 40, dtype=torch.bfloat16)
    w[0, 5], w[1, 39] = torch.inf, torch.nan
    y = multiply_few_rows(library, torch.ones(1, 40), w, 1)[0]
    assert y[0] == torch.inf and y[1].isnan() and y[2] == 40


def test_what_is_no_product_is_refused():
    library = load_cpu()
    with pytest.raises(ValueError, match=r"few_rows: x \(2, 5\) torch.float32, wanted contiguous fp32 of \(rows, 6\)"):
        multiply_few_rows(library, torch.ones(2, 5), torch.ones(3, 6), 1)
    for x, w in (
        (torch.ones(2, 6).bfloat16(), torch.ones(3, 6)), (torch.ones(6, 2).T, torch.ones(3, 6)),
        (torch.ones(2, 6), torch.ones(6, 3).T),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"few_rows: x .*wanted contiguous fp32"):
            multiply_few_rows(library, x, w, 1)

    def call(**changes):
        fields = {"type": 0, "rows": 1, "in_": 32, "out": 1, "threads": 1, "x": 64, "w": 64, "y": 64, "workspace": 64}
        check(library.cria_few_rows(ctypes.byref(FewRows(**fields | changes))), "few_rows")

    for wrong, what in (
        ({"type": 7}, "a mode"), ({"rows": -1}, "a size"), ({"in_": 0}, "a size"), ({"threads": 0}, "a size"),
        ({"type": Q8, "in_": 33}, "a size"), ({"w": 66}, "a pointer"), ({"x": 66}, "a pointer"),
    ):  # fmt: skip
        with pytest.raises(NativeError, match=f"few_rows: the compiled function was given {what}"):
            call(**wrong)


def test_sanitizers_find_nothing(tmp_path_factory):
    """Both sanitizers over a fuzz of shapes and addresses; a workspace that is a number short is found."""
    folder = tmp_path_factory.getbasetemp()
    assert native.run_sanitized(folder, "few_rows") == "39 calls\n"
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        native.run_sanitized(folder, "few_rows", "overrun")


def numbers(*values):
    return (ctypes.c_int64 * len(values))(*values)


@pytest.mark.parametrize(
    ("token", "sequence", "length", "code"),
    [(4, 1, 4, 2), (0, 0, 1, 2), (5, 0, 1, 1), (-1, 0, 1, 1), (0, 2, 1, 1), (0, -1, 1, 1), (0, 0, 5, 1), (0, 0, 0, 1)],
)
def test_a_token_a_sequence_or_a_length_that_there_is_none_of_is_refused(token, sequence, length, code):
    """Before anything is read: addresses are wrong here, of which the rest is refused (2). For each of two rows."""
    layer = (Layer * 1)(Layer(*[1] * 10))
    model = Llama(0, 2, 1, 1, 1, 2, 1, 5, 1e-5, 1, 1, 1, layer)
    for bad in (0, 1):
        columns = [[0, 0], [0, 0], [1, 1]]
        for column, value in zip(columns, (token, sequence, length), strict=True):
            column[bad] = value
        held = [numbers(*column) for column in columns]
        tokens = Tokens(2, 2, 4, 1, *(ctypes.addressof(one) for one in held), *[1] * 6)
        assert load_cpu().cria_decode(ctypes.byref(model), ctypes.byref(tokens)) == code


@pytest.mark.parametrize(("width", "code"), [(32, 2), (31, 1), (33, 1), (0, 1)])
def test_8_bit_rows_are_of_whole_blocks(width, code):
    product = FewRows(Q8, 1, width, 1, 1, 1, 1, 1, 1)
    assert load_cpu().cria_few_rows(ctypes.byref(product)) == code
