"""What one process needs while a run is under way: its ranks, its signals, its reports and its counts."""

from dataclasses import dataclass

from engine.base.signals import Signals
from engine.base.terminal import Progress
from engine.distributed.world import World
from engine.output.metrics import Metrics, NoMetrics
from engine.output.trackers import TrackedMetrics
from engine.training.loss_spikes import SpikeDetector
from engine.training.step_profile import StepProfile


@dataclass
class Run:
    """The ranks, the signals, the reports and the counts of a run."""

    world: World
    signals: Signals
    progress: Progress
    metrics: Metrics | TrackedMetrics | NoMetrics
    spike_detector: SpikeDetector
    reported: frozenset[tuple[str, int | None]]  # (event, step) that metrics.jsonl held when the run was resumed
    profile: StepProfile | None = None  # --profile, on rank 0
    n_signals: int = 0  # ranks that a signal had reached in the last step that was reported
    n_skipped: int = 0  # steps in a row without a finite loss
    n_spikes: int = 0  # spikes in a row

    def is_asked_to_stop(self) -> bool:
        """Return whether a signal asks the run to end.

        Ranks agree on it, because each of several goes by the count of signals that the last reported step summed.
        """
        return self.signals.pending() if self.world.size == 1 else self.n_signals > 0
