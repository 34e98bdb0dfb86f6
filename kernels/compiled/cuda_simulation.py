"""Runs the launches of csrc/cuda on the PTX machine: nvcc's PTX for a chip that is not here, over CPU tensors.

with cuda_on_machine("sm_80") as results:
    kernels.adamw_many(params, grads, states, impl="cuda", ...)
print(results[0].kernel, results[0].findings, results[0].counters)
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.compiled.launches import patched
from kernels.compiled.ptx import Module, Options, PtxError, Result
from kernels.compiled.tensor_map import encode_tensor_map
from kernels.native import cuda, toolchain
from kernels.native.library import ROOT

Edit = Callable[[str], str]  # PTX -> PTX


@cache
def compile_source(source: str, chip: str) -> str:
    """Return the PTX of a file of csrc/cuda for sm_80 or sm_90. Raises MissingCompiler without nvcc.

    nvcc takes seconds, so a checkout keeps the PTX in build/ until a source changes.
    """
    folder, nvcc = ROOT / "csrc" / "cuda", toolchain.find_nvcc()
    parts = [path.read_bytes() for path in (folder / source, *sorted(folder.glob("*.cuh")), Path(toolchain.__file__))]
    digest = hashlib.sha256(b"".join([*parts, toolchain.describe(nvcc).encode()])).hexdigest()[:16]
    kept = ROOT / "build" / f"{source}-{chip}-{digest}.ptx"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        for old in kept.parent.glob(f"{source}-{chip}-*"):
            old.unlink(missing_ok=True)
        draft = kept.with_suffix(f".{os.getpid()}.draft")
        draft.write_text(toolchain.compile_ptx(folder / source, {"sm_80": "80", "sm_90": "90a"}[chip]))
        draft.replace(kept)
    return kept.read_text()


@cache
def _read(source: str, chip: str, edit: Edit | None) -> Module:
    ptx = compile_source(source, chip)
    return Module(edit(ptx) if edit else ptx)


def run_launch(launch: cuda.CudaLaunch, chip: str, edit: Edit | None = None, options: Options | None = None) -> Result:
    """Run one launch. edit: changes the PTX before it runs. Raises PtxError unless one kernel has the launch's name."""
    module = _read(launch.source, chip, edit)
    found = [name for name in module.params if launch.kernel in name]
    if len(found) != 1:
        raise PtxError(f"{launch.source}: {len(found)} kernels are called {launch.kernel}, wanted one")
    mapped = [a.tensor for a in launch.arguments if isinstance(a, cuda.TileMap)]
    tensors: dict[str, torch.Tensor] = {f"reached {i}": t for i, t in enumerate((*launch.reached, *mapped))}
    result = module.launch(
        found[0],
        launch.grid,
        [encode_tensor_map(a.tensor, a.box, 128) if isinstance(a, cuda.TileMap) else a for a in launch.arguments],
        num_warps=launch.threads // 32,
        shared_bytes=launch.shared_bytes,
        tensors=tensors,
        options=options or Options(),
    )
    return replace(result, kernel=launch.function)


@contextlib.contextmanager
def cuda_on_machine(chip: str, edit: Edit | None = None, **options: Any) -> Iterator[list[Result]]:
    """Inside, kernels of csrc/cuda given CPU tensors run on the machine. Yields the launches' results.

    options: late, reverse, check of kernels.compiled.ptx.Options.
    """
    results: list[Result] = []

    def run(launch: cuda.CudaLaunch) -> None:
        results.append(run_launch(launch, chip, edit, Options(**options)))

    with patched(cuda, runner=run):
        yield results
