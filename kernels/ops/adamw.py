"""AdamW, in place, one tensor a call, in one pass.

    m = m + (1 - b1) (g - m)       v = b2 v + (1 - b2) g^2       g = grad * grad_scale
    p = p (1 - lr wd) - lr s m / (sqrt(v) + eps r)               r = sqrt(1 - b2^t), s = r / (1 - b1^t)

p is an fp32 number, stored in one of four ways (adamw_state makes the tensors):

    an fp32 parameter is p itself.
    "fp32"        a bf16 parameter beside its fp32 master p; the parameter is p rounded to nearest even.
    "split"       a bf16 parameter and the 16 bits that it lacks, int16: parameter * 2^16 + low is p's bit pattern. The
                  parameter is p rounded to nearest, ties away from zero: nearest even cannot be inverted from 16 bits.
    "stochastic"  only the bf16 parameter: p rounded up or down at random, with the probability that keeps its mean.

m and v are "fp32", "bf16" or "8bit". bf16 states are rounded stochastically: v changes by 1 - b2 = 0.001 a step, less
than half a unit, so rounding to nearest would never move it. 8-bit states are blocks of 256 elements, each with an fp32
absolute maximum and a byte an element, the nearest entry of the dynamic map (signed for m, unsigned for v). A v that is
not 0 is never rounded to 0, because m / sqrt(v) would then leap. Tensors under 4096 elements keep fp32 states.

Bound by memory: 24 to 43 machine instructions an element with fp32 states, 53 to 61 with bf16 states, which are rounded
at random, 64 to 80 with 8-bit states, which are looked up. Bytes moved a parameter, with bf16 gradients:

              m, v: fp32     bf16     8bit          kept besides parameter and gradient: fp32  bf16  8bit
    fp32 p          26        18       14.1                                                8     4     2.03
    "fp32"          28        20       16.1                                               12     8     6.03
    "split"         26        18       14.1                                               10     6     4.03
    "stochastic"    22        14       10.1                                                8     4     2.03

No multiply-add is fused: m, v and their codes have equal bits in the reference, in the interpreter and on a chip. p
differs by the rounding of a square root and a division, up to two units of the update. Random bits are Philox4x32-10 of
the key (step, seed) and the counter (global element index / 8, stream), so replicas and shards agree. NaN and Inf are
kept: a block of 8-bit states that holds one becomes NaN.
Source: arXiv:1711.05101; dynamic map and blocks arXiv:2110.02861; Philox doi:10.1145/2063384.2063405.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import triton

from kernels.native.cpu import AdamWArguments, load_cpu
from kernels.native.library import check
from kernels.ops import eight_bit as dynamic_map
from kernels.ops.adamw_kernels import update_kernel
from kernels.ops.common import choose_impl, chunk_size, launch_config, operator
from kernels.ops.eight_bit import decode_ref, encode_ref

MASTERS, STATES = ("fp32", "split", "stochastic"), ("fp32", "bf16", "8bit")
LEAST_8BIT = 4096  # elements: smaller tensors keep fp32 states
CHUNK = 1 << 18  # elements of the reference's chunks, which stay in a core's L2 from pass to pass


# ---- what an update keeps -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamWState:
    """The tensors of one parameter, updated in place. m, v, low (int16) and master (fp32) have its shape."""

    m: torch.Tensor
    v: torch.Tensor
    m_absmax: torch.Tensor | None = None  # (blocks,) fp32, of 8-bit states
    v_absmax: torch.Tensor | None = None
    low: torch.Tensor | None = None
    master: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that exist, by name."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}


def adamw_state(
    param: torch.Tensor, master: str = "split", states: str = "fp32", whole: int | None = None
) -> AdamWState:
    """Return the state before the first update of param, which is fp32 or bf16.

    master: how p is stored for a bf16 parameter, see the top of the file. whole: if param is a shard, the number of
    elements of the whole tensor; a shard must hold whole blocks of 256. Raises ValueError for other names and dtypes.
    """
    for name, value, known in (("master", master, MASTERS), ("states", states, STATES)):
        if value not in known:
            raise ValueError(f"adamw: {name} is {value!r}, wanted one of {', '.join(known)}")
    _check_param(param)
    kept = {}
    if param.dtype == torch.bfloat16 and master == "fp32":
        kept["master"] = param.detach().float().contiguous()
    elif param.dtype == torch.bfloat16 and master == "split":
        kept["low"] = param.new_zeros(param.shape, dtype=torch.int16)
    if states == "8bit" and (whole or param.numel()) >= LEAST_8BIT:
        blocks = triton.cdiv(param.numel(), dynamic_map.BLOCK)
        kept |= {name: param.new_zeros(blocks, dtype=torch.float32) for name in ("m_absmax", "v_absmax")}
        m = param.new_full(param.shape, 127, dtype=torch.uint8)
        v = param.new_zeros(param.shape, dtype=torch.uint8)
    else:
        dtype = torch.bfloat16 if states == "bf16" else torch.float32
        m, v = (param.new_zeros(param.shape, dtype=dtype) for _ in range(2))
    return AdamWState(m.detach(), v.detach(), **kept)


def states_of(param: torch.Tensor, states: str) -> str:
    """Return the kind of states to keep for a parameter: fp32 instead of 8bit for a vector, else `states`.

    Vectors are small, and a vector in blocks of 256 elements could be divided into few shards only.
    """
    return "fp32" if states == "8bit" and param.ndim == 1 else states


def master_of(param: torch.Tensor, state: AdamWState) -> torch.Tensor:
    """Return p in fp32, from which the next update starts: param itself, its master, or a new tensor."""
    if state.master is not None or param.dtype == torch.float32:
        return param.detach() if state.master is None else state.master
    wide = param.detach().float()
    if state.low is not None:
        wide.view(torch.int32).add_(state.low)
    return wide


# ---- reference: the specification, and the path on CPU --------------------------------------------------------------


def random_bits(
    seed: int, step: int, first: int, n: int, stream: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return 16 random bits for each of n elements from `first` on, (n,) int32. One Philox call serves eight."""
    group = torch.arange(first // 8, (first + n + 7) // 8, device=device)
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = group & word, group >> 32, torch.full_like(group, stream), torch.zeros_like(group)
    for i in range(10):
        k0, k1 = (seed + i * 0x9E3779B9) & word, (step + i * 0xBB67AE85) & word
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64; the sign goes with the mask
        c0, c1, c2, c3 = (b >> 32 & word) ^ c1 ^ k0, b & word, (a >> 32 & word) ^ c3 ^ k1, a & word
    words = torch.stack((c0, c1, c2, c3), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[first % 8 :][:n].int()


def _round_ref(x, out, low=None, random=None):
    """Set out (bf16) to x, rounded half up with the rest in low (int16), or at random with random. Overwrites x."""
    x.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)  # one NaN, as _quiet_bits
    extra = 0x8000 if random is None else random.where(x.isfinite(), 0)
    bits = x.view(torch.int32)
    if low is not None:
        low.copy_(bits)
    # The upper half of each number, on a little-endian machine.
    out.view(torch.int16).copy_(bits.add_(extra).view(torch.int16)[1::2])


def _read_ref(t, absmax, signed):
    """Return the state in fp32, t itself if it is fp32."""
    return t.float() if absmax is None else decode_ref(t, absmax, signed)


def _write_ref(x, t, absmax, signed, random):
    if t.dtype == torch.bfloat16:
        _round_ref(x, t, random=random(1 if signed else 2))
    elif absmax is not None:
        for out, value in zip((t, absmax), encode_ref(x, signed), strict=True):
            out.copy_(value)


def bias_corrections(beta1: float, beta2: float, eps: float, step: int) -> tuple[float, float]:
    """Return eps r and s of the formula, in fp64."""
    r = math.sqrt(1 - beta2**step)
    return eps * r, r / (1 - beta1**step)


def _square_root(x, out):
    """Return out, set to the root of x, rounded to nearest. torch's own on a CPU is MKL's: 17% are an ulp off."""
    if x.device.type != "cpu":
        return torch.sqrt(x, out=out)
    with np.errstate(invalid="ignore"):
        np.sqrt(x.numpy(), out=out.numpy())
    return out


def _step_numbers(param, lr, lr_tensor, beta1, beta2, eps, weight_decay, step):
    """Return eps r in fp64, and 1 - lr wd and lr s of the formula as fp32 tensors on param's device."""
    lr32 = torch.full((), lr, dtype=torch.float32, device=param.device) if lr_tensor is None else lr_tensor.float()
    eps, factor = bias_corrections(beta1, beta2, eps, step)
    return eps, 1 - lr32 * weight_decay, lr32 * factor


def adamw_ref(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, m_absmax: torch.Tensor | None,
    v_absmax: torch.Tensor | None, low: torch.Tensor | None, master: torch.Tensor | None, lr: float,
    lr_tensor: torch.Tensor | None, scale: float, scale_tensor: torch.Tensor | None, apply: torch.Tensor | None,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int, offset: int,
) -> None:  # fmt: skip
    """Update param and its state in plain torch. The arguments are those of the operator update()."""
    if apply is not None and not apply:  # waits for the GPU if apply lies on one
        return
    factor32 = scale if scale_tensor is None else scale_tensor.float()
    eps, decay, rate = _step_numbers(param, lr, lr_tensor, beta1, beta2, eps, weight_decay, step)
    n = chunk_size(CHUNK, param.device)
    scratch = torch.empty(2, min(n, param.numel()), device=param.device)
    for start in range(0, param.numel(), n):
        chunk: Any = lambda t, size=1, a=start: t if t is None else t.view(-1)[a // size : (a + n) // size]  # noqa: E731
        param_, grad_ = chunk(param), chunk(grad)
        maxima = chunk(m_absmax, dynamic_map.BLOCK), chunk(v_absmax, dynamic_map.BLOCK)
        state = AdamWState(chunk(m), chunk(v), *maxima, chunk(low), chunk(master))
        random = functools.partial(random_bits, seed, step, offset + start, len(param_), device=param.device)
        p, g, t = master_of(param_, state), *(row[: len(param_)] for row in scratch)
        m_, v_ = _read_ref(state.m, state.m_absmax, True), _read_ref(state.v, state.v_absmax, False)
        g.copy_(grad_).mul_(factor32)
        m_.add_(torch.sub(g, m_, out=t).mul_(1 - beta1))
        v_.mul_(beta2).add_(g.mul_(g).mul_(1 - beta2))
        torch.div(m_, _square_root(v_, t).add_(eps), out=t)
        if weight_decay:
            p.mul_(decay)
        p.sub_(t.mul_(rate))
        _write_ref(m_, state.m, state.m_absmax, True, random)
        _write_ref(v_, state.v, state.v_absmax, False, random)
        if state.master is not None:
            param_.copy_(p)
        elif param.dtype == torch.bfloat16:
            _round_ref(p, param_, low=state.low, random=None if state.low is not None else random(0))


# ---- csrc/cpu -------------------------------------------------------------------------------------------------------


def adamw_native(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, m_absmax: torch.Tensor | None,
    v_absmax: torch.Tensor | None, low: torch.Tensor | None, master: torch.Tensor | None, lr: float,
    lr_tensor: torch.Tensor | None, scale: float, scale_tensor: torch.Tensor | None, apply: torch.Tensor | None,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int, offset: int,
) -> None:  # fmt: skip
    """Update contiguous CPU tensors in one pass of compiled code, on torch's threads; adamw_ref's bits in every number.

    The arguments are those of the operator update(). Raises NativeError if the library cannot be had.
    """
    if apply is not None and not apply:
        return
    eps, decay, rate = _step_numbers(param, lr, lr_tensor, beta1, beta2, eps, weight_decay, step)
    streams = {"param": param, "grad": grad, "m": m, "v": v, "m_absmax": m_absmax, "v_absmax": v_absmax}
    streams |= {"low": low, "master": master, "maps": None if m_absmax is None else dynamic_map.native_maps()}
    masters = (param.dtype == torch.float32, master is not None, low is not None, True)
    arguments = AdamWArguments(
        **{name: None if t is None else t.data_ptr() for name, t in streams.items()}, n=param.numel(), offset=offset,
        scale=scale if scale_tensor is None else scale_tensor.item(), rest1=1 - beta1, beta2=beta2, rest2=1 - beta2,
        eps=eps, decay=decay.item() if weight_decay else 1.0, rate=rate.item(), step=step, seed=seed,
        grad_type=grad.dtype == torch.bfloat16, states=(torch.float32, torch.bfloat16, torch.uint8).index(m.dtype),
        master_type=masters.index(True), threads=torch.get_num_threads(),
    )  # fmt: skip
    check(load_cpu().cria_adamw(arguments), "adamw")


# ---- launch: torch.ops.cria.* ---------------------------------------------------------------------------------------


def bits16(t: torch.Tensor | None) -> torch.Tensor | None:
    """Return bf16 as int16: the kernels widen and round bits, which every machine does alike."""
    return t.view(torch.int16) if t is not None and t.dtype == torch.bfloat16 else t


@operator(
    "adamw_update", mutates=("param", "m", "v", "m_absmax", "v_absmax", "low", "master"), cpu=adamw_ref,
    fake=lambda *arguments: None,
)  # fmt: skip
def update(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, m_absmax: torch.Tensor | None,
    v_absmax: torch.Tensor | None, low: torch.Tensor | None, master: torch.Tensor | None, lr: float,
    lr_tensor: torch.Tensor | None, scale: float, scale_tensor: torch.Tensor | None, apply: torch.Tensor | None,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int, offset: int,
) -> None:  # fmt: skip
    """Update contiguous tensors as adamw() does. lr_tensor and scale_tensor, if given, replace the numbers."""
    n, shift = param.numel(), 0
    states_8bit = m_absmax is not None
    if rounds_at_random(param, m, low, master):
        shift = offset % 8
    config = launch_config("adamw", "update_8bit" if states_8bit else "update", param.device)
    del config["TILES"]  # of update_many
    maps = dynamic_map.tables(param.device) if states_8bit else (None, None)
    eps, factor = bias_corrections(beta1, beta2, eps, step)
    if n:
        update_kernel[(triton.cdiv(n + shift, config["BLOCK"]),)](
            bits16(param), bits16(grad), bits16(m), bits16(v), m_absmax, v_absmax, low, master, *maps,
            lr, lr_tensor, scale, scale_tensor, apply, 1 - beta1, beta2, 1 - beta2, eps, factor, weight_decay,
            step << 32 | seed, offset // 8, n, SHIFT=shift, enable_fp_fusion=False,
            **config,
        )  # fmt: skip


def rounds_at_random(
    param: torch.Tensor, m: torch.Tensor, low: torch.Tensor | None, master: torch.Tensor | None
) -> bool:
    """Return whether an update of these tensors draws random bits."""
    return m.dtype == torch.bfloat16 or (param.dtype == torch.bfloat16 and low is None and master is None)


# ---- public ---------------------------------------------------------------------------------------------------------


def _check_param(param):
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"adamw: param is {param.dtype}, wanted torch.float32 or torch.bfloat16")


def check_tensors(param: torch.Tensor, grad: torch.Tensor, state: AdamWState) -> None:
    """Raise ValueError if adamw_state makes no such state for this parameter, or grad does not fit it."""
    _check_param(param)
    if grad.shape != param.shape or grad.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"adamw: grad is {tuple(grad.shape)} {grad.dtype}, wanted {tuple(param.shape)} in fp32 or bf16"
        )
    kinds = {torch.float32, torch.bfloat16} if state.m_absmax is None else {torch.uint8}
    wanted = {"m": kinds, "v": {state.m.dtype}, "low": {torch.int16}, "master": {torch.float32}}
    blocks = torch.Size([-(-param.numel() // dynamic_map.BLOCK)])
    for name, t in {"param": param, **state.tensors()}.items():
        if name in ("m_absmax", "v_absmax"):
            shape, dtypes = blocks, {torch.float32}
        else:
            shape, dtypes = param.shape, wanted.get(name, {param.dtype})
        if t.shape != shape or t.dtype not in dtypes or t.device != param.device or not t.is_contiguous():
            raise ValueError(
                f"adamw: {name} is {tuple(t.shape)} {t.dtype} on {t.device}, wanted contiguous {tuple(shape)} "
                f"{' or '.join(map(str, dtypes))} on {param.device}; make the state with adamw_state"
            )
    if (state.m_absmax is None) != (state.v_absmax is None) or (state.low is not None and state.master is not None):
        raise ValueError("adamw: the state is none of adamw_state's: " + ", ".join(state.tensors()))
    if param.dtype == torch.float32 and (state.low is not None or state.master is not None):
        raise ValueError("adamw: param is torch.float32, its own master, and the state has another")


def _number_or_tensor(name, x, param):
    """Return (number, None) or (0.0, tensor). Raise ValueError unless a tensor is one number on param's device."""
    if not torch.is_tensor(x):
        return float(x), None
    if x.numel() != 1 or x.device != param.device:
        raise ValueError(f"adamw: {name} is {tuple(x.shape)} on {x.device}, wanted one number on {param.device}")
    return 0.0, x


def check_numbers(
    param: torch.Tensor, state: AdamWState, lr: torch.Tensor | float, grad_scale: torch.Tensor | float,
    apply: torch.Tensor | None, step: int, seed: int, offset: int,
) -> tuple:  # fmt: skip
    """Return (lr, its tensor, grad_scale, its tensor) as operators take them: a number and None, or 0 and a tensor.

    The arguments are adamw()'s. Raises ValueError if they do not fit.
    """
    if not 1 <= step < 2**31 or not 0 <= seed < 2**32 or offset < 0:
        raise ValueError(
            f"adamw: step {step}, seed {seed}, offset {offset}; wanted from 1, 0 and 0, and under 2^31, 2^32"
        )
    if offset % 8 and state.m_absmax is not None and rounds_at_random(param, state.m, state.low, state.master):
        raise ValueError(f"adamw: offset is {offset}, wanted a multiple of 8 for 8-bit states of a stochastic master")
    if apply is not None and (apply.dtype != torch.bool or apply.numel() != 1 or apply.device != param.device):
        raise ValueError(f"adamw: apply is {tuple(apply.shape)} {apply.dtype}, wanted one bool on {param.device}")
    return *_number_or_tensor("lr", lr, param), *_number_or_tensor("grad_scale", grad_scale, param)


@torch.no_grad()
def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: AdamWState,
    *,
    lr: torch.Tensor | float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | float = 1.0,
    apply: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    impl: str = "auto",
) -> None:
    """Update param (fp32 or bf16, contiguous) and its state, made by adamw_state, in place.

    grad: of param's shape, fp32 or bf16. step counts from 1. lr, grad_scale (the clip factor): a number, or a tensor
    with one number on param's device, which is not waited for. apply: a bool on the device; if it is false, nothing
    changes, whatever grad and grad_scale hold. Stochastic rounding uses two more arguments. seed: a number under 2^32
    for each tensor. offset: the place of param's first element in the whole tensor, so that a shard rounds as it would.
    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    check_tensors(param, grad, state)
    numbers = check_numbers(param, state, lr, grad_scale, apply, step, seed, offset)
    run: Any = {"ref": adamw_ref, "native": adamw_native, "triton": update}[
        choose_impl("adamw", impl, param, has_native=True)
    ]
    run(
        param, grad.contiguous(), state.m, state.v, state.m_absmax, state.v_absmax, state.low, state.master,
        *numbers, apply, beta1, beta2, eps, weight_decay, step, seed, offset,
    )  # fmt: skip
