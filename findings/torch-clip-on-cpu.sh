#!/usr/bin/env bash
# On a CPU, torch.nn.utils.clip_grad_norm_(..., 1.0) leaves a large fp32 gradient with a norm over 1.
#
# The norm of a tensor adds up the squares in so few fp32 sums that, the larger the tensor, the more of each square is
# rounded away: the norm comes out too small, and the gradient is scaled down too little. torch.sum over the same squares
# is exact to 1e-7. With 112 million numbers (the embedding of a 1B model has that many) the error is over a percent.
# The norm's error is known (github.com/pytorch/pytorch/issues/169237, 20551); that clipping inherits it is said nowhere.
#
# What follows: kernels/ops/grad_norm.py sums squares in pieces; the tests hold it to 1e-6 of fp64.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
env/bin/python - <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.zeros(112_000_000))
weight.grad = torch.randn_like(weight)
exact = weight.grad.double().norm().item()
squares = weight.grad.square().sum().sqrt().item()
reported = torch.nn.utils.clip_grad_norm_([weight], 1.0).item()
clipped = weight.grad.double().norm().item()
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
print(f"norm in fp64 {exact:.2f}; clip_grad_norm_ reports {reported:.2f}; sqrt of torch.sum of the squares {squares:.2f}")
print(f"norm after clipping to 1.0: {clipped:.6f}")
if not (abs(squares / exact - 1) < 1e-5 and reported < 0.995 * exact and clipped > 1.005):
    sys.exit("not as stated")
PYTHON
