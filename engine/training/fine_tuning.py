"""Carry out the plan of a run: build the model, train it, write it, and record how the run ended."""

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from engine.base.errors import Stopped
from engine.base.files import write_json
from engine.base.signals import Signals
from engine.base.terminal import Progress, print_wrapped
from engine.data.batches import Batches
from engine.distributed import fsdp
from engine.distributed.world import World
from engine.model.llama import Transformer, new_model
from engine.output import checkpoint
from engine.output.checkpoint import Checkpoint
from engine.output.folder import METRICS, RUN, describe_environment, read_metrics, read_run
from engine.output.metrics import Metrics, NoMetrics
from engine.output.report import read_events, write_report
from engine.output.summary import summarize_run
from engine.output.trackers import TrackedMetrics, make_run_name, open_tracker
from engine.training.evaluation import evaluate_if_due
from engine.training.loop import train
from engine.training.loss_spikes import SpikeDetector
from engine.training.micro_batch_size import MicroBatchSize
from engine.training.next_commands import describe_use, format_command
from engine.training.optimizer import AdamW, choose_optimizer
from engine.training.plan import Plan, describe_few_updates, describe_plan
from engine.training.resume import Start
from engine.training.run import Run
from engine.training.run_ahead import Prefetcher
from engine.training.saving import Checkpoints, load_checkpoint, write_model
from engine.training.step import Steps
from engine.training.step_profile import StepProfile
from engine.training.step_report import count_skipped, require_finite_end


def fine_tune(plan: Plan, world: World, signals: Signals, start: Start) -> None:
    """Carry a plan out, from its start to the written model. The caller holds the output folder's lock.

    Raises Stopped, with the training state saved, on a signal, and DivergedError when the loss diverges. CriaError and
    OSError come through from the parts.
    """
    config, out, found = plan.config, plan.out, start.checkpoint
    if world.is_main:
        checkpoint.remove_temporaries(out)
        if config.resume == "never":
            checkpoint.remove_checkpoints_after(out, -1)
        print_wrapped(describe_plan(plan, world))
    model, optimizer = build_model(plan, world, found)
    world.wait_for_all()  # every rank has read the checkpoint before any may remove it
    start_step = found.step if found else 0
    if found and world.is_main:
        checkpoint.remove_checkpoints_after(out, start_step)
        print(f"going on after step {start_step}, from {found.folder}")

    earlier = read_run(out) if found else {}
    record = describe_run(plan, world, earlier)
    earlier_seconds = earlier.get("seconds", 0.0)
    began, status = time.monotonic(), "failed"
    if world.is_main:
        write_json(out / RUN, record | {"status": "running", "seconds": earlier_seconds})
    batches = Batches(plan.train, plan.order, plan.packing, config.loss_norm == "micro-mean", world.size, world.rank)
    with ExitStack() as stack:
        run = begin_run(plan, world, signals, found, stack, record["tracked_as"])
        checkpoints = Checkpoints(plan, run, optimizer, batches, saved_step=start_step if found else None)
        try:
            size = MicroBatchSize(plan, batches, world, run.progress.print_message, start.is_halved)
            if plan.device.type == "cuda":
                size.try_largest(model, optimizer)
            evaluate_if_due(plan, run, checkpoints, model, start_step)
            with Prefetcher(batches, model, plan.total_steps) as prefetcher:
                steps = Steps(model, optimizer, prefetcher, config.grad_clip, world, signals.pending, size, config.seed)
                train(plan, run, checkpoints, steps, model, start_step + 1)
            require_finite_end(plan, run, checkpoints)
            write_model(plan, run, checkpoints, model)
            status = "done"
        except Stopped:
            status = "stopped"
            raise
        finally:
            checkpoints.close()
            if world.is_main:
                record["facts"] = plan.recorded_facts(batches.packing.max_tokens)
                seconds = earlier_seconds + time.monotonic() - began
                end_run(plan, run, record | {"status": status, "seconds": seconds})
    if world.is_main:
        print(f"the model is in {out}, the report in {out / 'report.html'}{describe_few_updates(plan)}")
        for line in summarize_run(read_events(out / METRICS)):
            print(line)
        for what, command in record["use"].items():
            print(f"{what}: {command}")


