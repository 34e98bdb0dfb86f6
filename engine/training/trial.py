"""How long a run would take on this machine's CPU, from a micro-batch that is tried with one layer and with two.

    seconds(L layers) = seconds(1) + (L - 1) (seconds(2) - seconds(1))

The layers are alike, so the difference is a layer, and the rest is what a model has once: embedding, head and loss. So
a trial of a model that takes minutes a step ends in seconds, and needs the memory of two layers.
"""

import dataclasses
import time
from dataclasses import dataclass

from engine.base.host_memory import read_free_bytes
from engine.base.terminal import format_duration
from engine.data.batches import Batches
from engine.model.llama import new_model
from engine.training.optimizer import AdamW, choose_optimizer
from engine.training.plan import Plan

PARAMETER_BYTES = 20  # at most: weight, gradient, master, m and v in fp32
TRIES = 4
SHARE = 0.5  # of the free memory that a trial may take


@dataclass(frozen=True)
class Trial:
    """The seconds of a step's parts on this CPU, of all layers."""

    micro_batch_s: float  # forward and backward of the micro-batch that was tried
    update_s: float  # of all weights that are trained
    n_tokens: int  # of the micro-batch, as computed
    run_s: float  # of all steps of the run, without evaluation and samples

    def __str__(self) -> str:
        return (
            f"on this CPU: about {format_duration(self.run_s)}, without evaluation and samples (projected from a "
            f"micro-batch of {self.n_tokens} tokens, {self.micro_batch_s:.2g} s, and an update, {self.update_s:.2g} s, "
            "tried with one layer and with two)"
        )


def try_on_cpu(plan: Plan) -> Trial | None:
    """Try the largest micro-batch of the run's first step and an update. None where memory is too short for it."""
    config = plan.config
    batches = Batches(plan.train, plan.order, plan.packing, config.loss_norm == "micro-mean")
    step = batches.make_step(1)
    batch = max(step.micro_batches, key=lambda batch: len(batch.tokens))
    shapes = [dataclasses.replace(plan.model_config, n_layers=n) for n in (1, 2)]
    free = read_free_bytes()
    if free is not None and shapes[1].n_parameters * PARAMETER_BYTES > SHARE * free:
        return None
    (micro_1, update_1), (micro_2, update_2) = (_time_layers(plan, shape, batch) for shape in shapes)
    others = plan.model_config.n_layers - 1
    micro_batch_s = micro_1 + others * max(0.0, micro_2 - micro_1)
    update_s = update_1 + others * max(0.0, update_2 - update_1)
    # The other steps are taken to share as much of their tokens as the first.
    tokens = plan.train.counts["tokens"] * plan.total_steps / plan.order.steps_per_epoch
    computed = tokens * step.n_computed_tokens / step.n_tokens
    run_s = computed / len(batch.tokens) * micro_batch_s + plan.total_steps * update_s
    return Trial(micro_batch_s, update_s, len(batch.tokens), run_s)


def _time_layers(plan, shape, batch):
    """Return the seconds of a micro-batch and of an update, of a model with the plan's layers but fewer of them."""
    config = plan.config
    model = new_model(
        shape, plan.device, plan.dtype, plan.kernels, plan.recompute, accumulate=not config.optimizer_in_backward,
        adapter=plan.adapter,
    )  # fmt: skip
    model.init_weights(config.seed)
    model.init_adapter(config.seed)
    optimizer = AdamW(
        model, beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay,
        master=config.master_weights, states=config.optimizer_states, seed=config.seed,
        impl=choose_optimizer(plan.kernels),
    )  # fmt: skip
    tries = []
    for _ in range(1 + TRIES):
        began = time.perf_counter()
        model.loss(batch).backward()
        computed = time.perf_counter()
        optimizer.step(1e-6, optimizer.grad_norm(), config.grad_clip)
        tries.append((computed - began, time.perf_counter() - computed))
    micro_batch, update = zip(*tries[1:], strict=True)  # the first one also asks for memory, and finds the kernels
    return min(micro_batch), min(update)  # the least: whatever else runs only adds to it
