"""NF4: codes, maxima and values against the search written plainly, bitsandbytes' own bits, and bitsandbytes itself."""

import hashlib
import importlib.util

import pytest
import torch

import kernels
from kernels.ops import nf4
from tests.helpers.kernels import CHIP, CUDA, DEVICE, needs_kernels

IMPLS = pytest.mark.parametrize("impl", ["ref", pytest.param("triton", marks=needs_kernels)])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1,),
    (2, 1),
    (7,),
    (64,),
    (65,),
    (5, 80),
    (3, 67),
    (12, 576),
    (129, 63),
    (1, 64 * 257),
    (130, 128),
    (8, 1024),
]
QUANTISED = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}  # quantize_4bit's arguments
has_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def digest(t):
    return hashlib.sha256(as_bytes(t).numpy().tobytes()).hexdigest()[:16]


def as_bytes(t):
    return t.cpu().contiguous().flatten().view(torch.uint8)


def equal_bits(a, b):
    return a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


def searched(weight):
    """Return the codes of weight (n,), found by the least distance; of two equal ones the lower entry's."""
    ratios = []
    for block in weight.float().cpu().split(64):
        largest = block.abs().max().clamp(min=1e-38)
        ratios.append(block / largest if len(block) < 64 else block * (1 / largest))
    table = torch.tensor(nf4.TABLE).double()
    codes = (torch.cat(ratios).double()[:, None] - table).abs().argmin(1)
    return torch.nn.functional.pad(codes, (0, len(codes) % 2), value=7)


def unpacked(q):
    return torch.stack((q.codes >> 4, q.codes & 15), 1).flatten().cpu()


def values(q):
    """What codes stand for, in fp32, one formula over all of them."""
    scale = nf4.absmax_map()[q.absmax_codes.cpu().int()]
    absmax = scale * q.absmax2.cpu().repeat_interleave(256)[: len(scale)] + q.offset.cpu()
    n = torch.Size(q.shape).numel()
    return (torch.tensor(nf4.TABLE)[unpacked(q).int()][:n] * absmax.repeat_interleave(64)[:n]).view(q.shape)


# ---- quantising -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_nearest_entries(shape, dtype):
    weight = (torch.randn(*shape, device=DEVICE) * 0.02).to(dtype)
    q = kernels.quantise_nf4(weight)
    n_codes, n_blocks, n_blocks2 = nf4.nf4_shapes(weight.numel())
    assert [len(t) for t in q.tensors[:3]] == [n_codes, n_blocks, n_blocks2] and q.offset.shape == ()
    assert torch.equal(unpacked(q), searched(weight.flatten()))
    absmax = torch.stack([block.abs().max() for block in weight.float().flatten().split(64)]).cpu()
    torch.testing.assert_close(q.offset.cpu(), absmax.mean(), rtol=1e-6, atol=0)
    rest = absmax - q.offset.cpu()
    for maxima, codes, largest in zip(rest.split(256), q.absmax_codes.cpu().split(256), q.absmax2.cpu(), strict=True):
        assert largest == maxima.abs().max()
        if largest > 0:  # the nearest entry, of numbers between -1 and 1 that are 2 / 65535 apart
            off = (nf4.absmax_map()[codes.int()] - maxima / largest).abs()
            best = (nf4.absmax_map() - (maxima / largest)[:, None]).abs().amin(1)
            assert (off <= best + 3.1e-5).all()
        else:
            assert not codes.any()


def test_a_tie_goes_to_the_lower_entry():
    middles = [(a + b) / 2 for a, b in zip(torch.tensor(nf4.TABLE), torch.tensor(nf4.TABLE[1:]), strict=False)]
    above = [torch.nextafter(x, torch.tensor(2.0)) for x in middles]
    block = torch.stack([torch.tensor(1.0), *middles, *above, *[torch.tensor(0.0)] * 33])
    codes = unpacked(kernels.quantise_nf4(block.to(DEVICE))).tolist()
    assert codes[:31] == [15, *range(15), *range(1, 16)] and set(codes[31:]) == {7}


@pytest.mark.parametrize("impl", ["ref", "auto"])
def test_blocks_of_zeros_and_of_the_lowest_numbers(impl):
    blocks = torch.zeros(4, 64, device=DEVICE)
    blocks[1], blocks[2], blocks[3, 5] = -3e38, -1e-39, -1.0
    q = kernels.quantise_nf4(blocks, impl=impl)
    codes = unpacked(q).view(4, 64)
    assert set(codes[0].tolist()) == {7} and set(codes[1].tolist()) == {0}
    assert set(codes[2].tolist()) == {6}  # 1e-39 of 1e-38, the least maximum
    assert codes[3, 5] == 0 and set(codes[3, 6:].tolist()) == {7}
    zeros = kernels.quantise_nf4(torch.zeros(3, 128, device=DEVICE), impl=impl)
    assert not any(zeros.tensors[i].any() for i in (1, 2, 3)) and set(unpacked(zeros).tolist()) == {7}
    assert kernels.dequantise_nf4(zeros, impl="ref").eq(0).all()


