#!/usr/bin/env bash
# Triton 3.6.0, which torch 2.11 installs, does not compile an assignment of what a @triton.jit function returns as None.
#
# An optional pointer is passed as None, and `x = None if p is None else ...` compiles in the kernel itself. The same
# expression moved into a @triton.jit helper that returns it does not: CompilationError at the assignment. 3.9.0 compiles
# both. No GPU is needed: the kernels are compiled ahead of time.
#
# What follows: kernels/ops/adamw_kernels.py moves each optional pointer under an `if` of its own.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat > optional.py <<'PYTHON'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError


@triton.jit
def moved(ptr, distance):
    return ptr if ptr is None else ptr + distance


@triton.jit
def with_helper(a_ptr, b_ptr, n):
    b = moved(b_ptr, n)
    if b is not None:
        tl.store(a_ptr, tl.load(b))


@triton.jit
def without_helper(a_ptr, b_ptr, n):
    b = b_ptr if b_ptr is None else b_ptr + n
    if b is not None:
        tl.store(a_ptr, tl.load(b))


for kernel in (without_helper, with_helper):
    source = ASTSource(kernel, {"a_ptr": "*fp32", "b_ptr": "constexpr", "n": "i32"}, {(1,): None}, {})
    try:
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
        said = "compiles"
    except CompilationError:
        said = "CompilationError"
    print(triton.__version__, kernel.__name__, said)
PYTHON
for version in 3.6.0 3.9.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/python" -m pip install --quiet --disable-pip-version-check "triton==$version" setuptools
  HOME="$work" "env-$version/bin/python" -W ignore optional.py
done | tee said
printf '%s\n' "3.6.0 without_helper compiles" "3.6.0 with_helper CompilationError" "3.9.0 without_helper compiles" \
  "3.9.0 with_helper compiles" | diff - said || { echo "not as stated"; exit 1; }
