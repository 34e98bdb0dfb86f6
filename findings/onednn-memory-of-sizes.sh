#!/usr/bin/env bash
# On a CPU, torch 2.13.0 keeps memory for every size of a bf16 product: a training step of other lengths grows each time.
#
# x[:T] @ w goes through oneDNN, which compiles code for each T and keeps it, up to 1,024 of them. 400 values of T, with all
# tensors made before, leave more than 100 MB behind (352 MB on a processor with AMX). The same 400 in fp32, which torch
# multiplies by MKL, leave next to nothing, and so does a second round of the same sizes in bf16. Keeping fewer of them
# (ONEDNN_PRIMITIVE_CACHE_CAPACITY=16) left 197 MB, and compiles again what it has forgotten.
#
# What follows: engine/training/micro_batch_size.py pads a micro-batch in bf16 on a CPU to a multiple of 32 tokens, so that
# few sizes occur. DESIGN.md has the figures.
# Reported of convolutions: github.com/pytorch/pytorch/issues/27971.
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
  echo "this CPU has no bf16 instructions: the path that is meant is not taken here"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > sizes.py <<'PYTHON'
import os
import sys

import torch

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])


def read_megabytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


x, w, out = torch.ones(800, 576, dtype=dtype), torch.ones(3072, 576, dtype=dtype), torch.ones(800, 3072, dtype=dtype)
torch.mm(x, w.T, out=out)
grown = []
for _ in range(2):
    before = read_megabytes()
    for tokens in range(400, 800):
        torch.mm(x[:tokens], w.T, out=out[:tokens])
    grown.append(round(read_megabytes() - before))
print(torch.__version__.split("+")[0], *grown)
PYTHON
unset ONEDNN_PRIMITIVE_CACHE_CAPACITY
read -r version first again <<< "$(env/bin/python -W ignore sizes.py bfloat16)"
read -r _ fp32 _ <<< "$(env/bin/python -W ignore sizes.py float32)"
echo "torch $version, 400 sizes: bf16 $first MB, the same again $again MB; fp32 $fp32 MB"
[ "$first" -gt 100 ] && [ "$again" -lt $((first / 10)) ] && [ "$fp32" -lt $((first / 10)) ] ||
  { echo "not as stated"; exit 1; }
