"""The choices that planning computes with.

A Setting decides the bytes of a training step. A Recipe says what a run trains on, how often, and on how many GPUs.
engine.training.planning_input makes both from a run's flags.
"""

from dataclasses import dataclass, replace

import torch

from engine.model.adapter import AdapterConfig

MOST_CARDS = 64  # that are projected


@dataclass(frozen=True)
class Setting:
    """The choices that decide the bytes of a training step. Strings are the values of engine.finetune's flags."""

    dtype: torch.dtype = torch.bfloat16
    master: str = "split"  # --master-weights
    states: str = "fp32"  # --optimizer-states; "auto" is resolved before bytes are counted
    recompute: str = "cheap"  # --recompute; "auto" takes as much as "cheap" until it is resolved
    offload: bool = False  # --offload-optimizer
    in_backward: bool = False  # --optimizer-in-backward
    shards: int = 1  # GPUs over which one replica of the model is sharded
    replicas: int = 1
    saves: bool = False  # training states are saved between steps, from a copy in the host's memory
    on_cpu: bool = False  # the host's CPU updates states that are offloaded; else they visit the GPU
    adapter: AdapterConfig | None = None  # what is trained beside frozen weights; None: the weights

    @property
    def number_bytes(self) -> int:
        """Return the bytes of one number of the dtype."""
        return self.dtype.itemsize

    @property
    def packed(self) -> bool:
        """Return whether the frozen matrices of the layers are in 4 bits."""
        return self.adapter is not None and self.adapter.nf4_base

    @property
    def trains_embedding(self) -> bool:
        """Return whether the embedding gets a gradient."""
        return self.adapter is None or "embed_tokens" in self.adapter.saved

    @property
    def trains_head(self) -> bool:
        """Return whether the head gets a gradient."""
        return self.adapter is None or "lm_head" in self.adapter.saved

    @property
    def n_cards(self) -> int:
        """Return the number of GPUs of the run."""
        return self.shards * self.replicas

    @property
    def gradients_leave(self) -> bool:
        """Return whether gradients leave the GPU for the host's memory while backward goes on."""
        return self.offload and self.on_cpu and self.n_cards == 1

    def with_replicas(self, replicas: int) -> "Setting":
        """Return the setting with its GPUs divided among this number of replicas."""
        return replace(self, shards=self.n_cards // replicas, replicas=replicas)


@dataclass(frozen=True)
class Recipe:
    """What a run trains on, how often, and on how many GPUs. The fields are named as engine.finetune's flags."""

    model: str  # as --model names it
    n_cards: int
    replicas: int | None  # None: what fits decides
    epochs: int
    max_steps: int | None
    global_batch_size: int  # examples
    micro_batch_tokens: int | None
    micro_batch_size: int | None  # examples
    max_length: int  # tokens
    seed: int
    train_on_prompt: bool
    share_prefix: bool


def describe_mesh(shards: int, replicas: int) -> str:
    """Return in words how GPUs share a model: "sharded over 8", "2 replicas of 4 shards", "8 replicas"."""
    if replicas == 1:
        return f"sharded over {shards}"
    return f"{replicas} replicas of {shards} shards" if shards > 1 else f"{replicas} replicas"


def find_mesh_problems(n_cards: int, replicas: int | None, global_batch_size: int, in_backward: bool) -> list[str]:
    """Return the reasons why a run on n_cards GPUs cannot be projected, one message each."""
    problems, is_in_range = [], 1 <= n_cards <= MOST_CARDS
    if not is_in_range:
        problems.append(f"--gpus is {n_cards}, wanted 1 to {MOST_CARDS}")
    elif left := global_batch_size % n_cards:
        lower = global_batch_size - left
        wanted = f"{lower} or {lower + n_cards}" if lower > 0 else f"{lower + n_cards}"
        problems.append(
            f"--global-batch-size {global_batch_size} is not divisible by --gpus {n_cards}: every card "
            f"takes the same number; pass {wanted}"
        )
    if is_in_range and n_cards % (replicas or 1):
        divisors = ", ".join(str(r) for r in range(1, n_cards + 1) if n_cards % r == 0)
        problems.append(f"--replicas {replicas} of --gpus {n_cards}; wanted one of {divisors}")
    if n_cards > 1 and in_backward:
        problems.append(
            f"--optimizer-in-backward with --gpus {n_cards} is not projected: each card holds a part of the "
            "gradients alone; leave out one of the two"
        )
    return problems
