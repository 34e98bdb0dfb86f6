#!/usr/bin/env bash
# On a CPU with AMX, torch 2.13.0 multiplies what lies behind the columns of a bf16 matrix: NaN there comes out.
#
# x is the first K columns of rows that are a little longer, as a view. x @ w depends on those K columns alone. Where K is no
# multiple of 32, oneDNN 3.12 (inside torch) loads the last tile of a row whole and relies on zeros beside it, and NaN * 0 is
# NaN: of 21 rows, 16 are NaN throughout. A padding that holds finite numbers does no harm. K = 224 is right, and so is every
# K with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or in fp32.
#
# What follows: kernels/ops/linear_cross_entropy.py clears the padding of its logits on a CPU, before the product with the
# head. A vocabulary of 32,001 has such a padding, and new memory may hold anything.
# Reported: github.com/uxlfoundation/oneDNN/issues/5717, mended after 3.14.
set -euo pipefail
if ! grep -q amx_bf16 /proc/cpuinfo; then
  echo "this CPU has no AMX with bf16: the path that is meant is not taken here"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > product.py <<'PYTHON'
import os

import torch

isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX")
for dtype in (torch.bfloat16, torch.float32):
    for k in (203, 224):
        rows = torch.full((21, k + 5), torch.nan, dtype=dtype)
        rows[:, :k] = 0.5
        product = rows[:, :k] @ torch.ones(k, 48, dtype=dtype)
        n = product.isnan().any(1).sum().item()
        print(f"{torch.__version__.split('+')[0]} {isa} {dtype} K = {k}: {n} of 21 rows are NaN")
PYTHON
unset ONEDNN_MAX_CPU_ISA
env/bin/python -W ignore product.py | tee said
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 env/bin/python -W ignore product.py | tee -a said
for isa in AMX AVX512_CORE_BF16; do
  for dtype in bfloat16 float32; do
    for k in 203 224; do
      n=0
      case $isa$dtype$k in AMXbfloat16203) n=16 ;; esac
      echo "2.13.0 $isa torch.$dtype K = $k: $n of 21 rows are NaN"
    done
  done
done | diff - said || { echo "not as stated"; exit 1; }
