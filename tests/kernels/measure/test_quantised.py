"""The inputs of NF4's cases, and how bitsandbytes is given them."""

from types import SimpleNamespace

import pytest
import torch

from kernels.measure import cases, quantised
from kernels.measure import peers as bench_peers
from kernels.ops import nf4
from tests.helpers.run import worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_matrix_is_quantised_and_has_room_for_its_numbers(dtype):
    torch.manual_seed(0)
    i = quantised.make_quantised((35, 67), "cpu", dtype)
    assert i.out.shape == (35, 67) and i.out.dtype == dtype
    out = quantised.dequantise(i, "ref")
    assert out is i.out and 0.015 < out.float().std() < 0.025 and out.float().abs().max() > 0.04
    with pytest.raises(ValueError, match="impl is 'other'"):
        quantised.dequantise(i, "other")


def test_bitsandbytes_is_given_codes_and_both_tables_of_maxima(monkeypatch):
    """By a stand-in that dequantises as it does, from what it is given."""

    class QuantState:
        def __init__(
            self, absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None
        ):
            self.__dict__.update({name: value for name, value in locals().items() if name != "self"})

    def dequantize_4bit(codes, state):
        assert codes.shape[1] == 1 and state.quant_type == "nf4" and state.state2.dtype == torch.float32
        second = state.state2
        block = torch.arange(len(state.absmax)) // second.blocksize
        absmax = second.code[state.absmax.long()] * second.absmax[block] + state.offset
        numbers = torch.stack((codes[:, 0] >> 4, codes[:, 0] & 15), 1).flatten().long()[: state.shape.numel()]
        values = state.code[numbers] * absmax[torch.arange(len(numbers)) // state.blocksize]
        return values.to(state.dtype).view(state.shape)

    functional = SimpleNamespace(QuantState=QuantState, dequantize_4bit=dequantize_4bit)
    asked = []
    monkeypatch.setattr(bench_peers, "import_peer", lambda *names: asked.append(names) or functional)
    case = cases.nf4_case(260, 128)
    inputs = case.inputs("cpu", torch.float32)
    assert len(inputs.absmax2) > 1 and (nf4.BLOCK, nf4.BLOCK2) == (64, 256)
    ready = bench_peers.PEERS["nf4"]["bitsandbytes"](case, inputs, ())
    assert asked == [("bitsandbytes", "bitsandbytes.functional")]
    found = ready.run()
    assert found.shape == (260, 128) and worst(found - case.reference(inputs)) < 1e-6 and found.std() > 0.015