@pytest.mark.parametrize("impl", ["ref", "auto"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value, impl):
    weight = torch.randn(40, 65, device=DEVICE)
    weight[17, 3] = value
    with pytest.raises(ValueError, match=r"quantise_nf4: the weight of shape \(40, 65\) holds NaN or Inf"):
        kernels.quantise_nf4(weight, impl=impl)
    weight[17, 3], weight[39, 64] = 0, value  # in the part of a block
    with pytest.raises(ValueError, match="NaN or Inf"):
        kernels.quantise_nf4(weight, impl=impl)


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match=r"quantise_nf4: weight is torch.float64 of shape \(3,\), wanted at least one"):
        kernels.quantise_nf4(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"of shape \(0, 4\), wanted at least one number"):
        kernels.quantise_nf4(torch.ones(0, 4))
    with pytest.raises(ValueError, match=r"quantise_nf4: impl is 'triton', and there is no such kernel"):
        kernels.quantise_nf4(torch.ones(4, 64), "triton")
    q = kernels.quantise_nf4(torch.ones(4, 64))
    with pytest.raises(ValueError, match=r"dequantise_nf4: dtype is torch.float64"):
        kernels.dequantise_nf4(q, torch.float64)
    for out in (torch.ones(4, 64, device="meta"), torch.ones(64, 4), torch.ones(64, 4).T, torch.ones(4, 64).bfloat16()):
        with pytest.raises(ValueError, match=r"dequantise_nf4: out is .*wanted torch.float32 of shape \(4, 64\)"):
            kernels.dequantise_nf4(q, torch.float32, out)


def test_tensors_of_other_sizes_are_refused():
    q = kernels.quantise_nf4(torch.ones(4, 70))
    for i, name in enumerate(nf4.NAMES):
        wrongs = [q.tensors[i][None].repeat(2, 1), q.tensors[i].double()]
        wrongs += [q.tensors[i].to("meta")] if i else []  # a part that is not where the codes are
        wrongs += [q.tensors[i].repeat_interleave(2)[::2]] if len(q.tensors[i].shape) and len(q.tensors[i]) > 1 else []
        for wrong in wrongs:
            tensors = [wrong if i == k else t for k, t in enumerate(q.tensors)]
            with pytest.raises(ValueError, match=rf"NF4Matrix: {name} is .*for a matrix of shape \(4, 70\)"):
                kernels.NF4Matrix(*tensors, q.shape)


@pytest.mark.parametrize("impl", ["ref", "auto"])
def test_chunks_change_nothing(impl, monkeypatch):
    weight = torch.randn(9, 64 * 7 + 5, device=DEVICE)
    whole = kernels.quantise_nf4(weight, impl=impl)
    numbers = kernels.dequantise_nf4(whole, torch.float32, impl="ref")
    monkeypatch.setattr(nf4, "CHUNK", 128)
    parts = kernels.quantise_nf4(weight, impl=impl)
    assert all(map(equal_bits, whole.tensors, parts.tensors))
    assert equal_bits(kernels.dequantise_nf4(parts, torch.float32, impl="ref"), numbers)


def test_a_quantised_tensor_moves_whole():
    q = kernels.quantise_nf4(torch.randn(3, 67))
    back = q.to("cpu")
    assert all(a is b for a, b in zip(back.tensors, q.tensors, strict=True)) and back.shape == q.shape == (3, 67)
    moved = q.to("meta")  # which has no numbers, but sizes that are checked
    assert [t.device.type for t in moved.tensors] == ["meta"] * 4 and moved.shape == (3, 67)


def test_a_transposed_weight_is_quantised_row_by_row():
    weight = torch.randn(64, 30, device=DEVICE)
    q = kernels.quantise_nf4(weight.T)
    assert q.shape == (30, 64) and torch.equal(unpacked(q), searched(weight.T.flatten()))


def test_bytes_a_weight():
    q = kernels.quantise_nf4(torch.randn(256, 256))
    assert q.n_bytes == 256 * 256 // 2 + 1024 + 4 * 4 + 4


