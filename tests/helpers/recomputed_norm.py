"""Compares RMSNorm's output with the one that backward computes again, as compiled for a chip, on the PTX machine.

python -m tests.helpers.recomputed_norm CHIP    not under TRITON_INTERPRET=1; tests/kernels/ops/test_rms_norm.py runs it
"""

import sys

import torch

from kernels.compiled.launches import patched
from kernels.compiled.simulation import on_machine
from kernels.measure.candidates import CANDIDATES
from kernels.ops import common, rms_norm

N_ROWS = 37
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def count_differences(chip: str, dim: int, dtype: torch.dtype, **config: int) -> int:
    """Return how many of the outputs have other bits in backward. config: forward's tile and warps, not the table's."""
    x, dy = torch.randn(N_ROWS, dim).to(dtype), torch.randn(N_ROWS, dim).to(dtype)
    weight = torch.randn(dim).to(dtype)
    table = common.launch_table("rms_norm")
    sizes = {size: entry | config for size, entry in table["forward"][chip].items()}
    changed = table | {"forward": {chip: sizes}}
    with on_machine(chip), patched(common, launch_table=lambda op: changed):
        y, _, rstd = rms_norm.forward(x, None, weight, 1e-5)
        again = rms_norm.backward(dy, x, weight, rstd, None, True)[2]
    return int((y != again).sum())


def main() -> None:
    """Print a line for each comparison, and exit with 1 if one finds a difference."""
    chip, wrong = sys.argv[1], 0
    torch.manual_seed(0)
    configs = CANDIDATES["rms_norm"]["forward"]
    jobs: list[tuple[int, torch.dtype, dict[str, int]]] = [
        *((dim, dtype, {}) for dim in (1, 3, 24, 576, 4096) for dtype in (FP32, BF16)), (24, FP16, {}),
        *((24, FP32, {"ROWS": rows, "num_warps": warps}) for rows in configs["ROWS"] for warps in configs["num_warps"]),
    ]  # fmt: skip
    for dim, dtype, config in jobs:
        n = count_differences(chip, dim, dtype, **config)
        wrong += n
        print(f"D={dim} {dtype} {config or ''}: {n} of {N_ROWS * dim} outputs differ", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
