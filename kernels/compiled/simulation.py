"""Runs the kernels' launches on the PTX machine: compiled for a chip that is not here, executed over CPU tensors.

with on_machine("sm_90") as results:  # not under TRITON_INTERPRET=1
    y = kernels.rms_norm(x, weight, impl="triton")
print(results[0].kernel, results[0].findings, results[0].counters)
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch._library.custom_ops import OPDEFS
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels.compiled.launches import bind_arguments, patched
from kernels.compiled.machine_code import CHIPS
from kernels.compiled.ptx import Module, Options, PtxError, Result
from kernels.compiled.rules import operator_names
from kernels.compiled.tensor_map import encode_tensor_map
from kernels.ops import common

Edit = Callable[[str], str]  # PTX -> PTX

_modules: dict[tuple, tuple[Module, Any]] = {}  # what was compiled, with Triton's metadata


@contextlib.contextmanager
def on_machine(
    chip: str,
    edit: Edit | None = None,
    strict: bool = False,
    table: str | None = None,
    late: bool = False,
    reverse: bool = False,
    check: bool = True,
) -> Iterator[list[Result]]:
    """Inside, kernels given CPU tensors are compiled for the chip and run on the machine. Yields the launches' results.

    edit: changes what was compiled before it runs. strict: a launch with findings raises AssertionError.
    table: the chip whose launch tables are used, "interpreter" for those of Triton's interpreter; the chip's own for
    None. late, reverse, check: see kernels.compiled.ptx.Options.
    Raises PtxError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    if knobs.runtime.interpret:
        raise PtxError(
            "on_machine: TRITON_INTERPRET is set, wanted compiled kernels; unset it before kernels is imported"
        )
    options = Options(late=late, reverse=reverse, check=check)
    results: list[Result] = []

    def run(function, *args, grid, warmup, **kwargs):
        results.append(run_launch((function, args, kwargs), grid, chip, edit, options))
        if strict and results[-1].findings:
            raise AssertionError("\n".join(map(str, results[-1].findings)))

    override = None if table == "interpreter" else table or chip
    with (
        patched(common, chip_override=override, INTERPRETED=True),
        patched(JITFunction, run=run),
        _launched_on_cpu(),
    ):
        yield results


@contextlib.contextmanager
def _launched_on_cpu() -> Iterator[None]:
    """Let every operator of ours launch its kernels for CPU tensors too, as long as the context lasts."""
    operator_names()  # imports every op
    ours = [op for name, op in OPDEFS.items() if name.startswith("cria::") and hasattr(op, "launch")]
    before = [op._backend_fns.get("cpu") for op in ours]
    try:
        for op in ours:
            op._backend_fns["cpu"] = op.launch  # type: ignore[attr-defined]
        yield
    finally:
        for op, old in zip(ours, before, strict=True):
            op._backend_fns["cpu"] = old  # type: ignore[assignment]


def run_launch(
    call: tuple[JITFunction, tuple, dict], grid: Any, chip: str, edit: Edit | None, options: Options
) -> Result:
    """Compile a kernel for its arguments, given as (kernel, arguments, named arguments), and run the grid."""
    function, args, kwargs = call
    parsed, signature, constants, attributes, bound = bind_arguments(function, args, kwargs, chip)
    compiled = (signature, constants, attributes, parsed)
    key = (function.fn.__module__, function.fn.__qualname__, chip, edit, *map(str, compiled))
    if key not in _modules:
        _modules[key] = _compile(ASTSource(function, signature, constants, attributes), chip, parsed, edit)
    module, metadata = _modules[key]
    shape = grid(bound) if callable(grid) else grid
    reach, values = _as_parameters(signature, bound, metadata)
    reach["scratch"] = _allocate(math.prod(shape) * metadata.global_scratch_size, metadata.global_scratch_align)
    reached = [t for table in reach.values() for t in getattr(table, "reached", ())]  # see kernels.ops.tensor_table
    reach |= {f"reached {i}": t for i, t in enumerate(reached)}
    return module.launch(
        None,
        shape,
        [*values, reach["scratch"], None],  # Triton appends them: memory for its own use, and that of its profiler
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        tensors=reach,
        options=options,
    )


def _compile(source: ASTSource, chip: str, options: Any, edit: Edit | None) -> tuple[Module, Any]:
    with knobs.cache.scope(), patched(knobs.runtime, add_stages_inspection_hook=_leave_out_machine_code):
        knobs.cache.dir = os.path.join(knobs.cache.dir, "ptx")  # Triton 3.6 does not ask the hook for a name
        made = triton.compile(source, target=GPUTarget("cuda", CHIPS[chip], 32), options=options.__dict__)
    return Module(edit(made.asm["ptx"]) if edit else made.asm["ptx"]), made.metadata


def _leave_out_machine_code(*call: Any) -> tuple[str, str]:
    """Let Triton's compiler end at PTX: ptxas takes a sixth of its time, and the machine does not read what it makes.

    Triton calls this for a name, which goes into that of the cache's entry, and again with (backend, stages, ...).
    """
    if call:
        call[1]["cubin"] = lambda source, metadata: b""
    return "without machine code", "without machine code"


def _allocate(n_bytes: int, alignment: int) -> torch.Tensor:
    """Return memory whose address is a multiple of alignment."""
    memory = torch.empty(n_bytes + alignment, dtype=torch.uint8)
    first = -memory.data_ptr() % alignment
    return memory[first : first + n_bytes]


def _as_parameters(signature: dict, bound: dict, metadata: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Return the tensors a kernel may touch by name, and its parameters in order, as Triton's launcher passes them."""
    reach: dict[str, torch.Tensor] = {}
    values: list[Any] = []
    maps = iter(metadata.tensordesc_meta or ())
    for name, kind in signature.items():
        value = bound[name]
        if isinstance(value, torch.Tensor):
            reach[name] = value
            values.append(value)
        elif kind.startswith("tensordesc"):
            layout = next(maps, None)
            if layout is None:
                raise PtxError(f"{metadata.name}: {name} is a tensor descriptor, which the machine runs on sm_90 only")
            reach[name] = value.base.as_strided(value.shape, value.strides)
            swizzle_bytes = (0, 32, 64, 128)[layout["swizzle"]]
            tensor_map = encode_tensor_map(reach[name], layout["block_size"], swizzle_bytes, value.padding == "nan")
            values += [tensor_map, *value.shape, *value.strides]
        elif kind != "constexpr":
            values.append(float(value) if kind.startswith(("fp", "bf")) else value)
    return reach, values
