"""The table of csrc/cuda/adamw.cu: what a tensor's row says, and how many chunks it is cut into."""

import struct

import pytest
import torch

from kernels.ops.adamw import adamw_state
from kernels.ops.adamw_cuda import CHUNK, make_row

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("master", "states", "offset", "n", "chunks"),
    [
        ("stochastic", "fp32", 0, CHUNK, 1),
        ("stochastic", "fp32", 0, CHUNK + 1, 2),
        ("stochastic", "fp32", 5, CHUNK - 5, 1),
        ("stochastic", "fp32", 5, CHUNK - 4, 2),  # draws come by 8 elements: the first chunk begins 5 before the tensor
        ("stochastic", "fp32", 16, CHUNK, 1),
        ("split", "bf16", 3, CHUNK - 2, 2),  # states in bf16 draw too
        ("split", "fp32", 5, CHUNK, 1),  # nothing draws
        ("fp32", "8bit", 7, CHUNK, 1),
    ],
)
def test_a_tensor_whose_draws_begin_within_eight_is_shifted(master, states, offset, n, chunks):
    param, grad = torch.zeros(n, dtype=BF16), torch.zeros(n, dtype=FP32)
    state = adamw_state(param, master, states)
    row, tensors, n_chunks = make_row((param, grad, state, 0.25, 77, offset), 9)
    rest = {"stochastic": None, "split": state.low, "fp32": state.master}[master]
    draws = master == "stochastic" or states == "bf16"
    streams = [param, grad, state.m, state.v, *([] if rest is None else [rest])]
    maxima = [] if state.m_absmax is None else [state.m_absmax, state.v_absmax]
    assert n_chunks == chunks and [id(t) for t in tensors] == [id(t) for t in streams + maxima]
    addresses = [t.data_ptr() for t in streams] + [0] * (5 - len(streams))
    assert row[:7] == addresses + ([t.data_ptr() for t in maxima] or [0, 0])
    shift = offset % 8 if draws else 0
    assert row[7:10] == [n, 9, offset // 8]
    assert struct.unpack("II", struct.pack("q", row[10])) == (77, shift)
    assert struct.unpack("fI", struct.pack("q", row[11])) == (0.25, 2 + (shift == 0))  # fp32 gradient; aligned
    assert len(row) == 12


def test_a_tensor_off_16_bytes_is_not_read_by_vectors():
    param = torch.zeros(65, dtype=BF16)[1:]
    row, _, _ = make_row((param, torch.zeros(64, dtype=BF16), adamw_state(param), 0.0, 0, 0), 0)
    assert struct.unpack("fI", struct.pack("q", row[11])) == (0.0, 0)
