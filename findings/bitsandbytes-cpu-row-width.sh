#!/usr/bin/env bash
# On a CPU with AVX-512, bitsandbytes 0.50.2 dequantises a 4-bit matrix wrongly where its rows are a multiple of 16 numbers
# wide and not of 64.
#
# quantize_4bit cuts the flattened tensor into blocks of 64, each with its own maximum, so a block may begin in one row
# and end in the next. dequantize_4bit of rows of 80 gives numbers that are off by as much as the numbers themselves: the
# codes and the maxima are right (the formula applied to them gives the tensor back), their product is not. Rows of 72 and
# of 128 are right. Seen on an AMD EPYC with AVX-512 and bf16 instructions; a CPU without AVX-512 takes another path.
#
# What follows: kernels/ops/nf4.py compares with bitsandbytes' formula, not with its dequantised values, at such widths.
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
  echo "this CPU has no AVX-512 with bf16: the path that is meant is not taken here"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy
cat > rows.py <<'PYTHON'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

for width in (64, 72, 80, 96, 128):
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten().long()
    by_formula = (state.code[codes] * state.absmax.repeat_interleave(64)).view(64, width)
    worst = (dequantize_4bit(packed, state) - by_formula).abs().max().item()
    close = (by_formula - weight).abs().max().item() < 0.6
    verdict = "equal" if worst == 0 else "off by more than 1" if worst > 1 else "differs"
    print(bitsandbytes.__version__, f"64 x {width}: formula near the tensor {close}, dequantised {verdict}")
PYTHON
HOME="$work" env/bin/python -W ignore rows.py 2> /dev/null | tee said
for width in 64 72 80 96 128; do
  verdict=equal
  case $width in 80 | 96) verdict="off by more than 1" ;; esac
  echo "0.50.2 64 x $width: formula near the tensor True, dequantised $verdict"
done | diff - said || { echo "not as stated"; exit 1; }
