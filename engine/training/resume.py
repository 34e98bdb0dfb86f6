"""Where a run begins: at step 0, at a checkpoint, or not at all because it is finished."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import DataError, UsageError, reading
from engine.formats.find import list_checkpoints
from engine.output.checkpoint import MANIFEST, Checkpoint, find_newest, open_checkpoint
from engine.output.folder import RUN, read_run
from engine.training.micro_batch_size import read_halving
from engine.training.plan import Plan


@dataclass(frozen=True)
class Start:
    """Where a run begins, and the micro-batches it begins with."""

    checkpoint: Checkpoint | None  # None: step 0
    max_tokens: int  # of a micro-batch
    is_halved: bool  # the micro-batches were halved by an earlier process that ran out of memory


def find_start(plan: Plan, say: Callable[[str], None]) -> Start:
    """Return where the run begins. Raises UsageError when a checkpoint belongs to a run with other settings.

    Without --micro-batch-tokens the micro-batches are as large as before, so that sums are rounded as before.
    """
    checkpoint = find_checkpoint(plan, say)
    tokens = get_recorded_tokens(plan, checkpoint.manifest if checkpoint else {})
    halved = read_halving(plan, tokens, say)
    return Start(checkpoint, halved or tokens, halved is not None)


def is_finished(plan: Plan) -> bool:
    """Return whether --out holds this very run, finished, and --resume names no other start.

    Raises UsageError when it holds another finished run.
    """
    if plan.config.resume == "never":
        return False
    run = read_run(plan.out)
    if run.get("status") != "done":
        return False
    with reading(plan.out / RUN):
        changed = find_changes(plan, run.get("facts", {}))
    if changed and not (plan.config.allow_changed and list_checkpoints(plan.out)):
        raise UsageError(
            f"--out {plan.out}: holds a finished run with other settings ({'; '.join(changed)}); "
            "choose another folder, or pass --resume never to replace it"
        )
    return not changed and plan.config.resume == "auto"


def find_checkpoint(plan: Plan, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None to begin at step 0.

    Raises UsageError when its run had other settings, or when it would replace checkpoints of another run.
    """
    config, out = plan.config, plan.out
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = find_newest(out, say)
    else:
        found = open_checkpoint(Path(config.resume))
        if found.folder.resolve().parent != out.resolve() and list_checkpoints(out):
            raise UsageError(
                f"--resume {found.folder}: not a state of --out {out}, which has states of its own that it would "
                "replace; choose a new --out"
            )
    if found is None:
        return None
    with reading(found.folder / MANIFEST, "choose another checkpoint"):
        changed = find_changes(plan, found.manifest)
    if changed and not config.allow_changed:
        raise UsageError(
            f"{found.folder}: saved by a run with other settings ({'; '.join(changed)}); "
            "pass --allow-changed to go on all the same, or --resume never to start over"
        )
    if changed:
        say(f"warning: going on with other settings than those of {found.folder}: {'; '.join(changed)}")
    return found


def get_recorded_tokens(plan: Plan, recorded: dict) -> int:
    """Return the micro-batch tokens that a run recorded, or the plan's where --micro-batch-tokens decides."""
    if plan.config.micro_batch_tokens is None and "max_tokens" in recorded:
        return recorded["max_tokens"]
    return plan.packing.max_tokens


def find_changes(plan: Plan, recorded: dict) -> list[str]:
    """Return how the recorded facts of a run differ from this run's, one line per difference. Raises DataError."""
    facts, found = plan.recorded_facts(get_recorded_tokens(plan, recorded)), []
    if facts["settings"]["loss_norm"] == "micro-mean" and recorded.get("max_tokens") != facts["max_tokens"]:
        found.append(
            f"micro_batch_tokens, which micro-mean depends on: {recorded.get('max_tokens')} -> {facts['max_tokens']}"
        )
    for part in ("settings", "model"):
        a, b = recorded.get(part, {}), facts[part]
        if not isinstance(a, dict):
            raise DataError(f"the state's manifest: its {part} are no object; choose another checkpoint")
        found += [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if recorded.get("dtype") != facts["dtype"]:
        found.append(f"dtype: {recorded.get('dtype')} -> {facts['dtype']}")
    if recorded.get("data_sha256") != facts["data_sha256"]:
        found.append("the data: its tokens have another sha256")
    if recorded.get("base_sha256") != facts.get("base_sha256"):
        found.append("the base: its weights are other ones")
    return found
