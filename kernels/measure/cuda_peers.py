"""Peers of kernels.bench that are ours: csrc/cuda, beside the Triton kernels that it would replace."""

from collections.abc import Callable
from typing import Any

import torch

from kernels.measure.cases import BenchCase, Inputs
from kernels.measure.peers import Absent, Prepare, Ready, plain, require_cuda
from kernels.native.cuda import load_cuda
from kernels.native.library import NativeError
from kernels.ops.adamw import AdamWState
from kernels.ops.adamw_many import adamw_many
from kernels.ops.attention import attention, attention_plan
from kernels.ops.attention_hopper import check_attention_by_cuda
from kernels.ops.grad_norm import grad_norm


def by_cuda(fn: Callable[[BenchCase, Inputs], Any]) -> Prepare:
    """Return a contender of csrc/cuda that runs fn on the case's own tensors."""

    def prepare(case, inputs, upstream):
        require_cuda("csrc/cuda")
        try:
            load_cuda()
        except NativeError as error:
            raise Absent(str(error)) from error
        return plain(fn)(case, inputs, upstream)

    return prepare


def update_by_cuda(case: BenchCase, i: Inputs) -> torch.Tensor:
    """Update a case of AdamW by csrc/cuda."""
    settings = dict(case.sizes["settings"])
    decays = [settings.pop("weight_decay")]
    adamw_many([i.param], [i.grad], [AdamWState(**i.state)], weight_decays=decays, step=2, impl="cuda", **settings)
    return i.param


def attend_by_cuda(case: BenchCase, i: Inputs) -> torch.Tensor:
    """Compute a case of attention by csrc/cuda, with a plan of its own; backward is Triton's."""
    if "cuda plan" not in i.cache:
        i.cache["cuda plan"] = attention_plan(i.documents, len(i.k), i.q.shape[-1], i.q.device, "cuda")
    return attention(i.q, i.k, i.v, i.cache["cuda plan"], "cuda")


def attention_by_cuda(case: BenchCase, inputs: Inputs, upstream: tuple[torch.Tensor, ...]) -> Ready:
    """Prepare csrc/cuda's attention, where it takes the case on this card."""
    try:
        check_attention_by_cuda(inputs.q.shape[-1], inputs.q.dtype, inputs.q.device)
    except ValueError as error:
        raise Absent(str(error)) from error
    return by_cuda(attend_by_cuda)(case, inputs, upstream)


CUDA_PEERS: dict[str, dict[str, Prepare]] = {
    "attention": {"CUDA C++": attention_by_cuda},
    "grad_norm": {"CUDA C++": by_cuda(lambda case, i: grad_norm(i.grads, "cuda"))},
    "adamw": {"CUDA C++": by_cuda(update_by_cuda)},
}
