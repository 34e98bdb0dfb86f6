"""Parts that ops share: choice of an implementation, gradients of weights, launch configurations, operators."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import triton
import triton.language as tl
from triton import knobs

from kernels.native.cpu import find_cpu, load_cpu
from kernels.native.weight_gradient import takes, write_weight_gradient

IMPLS = ("auto", "triton", "native", "ref")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the references take fp64 too
NATIVE_DTYPES = (torch.float32, torch.bfloat16)  # of csrc/cpu
INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on CPU tensors, slowly
COMPILED = tl.constexpr(not INTERPRETED)  # in a kernel: whether inline assembly can run
LAUNCH = Path(__file__).parent.parent / "launch"


@triton.jit
def _loop_kernel(n):
    for _ in range(0, n):
        pass


if INTERPRETED:
    try:
        _loop_kernel[(1,)](1)
    except Exception as error:  # Triton 3.6 makes an int of an array (1,), which NumPy refuses from 2.4 on
        raise ImportError(
            f"the interpreter of Triton {triton.__version__} does not run under NumPy {numpy.__version__} ({error}); "
            f"install numpy<2.4 or a newer Triton, or unset TRITON_INTERPRET"
        ) from error


def choose_impl(op: str, impl: str, x: torch.Tensor, has_native: bool = False) -> str:
    """Return the implementation to run on tensors like x: "triton", "native" or "ref".

    has_native: whether the op has a function in csrc/cpu, which "native" names; without one "native" means "ref". impl:
    "auto" chooses "triton" on CUDA, "native" on a CPU where the library is, and "ref" otherwise and for dtypes that
    neither takes; any other name is taken as it is. Raises ValueError for an unknown name, and if the implementation
    cannot run on x.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl is {impl!r}, wanted one of {', '.join(IMPLS)}")
    on_cpu = x.device.type == "cpu"
    if impl == "auto":
        if has_native and on_cpu and x.dtype in NATIVE_DTYPES and not INTERPRETED and find_cpu() is not None:
            return "native"
        return "triton" if x.is_cuda and x.dtype in DTYPES else "ref"
    if impl == "native" and not (on_cpu and x.dtype in NATIVE_DTYPES):
        raise ValueError(
            f"{op}: impl='native' runs on the CPU in fp32 and bf16, x is {x.dtype} on {x.device}; pass impl='auto'"
        )
    if impl == "native":
        if has_native:
            load_cpu()  # raises where the library is missing
        return "native" if has_native else "ref"
    if impl == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"{op}: impl='triton' runs on CUDA, x is on {x.device}; pass impl='auto', or set TRITON_INTERPRET=1 to run "
            f"the kernels in Triton's interpreter"
        )
    if impl == "triton" and x.dtype not in DTYPES:
        raise ValueError(f"{op}: impl='triton' takes fp32, bf16 and fp16, x is {x.dtype}; pass impl='ref'")
    return impl


def widen(x: torch.Tensor) -> torch.Tensor:
    """Return x in fp32, or unchanged if it is wider. Statistics and losses are never summed in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chunk_size(on_cpu: int, device: torch.device) -> int:
    """Return how many elements or rows a reference takes at a time: on_cpu of them on a CPU, whose cache they fit.

    A GPU takes 256 times as many: there, a launch for each chunk of a CPU would cost more than the chunk.
    """
    return on_cpu if device.type == "cpu" else 256 * on_cpu


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor | None:
    """Return dy.T @ x, the gradient of weight in y = x @ weight.T; or add it to into.grad and return None.

    into: the weight, a leaf. The addition then runs in the GEMM's epilogue: autograd's own would hold a second gradient
    and move 6 bytes an element more in bf16. Hooks of the parameter are not called for a gradient that is added here.
    """
    old = None if into is None else into.grad
    if is_by_amx(dy, x):
        grad = dy.new_empty(dy.shape[1], x.shape[1]) if old is None else old
        write_weight_gradient(grad, dy, x, is_added=old is not None)
    else:
        grad = dy.T @ x if old is None else old.addmm_(dy.T, x)
    if into is None:
        return grad
    into.grad = grad
    return None


def set_weight_gradient(out: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, beta: int) -> None:
    """Set out = beta * out + dy.T @ x, summed in fp32 or in out's dtype. beta: 0, which reads no old values, or 1."""
    if is_by_amx(dy, x):
        write_weight_gradient(out, dy, x, is_added=bool(beta))
    else:
        add_product(out, dy.T, x, beta)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int) -> None:
    """Set out = beta * out + a @ b by torch, summed in out's dtype, which may be fp32 for 16-bit a and b.

    With beta 0 the old values of out are not read.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.device.type == "cpu":  # a CPU has no such GEMM
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    else:  # out in another dtype than a and b: torch 2.10, github.com/pytorch/pytorch/pull/167931
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


def is_by_amx(dy: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether dy.T @ x is a product of kernels.native.weight_gradient: not in Triton's interpreter."""
    return not INTERPRETED and takes(dy, x)


