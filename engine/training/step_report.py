"""Report each step on the terminal and in metrics.jsonl, and handle loss spikes and steps without a finite loss."""

import dataclasses
import resource

import torch

from engine.base.errors import CriaError, DivergedError
from engine.base.terminal import plural
from engine.planning.cards import detect_card
from engine.planning.step_time import flops_per_token
from engine.training.loss_spikes import Spike
from engine.training.plan import Plan
from engine.training.run import Run
from engine.training.saving import Checkpoints
from engine.training.step import StepReport


def report_step(plan: Plan, run: Run, checkpoints: Checkpoints, report: StepReport) -> None:
    """Report how a step went, and undo it where its loss is a spike and --spike-rollback asks for that.

    Raises DivergedError on every rank when too many steps in a row had no finite loss or spiked.
    """
    run.n_signals = report.n_signals
    run.n_skipped = 0 if report.is_finite else run.n_skipped + 1
    if not report.is_finite:
        report_skip(plan, run, report)
    log_step(plan, run, report)
    if report.is_finite:
        spike = run.spike_detector.add_loss(report.step, report.loss)
        run.n_spikes = run.n_spikes + 1 if spike else 0
        if spike:
            report_spike(plan, run, checkpoints, report, spike)


def require_finite_end(plan: Plan, run: Run, checkpoints: Checkpoints) -> None:
    """Raise DivergedError on every rank when the last steps of a run had no finite loss or gradient.

    The state of the last update is saved, if there was one: those steps changed nothing of it.
    """
    if not run.n_skipped:
        return
    step = plan.total_steps
    text = f"the last {plural(run.n_skipped, 'step')} of {step} had no finite loss or gradient, so no model is written"
    if checkpoints.optimizer.n_updates:
        try:
            checkpoints.save_or_fail(step, text)
            text += f"; checkpoint-{step} holds the last update, which engine.export makes a model of"
        except CriaError as error:
            text = str(error)
    raise run.world.error_on_all_ranks(DivergedError(f"{text}; lower --lr, or look at the rows of these steps"))


def count_skipped(lines: list[dict]) -> int:
    """Return how many steps in a row had no finite loss or gradient at the end of a metrics.jsonl."""
    steps = [line for line in lines if line["event"] == "train"]
    finite = [i for i, line in enumerate(steps, 1) if None not in (line["loss"], line["grad_norm"])]
    return len(steps) - max(finite, default=0)


def log_step(plan: Plan, run: Run, report: StepReport) -> None:
    """Write a step's line to metrics.jsonl, and show its figures on the terminal."""
    rate, mfu = report.n_tokens / report.seconds, None
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if plan.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(plan.device)
        card = detect_card(plan.device)
        if card:
            computed_rate = report.n_computed_tokens / report.seconds  # without what examples share
            flops = flops_per_token(plan.model_config, plan.adapter) * computed_rate
            mfu = flops / (run.world.size * 1e12 * card.peak_tflops)
    run.progress.show_step(
        report.step, loss=report.loss, lr=report.lr, grad_norm=report.grad_norm, tokens_per_second=rate
    )
    run.metrics.write(
        "train", step=report.step, epoch=round(report.step / plan.order.steps_per_epoch, 4), loss=report.loss,
        lr=report.lr, grad_norm=report.grad_norm, examples=len(report.examples), tokens=report.n_tokens,
        computed_tokens=report.n_computed_tokens, loss_tokens=report.n_loss_tokens, step_seconds=report.seconds,
        tokens_per_second=rate, mfu=mfu, peak_memory_bytes=memory,
    )  # fmt: skip


def report_skip(plan: Plan, run: Run, report: StepReport) -> None:
    """Report a step that updated nothing because its loss or gradient is not finite.

    Too many in a row end the run. So does one whose backward updated some layers: that cannot be undone.
    """
    n, loss, norm, rows = run.n_skipped, report.loss, report.grad_norm, list_sources(plan, report)
    run.metrics.write("skip", step=report.step, reason="non-finite", loss=loss, grad_norm=norm, rows=rows)
    run.progress.print_message(f"step {report.step}: loss {loss}, gradient norm {norm}; no update ({n} in a row)")
    if n <= plan.config.max_skips and not report.updated_in_backward:
        return
    in_a_row = f"{plural(n, 'step')}{' in a row' if n > 1 else ''}"
    text = f"step {report.step}: {in_a_row} had no finite loss or gradient (loss {loss}, norm {norm})"
    if report.updated_in_backward:
        text += ", and some layers are updated already, as --optimizer-in-backward does"
    raise run.world.error_on_all_ranks(DivergedError(f"{text}; lower --lr, or look at the rows: {list_first(rows)}"))


def report_spike(plan: Plan, run: Run, checkpoints: Checkpoints, report: StepReport, spike: Spike) -> None:
    """Report a loss that stands out, with the rows of its step.

    With --spike-rollback the weights go back to the newest training state on disk, and the run takes its next step from
    there. Too many spikes in a row end it.
    """
    step, back_to = report.step, None
    text = f"step {step}: loss {spike.loss:.4f} is a spike: the median was {spike.median:.4f} +- {spike.deviation:.4f}"
    if plan.config.spike_rollback:
        back_to = checkpoints.roll_back()
        if back_to is None:
            text += "; no state to go back to yet"
        else:
            text += f"; back to the state of step {back_to}, the rows of {step - back_to} steps are left out"
    run.progress.print_message(f"warning: {text}")
    rows = list_sources(plan, report)
    run.metrics.write("spike", step=step, **dataclasses.asdict(spike), back_to=back_to, rows=rows)
    if back_to is None:
        return
    run.spike_detector.forget_after(back_to)
    if run.n_spikes > plan.config.max_skips:
        text = (
            f"step {step}: the loss spiked {run.n_spikes} times in a row after the state of step {back_to}; lower "
            f"--lr, or look at the rows: {list_first(rows)}"
        )
        raise run.world.error_on_all_ranks(DivergedError(text))


def list_sources(plan: Plan, report: StepReport) -> list[str]:
    """Return "file:row" of each example of a step."""
    return [plan.train.sources[i] for i in report.examples]


def list_first(rows: list[str], n: int = 8) -> str:
    """Return the first n rows as text, with "..." where there are more."""
    return f"{', '.join(rows[:n])}{' ...' if len(rows) > n else ''}"
