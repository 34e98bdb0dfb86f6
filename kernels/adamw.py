"""AdamW, in place, one tensor a call.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2          g = grad * grad_scale
    p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Works on the fp32 master; a bf16 parameter is then the master rounded to nearest even.
Source: arXiv:1711.05101, in the order of operations of torch.optim.AdamW.
"""

import torch

from kernels.common import choose

CHUNK = (
    1 << 18
)  # elements: the five streams of a chunk stay in a core's L2 between passes; result does not depend on it


def adamw_ref(master, grad, m, v, *, lr, beta1, beta2, eps, weight_decay, step, grad_scale):
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    flat = [t.view(-1).split(CHUNK) for t in (master, grad, m, v)]
    for p, g, m, v in zip(*flat, strict=True):
        g = g.float() * grad_scale
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, (v.sqrt() / bias2**0.5).add_(eps), value=-lr / bias1)


@torch.no_grad()
def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    master: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | float = 1.0,
    impl: str = "auto",
) -> None:
    """One update of param, master, m and v, all of one shape and contiguous.

    param: any float dtype; it may be master itself. master, m, v: fp32. step counts from 1.
    grad_scale: a number or a scalar tensor on the device (the clip factor), applied to grad on the way in.
    Raises ValueError when shapes or dtypes do not fit.
    """
    for name, t in (("grad", grad), ("master", master), ("m", m), ("v", v)):
        if t.shape != param.shape or not t.is_contiguous():
            raise ValueError(f"adamw: {name} is {tuple(t.shape)}, wanted contiguous {tuple(param.shape)}")
    for name, t in (("master", master), ("m", m), ("v", v)):
        if t.dtype != torch.float32:
            raise ValueError(f"adamw: {name} is {t.dtype}, wanted torch.float32")
    if step < 1:
        raise ValueError(f"adamw: step is {step}, wanted 1 or more")
    choose("adamw", impl)
    adamw_ref(
        master, grad, m, v, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step,
        grad_scale=grad_scale,
    )  # fmt: skip
    if param.data_ptr() != master.data_ptr():
        param.copy_(master)
