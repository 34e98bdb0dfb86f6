"""Trackers of experiments, which show a run's figures beside those of others: tensorboard, wandb, trackio.

They take what metrics.jsonl takes, as train/loss, eval/loss and so on, each at its step. metrics.jsonl stays whole
without them: a tracker that fails, for example for want of a network, is left with a warning, and the run goes on.
"""

import importlib
import importlib.util
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from engine.base.errors import UsageError, summarize_error
from engine.base.files import make_json_safe
from engine.output.metrics import Metrics

PROJECT = "cria"
TRACKERS = ("off", "tensorboard", "wandb", "trackio")


class Tracker(Protocol):
    """What a run needs of a tracker."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Show figures of a step."""

    def close(self) -> None:
        """Send what is buffered, and end."""


def require_tracker(name: str) -> None:
    """Raise UsageError where the package of a tracker is not installed."""
    if name != "off" and importlib.util.find_spec(name) is None:
        raise UsageError(f"--tracker {name}: the package {name} is not installed; pip install {name}")


def make_run_name(out: Path) -> str:
    """Return a new name for a run in a folder, by which a tracker finds it again on resume."""
    return f"{out.resolve().name}-{secrets.token_hex(4)}"


def open_tracker(name: str, out: Path, run: str, config: dict[str, Any], after_step: int) -> Tracker:
    """Open a tracker for a run, which goes on after a step (0: begins). Raise UsageError where it cannot begin."""
    try:
        return OPENERS[name](out, run, make_json_safe(config), after_step)
    except Exception as error:  # whatever a stranger's package raises
        why = summarize_error(error)
        raise UsageError(f"--tracker {name}: cannot begin: {why}; mend that, or leave it out") from error


class TensorBoard:
    """Event files in the run's folder, which `tensorboard --logdir` shows."""

    def __init__(self, out: Path, run: str, config: dict[str, Any], after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=after_step + 1, flush_secs=10)
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), after_step)

    def log(self, figures: dict[str, float], step: int) -> None:
        """Show figures of a step."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Send what is buffered, and end."""
        self.writer.close()


class Hosted:
    """A run of wandb or trackio, whose functions are alike."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, figures: dict[str, float], step: int) -> None:
        """Show figures of a step."""
        self.run.log(figures, step=step)

    def close(self) -> None:
        """Send what is buffered, and end."""
        self.run.finish()


def open_wandb(out: Path, run: str, config: dict[str, Any], after_step: int) -> Hosted:
    """Open the run of this name at Weights & Biases, as the environment says ($WANDB_MODE, $WANDB_PROJECT)."""
    wandb = importlib.import_module("wandb")
    return Hosted(wandb.init(project=PROJECT, id=run, name=run, config=config, dir=str(out), resume="allow"))


def open_trackio(out: Path, run: str, config: dict[str, Any], after_step: int) -> Hosted:
    """Open the run of this name in trackio, on this machine unless the environment names a Space."""
    trackio = importlib.import_module("trackio")
    return Hosted(trackio.init(project=PROJECT, name=run, config=config, resume="allow"))


OPENERS: dict[str, Callable[[Path, str, dict[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": open_wandb,
    "trackio": open_trackio,
}


class TrackedMetrics:
    """Metrics that a tracker is given too."""

    def __init__(self, metrics: Metrics, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self.metrics, self.warn = metrics, warn
        self.tracker: Tracker | None = tracker

    def write(self, event: str, **fields: Any) -> None:
        """Append a line, and show its finite numbers in the tracker."""
        self.metrics.write(event, **fields)
        step = fields.get("step")
        figures = {
            f"{event}/{name}": value
            for name, value in make_json_safe(fields).items()
            if type(value) in (int, float) and name != "step"
        }
        if step is not None and figures:
            self._try(lambda tracker: tracker.log(figures, step))

    def close(self) -> None:
        """Close the file and the tracker."""
        self.metrics.close()
        self._try(lambda tracker: tracker.close())
        self.tracker = None

    def _try(self, act: Callable[[Tracker], None]) -> None:
        """Act on the tracker, and leave it where that fails: the run is worth more than its picture."""
        if self.tracker is None:
            return
        try:
            act(self.tracker)
        except Exception as error:
            self.tracker = None
            self.warn(f"warning: the tracker failed and is left ({summarize_error(error)}); metrics.jsonl goes on")