def build_model(plan: Plan, world: World, found: Checkpoint | None) -> tuple[Transformer, AdamW]:
    """Return the model and its optimizer, with the state of the checkpoint, or, without one, of step 0.

    Under an adapter the frozen weights are those of the base, also with a checkpoint.

    Each rank allocates and reads only the rows of its own shard.
    """
    config = plan.config
    shard = partial(fsdp.shard_model, world=world) if world.size > 1 else None
    model = new_model(
        plan.model_config, plan.device, plan.dtype, plan.kernels, plan.recompute,
        accumulate=not config.optimizer_in_backward, shard=shard, adapter=plan.adapter,
    )  # fmt: skip
    local = fsdp.local_shards(model)
    if plan.source and (found is None or plan.adapter is not None):  # a checkpoint holds what is trained alone
        world.run_on_all_ranks(partial(plan.source.read_into, model, local))
    elif found is None:
        model.init_weights(config.seed, local)
    if plan.start_adapter is not None and found is None:
        world.run_on_all_ranks(partial(plan.start_adapter.read_into, model, local))
    elif found is None:
        model.init_adapter(config.seed, local)
    optimizer = AdamW(
        model, beta1=config.beta1, beta2=config.beta2, eps=config.adam_eps, weight_decay=config.weight_decay,
        master=config.master_weights, states=config.optimizer_states, seed=config.seed,
        impl=choose_optimizer(plan.kernels), offload=config.offload_optimizer,
        on_cpu=bool(plan.on_cpu), in_backward=config.optimizer_in_backward,
    )  # fmt: skip
    if found:
        world.run_on_all_ranks(partial(load_checkpoint, found, optimizer))
    return model, optimizer


def describe_run(plan: Plan, world: World, earlier: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json records of a run that has just begun. earlier: what it held before a resume."""
    return {
        "status": "running",
        "command": format_command(world.size),
        "config": dataclasses.asdict(plan.config),
        "changed": [f.name for f in dataclasses.fields(plan.config) if getattr(plan.config, f.name) != f.default],
        "use": describe_use(plan.config),
        "model": {
            "name": plan.config.model,
            "parameters": plan.model_config.n_parameters,
            **dataclasses.asdict(plan.model_config),
        },
        "data": plan.train.counts | {"held_out": len(plan.held_out) if plan.held_out else 0},
        "total_steps": plan.total_steps,
        "tracked_as": earlier.get("tracked_as") or make_run_name(plan.out),
        "facts": plan.recorded_facts(plan.packing.max_tokens),
        "environment": describe_environment(plan.device) | {"ranks": world.size, "replicas": world.replicas},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def begin_run(
    plan: Plan, world: World, signals: Signals, found: Checkpoint | None, stack: ExitStack, tracked_as: str
) -> Run:
    """Open metrics.jsonl, the tracker and the progress bar, and read what a resumed run reported already.

    From here on a signal does not end the process at once: the loop asks for it. Only rank 0 writes metrics and prints.
    """
    signals.training = True
    file = None if world.is_main else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115 (the stack closes it)
    first_step = found.step + 1 if found else 1
    progress = Progress(plan.total_steps, first_step - 1, every=plan.config.log_every, file=file)
    metrics = world.run_on_all_ranks(lambda: open_metrics(plan, world, found, tracked_as, progress.print_message))
    lines = world.run_on_main(lambda: read_metrics(plan.out / METRICS))
    spike_detector = SpikeDetector(plan.config.spike_threshold)
    spike_detector.replay(lines)
    stack.enter_context(progress)
    reported = frozenset((line["event"], line.get("step")) for line in lines)
    profile = None
    if plan.config.profile and world.is_main:
        profile = StepProfile(plan.out, first_step, plan.total_steps, plan.device, progress.print_message)
        stack.callback(profile.close)
    return Run(world, signals, progress, metrics, spike_detector, reported, profile, n_skipped=count_skipped(lines))


def open_metrics(
    plan: Plan, world: World, found: Checkpoint | None, tracked_as: str, warn: Callable[[str], None]
) -> Metrics | TrackedMetrics | NoMetrics:
    """Open metrics.jsonl on rank 0, and the tracker that --tracker names. Raise UsageError where that cannot begin."""
    if not world.is_main:
        return NoMetrics()
    metrics, step = Metrics(plan.out / METRICS, found.step if found else None), found.step if found else 0
    if plan.config.tracker == "off":
        return metrics
    tracker = open_tracker(plan.config.tracker, plan.out, tracked_as, dataclasses.asdict(plan.config), step)
    return TrackedMetrics(metrics, tracker, warn)


def end_run(plan: Plan, run: Run, record: dict[str, Any]) -> None:
    """Write to run.json, metrics.jsonl and report.html how the run ended.

    A full disk only prints a warning here, so that it does not hide the error that ended the run.
    """
    status, seconds = record["status"], record["seconds"]
    try:
        write_json(plan.out / RUN, record)
        run.metrics.write("end", step=plan.total_steps if status == "done" else None, seconds=seconds, status=status)
        write_report(plan.out)
    except OSError as error:
        run.progress.print_message(
            f"warning: run.json, metrics.jsonl or report.html is not up to date ({error.strerror})"
        )
    finally:
        run.metrics.close()
