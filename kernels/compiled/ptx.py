"""The PTX machine: run a compiled kernel on the CPU, over CPU tensors, checked as a sanitizer would.

    module = Module(ptx)
    result = module.launch("reduce", grid=(4,), args=(x, out, 1000), num_warps=8)
    result.findings, result.counters

Tensors are the host's: a kernel gets their addresses. It may touch what lies between the first and the last element of
each tensor it is given, and the padding of rows. What is checked and counted is described in csrc/ptx/machine.h.
"""

import ctypes
import json
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.compiled.machine_library import PtxError, Request, load_library, take_text

__all__ = ["Finding", "Module", "Options", "PtxError", "Result", "SlowAccess"]


@dataclass(frozen=True)
class Options:
    """How the machine runs a launch."""

    late: bool = False  # asynchronous copies and products take effect when they are waited for, else when issued
    reverse: bool = False  # warps take turns from the last to the first
    check: bool = True  # races and reads of unwritten shared memory are looked for
    limit: int = 1 << 32  # instructions of a warp


@dataclass(frozen=True)
class Finding:
    """Something a kernel must not do, at the first place it did it."""

    kind: str  # see csrc/ptx/machine.h
    text: str
    instruction: str
    line: int  # of the PTX
    where: str  # in the source: "file:line in file:line"
    block: tuple[int, int, int]
    warp: int
    lane: int
    count: int  # how often it happened

    def __str__(self) -> str:
        """Return one line for a message."""
        at = f"PTX line {self.line} ({self.where}), block {self.block} warp {self.warp} lane {self.lane}"
        return f"{self.kind}: {self.text}; {self.instruction}, {at}, {self.count} times"


@dataclass(frozen=True)
class SlowAccess:
    """An instruction that uses less than 90% of the global sectors it moves, or waits for banks of shared memory."""

    line: int  # of the PTX
    instruction: str
    where: str  # in the source
    sectors: int  # of 32 bytes
    bytes: int  # used of the sectors
    cycles: int  # of the banks
    ideal_cycles: int  # of the banks, without conflicts


@dataclass(frozen=True)
class Result:
    """What one launch showed."""

    kernel: str
    findings: list[Finding]
    counters: dict[str, int]
    seconds: float  # of CPU time
    slow: list[SlowAccess]
    ptx: str = field(repr=False)


def find_extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses from a tensor's first element to the end of its last one, or of its last row's padding."""
    start, storage = tensor.data_ptr(), tensor.untyped_storage()
    if not tensor.numel():
        return start, start
    sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
    last = sum((n - 1) * stride for n, stride in sizes) + 1
    padded = max((n * stride for n, stride in sizes), default=1)
    return start, min(start + max(last, padded) * tensor.element_size(), storage.data_ptr() + storage.nbytes())


class Module:
    """PTX that the machine has read. `params` maps each kernel's name to the bytes of its parameters."""

    def __init__(self, ptx: str) -> None:
        """Read PTX. Raises PtxError with the name and line of an instruction that is not known."""
        self._library = load_library()
        error = ctypes.c_void_p()
        self.ptx = ptx
        self._module = self._library.ptx_load(ptx.encode(), ctypes.byref(error))
        if error.value:
            raise PtxError(take_text(error.value))
        lines = take_text(self._library.ptx_kernels(self._module)).splitlines()
        self.params = {name: list(map(int, sizes)) for name, *sizes in map(str.split, lines)}

    def __del__(self) -> None:
        """Free what the library holds."""
        if getattr(self, "_module", None):
            self._library.ptx_unload(self._module)

    def launch(
        self,
        kernel: str | None,
        grid: int | Sequence[int],
        args: Sequence[Any],
        *,
        num_warps: int = 4,
        block: Sequence[int] | None = None,
        shared_bytes: int = 0,
        tensors: Mapping[str, torch.Tensor] | None = None,
        options: Options = Options(),
    ) -> Result:
        """Run a grid of a kernel, or of the only one there is for None.

        grid, block: one to three sizes; without a block, num_warps warps. args: tensors, numbers, None for a null
        pointer, bytes as they are; a float takes its parameter's width. shared_bytes: of dynamic shared memory a block.
        tensors: further tensors the kernel may touch by name, and names for some of args.
        Raises PtxError if the arguments do not fit the kernel.
        """
        if kernel is None:
            kernel = next(iter(self.params))
        sizes = self.params.get(kernel)
        if sizes is None:
            raise PtxError(f"{kernel}: no such kernel, wanted one of {', '.join(self.params)}")
        if len(sizes) != len(args):
            raise PtxError(f"{kernel}: {len(args)} arguments, wanted {len(sizes)} of {sizes} bytes")
        values = [_as_parameter(kernel, arg, size) for arg, size in zip(args, sizes, strict=True)]
        names = {id(tensor): name for name, tensor in (tensors or {}).items()}
        reach = {id(t): t for t in (*(tensors or {}).values(), *args) if isinstance(t, torch.Tensor)}
        request = Request(
            _three(grid), _three(block or 32 * num_warps), shared_bytes, options.limit, options.late, options.reverse,
            options.check, len(values), len(reach),
        )  # fmt: skip
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        spans = (ctypes.c_uint64 * (2 * len(reach)))(*(x for t in reach.values() for x in find_extent(t)))
        texts = (ctypes.c_char_p * len(reach))(*(names.get(i, "an argument").encode() for i in reach))
        request.args, request.ranges = ctypes.addressof(pointers), ctypes.addressof(spans)
        request.names = ctypes.addressof(texts)
        started = time.thread_time()
        answer = json.loads(take_text(self._library.ptx_run(self._module, kernel.encode(), ctypes.byref(request))))
        seconds = time.thread_time() - started
        if "error" in answer:
            raise PtxError(f"{kernel}: {answer['error']}")
        findings = [Finding(**f | {"block": tuple(f["block"])}) for f in answer["findings"]]
        slow = [SlowAccess(**access) for access in answer["slow"]]
        return Result(kernel, findings, answer["counters"], seconds, slow, self.ptx)


def _three(shape: int | Iterable[int]) -> Any:
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


def _as_parameter(kernel: str, arg: Any, size: int) -> Any:
    """Return a buffer of the bytes a parameter of this size gets. Raises PtxError for a tensor not on the CPU."""
    if isinstance(arg, torch.Tensor):
        if arg.device.type != "cpu":
            raise PtxError(f"{kernel}: a tensor on {arg.device}, wanted one on the CPU")
        arg = arg.data_ptr()
    if isinstance(arg, float):
        arg = struct.pack({2: "e", 4: "f", 8: "d"}[size], arg)
    if not isinstance(arg, bytes):
        arg = (int(arg or 0) % (1 << 8 * size)).to_bytes(size, "little")
    return ctypes.create_string_buffer(arg, size)
