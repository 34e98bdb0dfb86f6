"""What every op shares: the choice of an implementation, launch configurations, registration with torch, and the width
in which sums are taken."""

import functools
import json
from pathlib import Path

import torch
from triton import knobs

IMPLS = ("auto", "triton", "ref")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels; the references take fp64 too
INTERPRETED = knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on CPU tensors, slowly
LAUNCH = Path(__file__).parent.parent / "launch"


def choose(op: str, impl: str, x: torch.Tensor) -> str:
    """The implementation to run on tensors like x: "triton" or "ref".

    "auto" is "triton" on CUDA and "ref" on a CPU and for fp64; a named one is insisted on.
    Raises ValueError for an unknown name, and where "triton" cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl is {impl!r}, wanted one of {', '.join(IMPLS)}")
    if impl == "auto":
        return "triton" if x.is_cuda and x.dtype in DTYPES else "ref"
    if impl == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"{op}: impl='triton' runs on CUDA, x is on {x.device}; pass impl='auto', or set TRITON_INTERPRET=1 to run "
            f"the kernels in Triton's interpreter"
        )
    if impl == "triton" and x.dtype not in DTYPES:
        raise ValueError(f"{op}: impl='triton' takes fp32, bf16 and fp16, x is {x.dtype}; pass impl='ref'")
    return impl


def wide(x):
    """x in fp32, or wider where it is wider already: statistics and losses are never summed in bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor | None:
    """dy.T @ x, the gradient of weight in y = x @ weight.T, for backward to return.

    into: the weight, a leaf, to whose .grad it is added instead, in the GEMM's epilogue, for backward to return None:
    autograd's own addition would hold a second gradient and move 6 bytes an element more in bf16. What looks at
    gradients as autograd adds them (hooks of a parameter) is then not called.
    """
    if into is None:
        return dy.T @ x
    if into.grad is None:
        into.grad = dy.T @ x
    else:
        into.grad.addmm_(dy.T, x)
    return None


def accumulator(op: str, weight: torch.Tensor, accumulate: bool) -> torch.Tensor | None:
    """What weight_gradient takes as `into`: the weight, or None. Raises ValueError for a weight without a .grad."""
    if accumulate and weight.requires_grad and not weight.is_leaf:
        raise ValueError(f"{op}: accumulate=True wants a parameter, weight is a view or a result; pass the parameter")
    return weight if accumulate else None


# ---- launch configurations: plain data in launch/<op>.json ----------------------------------------------------------

chip_override: str | None = None  # the static gate and the tuner ask for a chip that is not there


def chip(device: torch.device) -> str:
    """The newest chip of launch/*.json that is not newer than the device's: "sm_80", "sm_90", "sm_100"; "interpreter"
    on a CPU. Raises ValueError for a card older than sm_80."""
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
    """Streaming multiprocessors of the device; of the SXM cards where the chip is not there."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return {"sm_80": 108, "sm_90": 132, "sm_100": 148, "interpreter": 2}[chip(device)]


@functools.cache
def launch_table(op: str) -> dict:
    """launch/<op>.json: kernel -> chip -> largest size -> {constexprs, num_warps, num_stages, "from"}."""
    return json.loads((LAUNCH / f"{op}.json").read_text())


def launch_config(op: str, kernel: str, device: torch.device, size: int = 0) -> dict:
    """Constexprs, num_warps and num_stages of one launch: of the entry with the smallest "largest size" that is not
    under `size`, or the last. What size means is the kernel's own: a row's width, a head's."""
    by_size = launch_table(op)[kernel][chip(device)]
    largest = next((key for key in by_size if int(key) >= size), list(by_size)[-1])
    return {name: value for name, value in by_size[largest].items() if name != "from"}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


# ---- torch.library --------------------------------------------------------------------------------------------------


def operator(name: str, mutates=(), *, cpu, fake):
    """Decorates a launch function, annotated with types, as torch.ops.cria.<name>, so that torch.compile traces it.

    cpu: the same in plain torch, what the operator does on CPU tensors outside Triton's interpreter.
    fake: the outputs' shapes and dtypes, without values. mutates: names of the arguments written in place.
    """

    def register(launch):
        op = torch.library.custom_op(f"cria::{name}", launch, mutates_args=mutates, device_types="cuda")
        op.register_kernel("cpu")(launch if INTERPRETED else cpu)
        op.register_fake(fake)
        op.launch, op.cpu = launch, cpu
        return op

    return register
