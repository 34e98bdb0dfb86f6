"""The training loop."""

from contextlib import nullcontext

from engine.model.llama import Transformer
from engine.training.evaluation import evaluate_if_due
from engine.training.optimizer import lr_factor
from engine.training.plan import Plan
from engine.training.run import Run
from engine.training.saving import Checkpoints
from engine.training.step import Steps
from engine.training.step_report import report_step


def train(plan: Plan, run: Run, checkpoints: Checkpoints, steps: Steps, model: Transformer, first_step: int) -> None:
    """Take the steps from first_step to the last, report each, and evaluate and save where that is due.

    Raises Stopped, with the state saved, on a signal, and DivergedError when the loss stops being a number.
    """
    config = plan.config
    if plan.device.type == "cpu" and first_step <= plan.total_steps:
        run.progress.print_message(f"step {first_step} begins; its line comes when it has ended")
    for step in range(first_step, plan.total_steps + 1):
        lr = config.lr * lr_factor(config.lr_schedule, step, plan.total_steps, config.warmup_ratio)
        run.world.note_place(f"step {step}")
        with run.profile.watch(step) if run.profile else nullcontext():
            was_taken = steps.take_step(step, lr)
        # Wait for this step's own figures only where something below needs them.
        wait = not was_taken or not plan.runs_ahead or plan.must_wait_after(step) or run.is_asked_to_stop()
        for report in steps.take_reports(wait):
            report_step(plan, run, checkpoints, report)
        if not was_taken:
            checkpoints.stop_run(step - 1)

        evaluate_if_due(plan, run, checkpoints, model, step)
        if plan.saves_during_run and plan.is_due(config.save_every, step):
            checkpoints.save(step)
        checkpoints.report_finished_save()
        if run.is_asked_to_stop():
            for report in steps.take_reports(wait=True):
                report_step(plan, run, checkpoints, report)
            checkpoints.stop_run(step)