class PackedWeight(Protocol):
    """A frozen weight that is not stored as a matrix, as kernels.ops.nf4's."""

    @property
    def shape(self) -> Sequence[int]:
        """Return (N, D)."""
        ...

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix (N, D) that it stands for, made anew."""
        ...


Weight = torch.Tensor | PackedWeight


def dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as a matrix (N, D). A packed one is made anew in a dtype, 2 N D bytes in bf16, for one use."""
    return weight if isinstance(weight, torch.Tensor) else weight.dequantise(dtype)


def hold_weight(ctx: Any, weight: Weight) -> torch.Tensor | None:
    """Keep a packed weight on an autograd context; return another, for save_for_backward."""
    ctx.packed = None
    if isinstance(weight, torch.Tensor):
        return weight
    ctx.packed = weight
    return None


def held_weight(ctx: Any, saved: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix (N, D) of a weight that hold_weight() kept. saved: what save_for_backward gives back."""
    return dense(ctx.packed, dtype) if saved is None else saved


def accumulator(op: str, weight: Weight, accumulate: bool) -> torch.Tensor | None:
    """Return the weight if accumulate, else None: what weight_gradient takes as `into`. A frozen weight takes nothing.

    Raises ValueError for a weight that is no leaf, which has no .grad.
    """
    if not isinstance(weight, torch.Tensor) or not weight.requires_grad:
        return None
    if accumulate and not weight.is_leaf:
        raise ValueError(f"{op}: accumulate=True wants a parameter, weight is a view or a result; pass the parameter")
    return weight if accumulate else None


# ---- launch configurations: plain data in launch/<op>.json ----------------------------------------------------------

chip_override: str | None = None  # set by the static gate and the tuner, which compile for other chips


def chip(device: torch.device) -> str:
    """Return the newest chip of launch/*.json that is not newer than the device: "sm_80", "sm_90" or "sm_100".

    A CPU is "interpreter". Raises ValueError for a card older than sm_80.
    """
    if chip_override:
        return chip_override
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    known = [capability for capability in (100, 90, 80) if capability <= 10 * major + minor]
    if not known:
        raise ValueError(f"kernels: this card is sm_{major}{minor}, wanted sm_80 or newer; use the references (ref)")
    return f"sm_{known[0]}"


def n_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors, of the chip's SXM card if the device is no GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return {"sm_80": 108, "sm_90": 132, "sm_100": 148, "interpreter": 2}[chip(device)]


@functools.cache
def launch_table(op: str) -> dict:
    """Return launch/<op>.json: kernel -> chip -> largest size -> {constexprs, num_warps, num_stages, "from"}."""
    return json.loads((LAUNCH / f"{op}.json").read_text())


def launch_config(op: str, kernel: str, device: torch.device, size: int = 0) -> dict:
    """Return constexprs, num_warps and num_stages of one launch.

    They are those of the first entry whose largest size is at least `size`, or of the last entry. Each kernel gives
    size its own meaning: the width of a row, or of a head.
    """
    by_size = launch_table(op)[kernel][chip(device)]
    largest = next((key for key in by_size if int(key) >= size), list(by_size)[-1])
    return {name: value for name, value in by_size[largest].items() if name != "from"}


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


# ---- torch.library --------------------------------------------------------------------------------------------------


def operator(
    name: str,
    mutates: Sequence[str] = (),
    *,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    native: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate an annotated launch function as torch.ops.cria.<name>, so that torch.compile can trace it.

    cpu: does in plain torch what the launch function does. native: does it in C++. On CPU tensors the launch function
    runs in Triton's interpreter, else native where its library is and takes the first argument's dtype, else cpu.
    fake: returns outputs of the right shapes and dtypes, without values. mutates: names of arguments written in place.
    """

    def register(launch):
        def on_cpu(first, *others):
            if INTERPRETED:
                return launch(first, *others)
            if native is not None and first.dtype in NATIVE_DTYPES and find_cpu() is not None:
                return native(first, *others)
            return cpu(first, *others)

        op: Any = torch.library.custom_op(f"cria::{name}", launch, mutates_args=mutates, device_types="cuda")
        op.register_kernel("cpu")(on_cpu)
        op.register_fake(fake)
        op.launch, op.cpu = launch, cpu
        return op

    return register