# ---- dequantising ---------------------------------------------------------------------------------------------------


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_have_the_bits_of_the_formula(shape, dtype, impl):
    if impl == "triton" and dtype == torch.bfloat16 and not (CUDA or CHIP):
        pytest.skip("the interpreter truncates bf16")
    q = kernels.quantise_nf4(
        torch.randn(*shape, device=DEVICE) * torch.rand(shape[0], *[1] * (len(shape) - 1)).to(DEVICE)
    )
    assert equal_bits(kernels.dequantise_nf4(q, dtype, impl=impl), values(q).to(dtype))


@IMPLS
@pytest.mark.parametrize("first", [1, 4, 16])
def test_codes_may_begin_at_any_address(impl, first):
    """As those do that lie in a file beside other tensors; here of whole tiles, which are read word by word."""
    q = kernels.quantise_nf4(torch.randn(8, 1024, device=DEVICE))
    moved = [torch.cat((t.new_zeros(first), t))[first:] for t in (q.codes, q.absmax_codes)]
    found = nf4.NF4Matrix(*moved, q.absmax2, q.offset, q.shape)
    assert equal_bits(kernels.dequantise_nf4(found, torch.float32, impl=impl), values(q))


@IMPLS
def test_into_rows_of_a_merged_matrix(impl):
    merged = torch.full((50, 67), torch.nan, device=DEVICE)
    parts = [kernels.quantise_nf4(torch.randn(n, 67, device=DEVICE)) for n in (33, 15)]
    first, second = merged[:33], merged[33:48]
    assert kernels.dequantise_nf4(parts[0], torch.float32, first, impl) is first
    kernels.dequantise_nf4(parts[1], torch.float32, second, impl)
    assert equal_bits(merged[:48], torch.cat([values(q) for q in parts])) and merged[48:].isnan().all()


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def test_bits_of_bitsandbytes():
    """Made by bitsandbytes 0.50.2 on a CPU. The maxima are few bits, so that their sums are exact in any order."""
    i = torch.arange(200)
    q = kernels.quantise_nf4(((i * 37 % 101 - 50) * (i // 64 + 1)).float().to(DEVICE) / 256)
    assert bytes(q.codes.tolist()).hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d18e2"
        "a04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af3c05e18f"
    )
    assert q.absmax_codes.tolist() == [0, 52, 217, 240] and q.absmax2.tolist() == [0.265625]
    assert q.offset.item() == 0.4609375
    values = [kernels.dequantise_nf4(q, dtype, impl="ref") for dtype in (torch.float32, torch.bfloat16)]
    assert [digest(t) for t in values] == ["0e9f61f913c16c97", "f4853bd9fffa0d63"]


def test_bits_of_bitsandbytes_over_several_blocks_of_maxima():
    i = torch.arange(300 * 64)
    q = kernels.quantise_nf4(((i * 7919 % 1009 - 504) * ((i // 64 * 37) % 64 + 1)).float().to(DEVICE) / 2**16)
    assert [digest(q.codes), digest(q.absmax_codes)] == ["7ac7ddb28117363b", "ea511b37b664f1a6"]
    assert torch.equal(q.absmax2.cpu(), torch.tensor([0.243601992726326, 0.242625430226326]))
    assert q.offset.item() == torch.tensor(0.247608944773674)
    values = [kernels.dequantise_nf4(q, dtype, impl="ref") for dtype in (torch.float32, torch.bfloat16)]
    assert [digest(t) for t in values] == ["0d8ab180d2b1707e", "5dd516ad12a8fdf6"]


def test_maxima_near_the_mean_take_the_codes_of_65536_places():
    """The nearest entries of 13 maxima are others, and so are 25 codes of places rounded down. bitsandbytes 0.50.2."""
    maxima = torch.cat([1 + torch.arange(-60, 61) / 2**16, torch.tensor([0.25, 1.75])])
    q = kernels.quantise_nf4(maxima[:, None].expand(-1, 64).to(DEVICE))
    assert digest(q.absmax_codes) == "34dd13b38455b69a" and q.absmax2.item() == 0.75 and q.offset.item() == 1


@has_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (5, 80)], ids=str)
def test_bits_of_the_bitsandbytes_here(shape, dtype):
    """It reads the wrong maxima where rows are of 16, 32 or 48 numbers beyond blocks of 64, on AVX-512."""
    from bitsandbytes import functional

    weight = (torch.randn(*shape) * 0.02).to(dtype)
    q = kernels.quantise_nf4(weight)
    codes, state = functional.quantize_4bit(weight, **QUANTISED)
    theirs = codes.flatten(), state.absmax, state.state2.absmax, state.offset
    assert all(map(equal_bits, q.tensors, theirs))
    assert equal_bits(kernels.dequantise_nf4(q, dtype), functional.dequantize_4bit(codes, state))
