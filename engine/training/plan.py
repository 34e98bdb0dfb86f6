"""The plan of a run: what is decided before its weights are loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.device import cpu_multiplies_bf16
from engine.base.terminal import plural
from engine.data.batches import Order
from engine.data.dataset import Dataset
from engine.data.packing import Packing
from engine.distributed.world import World
from engine.formats.adapters import Adapter
from engine.formats.source import Source
from engine.model.adapter import AdapterConfig, list_updates
from engine.model.config import EMBEDDED_MODEL, ModelConfig
from engine.planning.setting import describe_mesh
from engine.planning.weights import count_trained, state_bytes
from engine.text.tokenizer import Tokenizer
from engine.training.config import FinetuneConfig
from engine.training.optimizer import count_updates
from engine.training.planning_input import setting_from_config

FEW = 10  # updates: a run of fewer has hardly begun; make demo takes 17
ENOUGH = 20  # updates that a run is advised to take at least


@dataclass(frozen=True)
class Plan:
    """A run as prepare() decided it. Nothing in it changes while the run goes on."""

    config: FinetuneConfig
    out: Path
    device: torch.device
    dtype: torch.dtype
    kernels: str  # "triton" or "ref"
    model_config: ModelConfig
    source: Source | None  # None: random weights
    tokenizer: Tokenizer
    train: Dataset
    held_out: Dataset | None
    sample_prompts: list[str]
    total_steps: int
    packing: Packing  # of a step, on each rank; MicroBatchSize halves its budget once where memory runs out
    replicas: int  # of the model, over the ranks
    recompute: str  # "none", "cheap" or "block"
    facts: dict  # recorded in checkpoints and compared on resume; recorded_facts() adds max_tokens
    on_cpu: bool | None = None  # whether the CPU updates offloaded states; None: none are offloaded
    adapter: AdapterConfig | None = None  # the updates that are trained; None: the weights are
    start_adapter: Adapter | None = None  # the adapter to go on from, of --adapter-dir

    @property
    def order(self) -> Order:
        return Order(len(self.train), self.config.global_batch_size, self.config.seed, self.config.shuffle)

    @property
    def n_updates(self) -> int:
        """Return the number of steps that can change a weight."""
        config = self.config
        return count_updates(config.lr_schedule, self.total_steps, config.warmup_ratio) if config.lr else 0

    @property
    def saves_during_run(self) -> bool:
        """Return whether training states are saved while the run goes on, not only when a signal asks for one."""
        return self.config.save_every not in ("off", "end")

    @property
    def runs_ahead(self) -> bool:
        """Return whether the host queues the next step before it has read this step's loss and norm.

        A step whose loss is a spike may be undone, so with --spike-rollback the host waits.
        """
        return self.device.type == "cuda" and not self.config.spike_rollback

    def is_due(self, every: str, step: int) -> bool:
        """Return whether an evaluation, a sample or a save is due after this step.

        every is "off", "end", "epoch" or a number of steps. Unless it is "off", step 0 and the last step are due too.
        """
        if every == "off" or step in (0, self.total_steps):
            return every != "off"
        return every != "end" and step % (self.order.steps_per_epoch if every == "epoch" else int(every)) == 0

    def must_wait_after(self, step: int) -> bool:
        """Return whether something is due after this step that must know how the step went."""
        config = self.config
        evaluates = self.held_out is not None and self.is_due(config.eval_every, step)
        saves = self.saves_during_run and self.is_due(config.save_every, step)
        return evaluates or saves or self.is_due(config.sample_every, step) or step == self.total_steps

    def recorded_facts(self, max_tokens: int) -> dict:
        """Return the facts that checkpoints and run.json record, with the micro-batch tokens in use."""
        return self.facts | {"max_tokens": max_tokens}


def describe_plan(plan: Plan, world: World) -> str:
    """Return two lines that describe the model and the plan, and one on offloaded states."""
    c, config = plan.model_config, plan.config
    state = state_bytes(c, setting_from_config(config, plan.dtype))
    total_bytes = state.weights + state.trained + state.master + state.states
    ranks = f", on {world.size} ranks: {describe_mesh(world.n_shards, world.replicas)}" if world.size > 1 else ""
    states = "8 bits" if config.optimizer_states == "8bit" else config.optimizer_states
    slow = ""
    if plan.device.type == "cpu" and plan.dtype == torch.bfloat16 and not cpu_multiplies_bf16():
        slow = " (this CPU has no bf16 instructions: --dtype fp32 is faster)"
    recompute = f"; --recompute auto is {plan.recompute}" if config.recompute == "auto" else ""
    is_embedded = config.model == EMBEDDED_MODEL and not config.random_init
    origin = " (SmolLM2-135M-Instruct, dequantised from Q4_1)" if is_embedded else ""
    examples = f" and {config.micro_batch_size} examples" if config.micro_batch_size else ""
    return (
        f"model: {config.model}{origin}, {c.n_parameters / 1e6:.1f}M parameters, "
        f"{plan.facts['dtype']} on {plan.device}, kernels: {plan.kernels}{slow}; "
        f"weights, gradients and optimizer (states in {states}) "
        f"{total_bytes / 1e9:.2f} GB{ranks}{describe_adapter(plan)}\n"
        f"plan: {plural(plan.total_steps, 'step')} of {count_examples(plan)} in micro-batches of at most "
        f"{plan.packing.max_tokens} tokens{examples}; "
        f"{len(plan.train)} examples, {plural(config.epochs, 'epoch')}{' at most' if config.max_steps else ''}"
        f"{recompute}{describe_offload(plan, world)}{describe_few_updates(plan)}"
    )


def describe_adapter(plan: Plan) -> str:
    """Return a line on what an adapter trains, or nothing where the weights are trained."""
    if plan.adapter is None:
        return ""
    n = count_trained(plan.model_config, plan.adapter)
    ranks = sorted({update.rank for update in list_updates(plan.model_config, plan.adapter)})
    share, start = 100 * n / plan.model_config.n_parameters, plan.config.adapter_dir
    return (
        f"\nadapter: {n / 1e6:.2f}M parameters are trained ({share:.2g}%), updates of rank "
        f"{', '.join(map(str, ranks))} of {', '.join(plan.config.lora_targets)}"
        + (f", going on from {start}" if start else "")
    )


def count_examples(plan: Plan) -> str:
    """Return how many examples a step has: "128 examples", or "all 30 examples" where there are no more."""
    size, n = plan.config.global_batch_size, len(plan.train)
    return plural(size, "example") if size <= n else f"all {plural(n, 'example')}"


def describe_few_updates(plan: Plan) -> str:
    """Return a warning, on a line of its own, where fewer than FEW steps can change a weight; else nothing."""
    n, steps = plan.n_updates, plural(plan.total_steps, "step")
    if n >= FEW:
        return ""
    known = f"warning: of {steps} {n or 'none'} can change the weights"
    if not plan.config.lr:
        return f"\n{known}: --lr is 0"
    return f"\n{known}, since the learning rate rises from 0; {suggest_more_updates(plan)}"


def suggest_more_updates(plan: Plan) -> str:
    """Return the flags that give a run more updates."""
    config, n = plan.config, len(plan.train)
    if config.max_steps and plan.total_steps == config.max_steps:
        return "for more pass a larger --max-steps"
    size = next((b for b in (64, 32, 16, 8, 4, 2) if config.epochs * n // b >= ENOUGH), 1)
    smaller = f"--global-batch-size {size}, or " if size < min(config.global_batch_size, n) else ""
    epochs = max(config.epochs + 1, math.ceil(ENOUGH / plan.order.steps_per_epoch))
    return f"for more pass {smaller}--epochs {epochs}"


def describe_offload(plan: Plan, world: World) -> str:
    """Return the line that says where offloaded states are updated, or nothing where none are."""
    if plan.on_cpu is None:
        return ""
    if not plan.on_cpu:
        return "\noptimizer: master and states in the host's memory; they visit the device for their updates"
    when = "in backward" if world.size == 1 else "after backward"
    return f"\noptimizer: master and states in the host's memory, updated by the CPU; gradients go there {when}"
