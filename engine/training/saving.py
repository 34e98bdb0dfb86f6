"""A run's training states and its model on their way to disk: what is told of them, and what a full disk costs."""

from functools import partial

from engine.base.errors import CriaError, Stopped
from engine.distributed import fsdp
from engine.formats.find import list_checkpoints
from engine.formats.save import save_hf
from engine.model.llama import Transformer, new_model
from engine.output import checkpoint
from engine.output.folder import require_disk_space
from engine.planning.memory import state_bytes
from engine.training.micro_batch_size import HALVED
from engine.training.optimizer import AdamW
from engine.training.planning_input import setting_from_config
from engine.training.prepare import Job

# ---- training states ------------------------------------------------------------------------------------------------


def room_for_states(job: Job) -> None:
    config, out = job.config, job.out
    states = config.keep + 1 - len(list_checkpoints(out)) if job.keeps_states else 0
    state = state_bytes(job.model_config, setting_from_config(config, job.dtype))
    need = state.weights + (state.weights + state.master + state.states) * max(0, states)
    require_disk_space(out, need, "free some, choose another folder, or lower --keep")


def save(job: Job, optimizer: AdamW, step: int) -> None:
    """A training state on the way, written by a thread: a full disk costs this one, not the run."""
    job.world.note_place(f"the save of step {step}")
    saved_meanwhile(job, wait=True)
    facts = job.facts | {"n_updates": optimizer.n_updates}
    job.saving = step
    job.saver.save(step, optimizer.tensors() if job.world.writes_checkpoint else {}, facts)


def saved_meanwhile(job: Job, wait: bool = False) -> None:
    """Tells of the state that was being written, when it is."""
    try:
        done = job.saver.wait() if wait else job.saver.poll()
    except OSError as error:
        reason = f"the state could not be saved ({error.strerror or error}); older states are intact"
        job.progress.say(f"warning: step {job.saving}: {reason}")
        job.metrics.write("skip", step=job.saving, reason=reason)
        return
    if done:
        job.saved = done.step
        job.metrics.write(
            "save", step=done.step, path=done.folder.name, seconds=done.seconds, held_seconds=done.held_seconds,
            bytes=done.bytes,
        )  # fmt: skip


def save_or_fail(job: Job, optimizer: AdamW, step: int, why: str) -> None:
    """The state at the end of a process, unless it is on disk already."""
    saved_meanwhile(job, wait=True)
    if job.saved == step:
        return
    save(job, optimizer, step)
    try:
        done = job.saver.wait()
    except OSError as error:
        text = f"{why}; step {step}: the state could not be saved ({error.strerror or error})"
        raise job.world.error_on_all_ranks(CriaError(text)) from None
    job.saved = done.step
    job.metrics.write("save", step=step, path=done.folder.name, seconds=done.seconds, bytes=done.bytes)


def stop(job: Job, optimizer: AdamW, step: int):
    """A signal came: saves once, and ends."""
    why = f"stopped by {job.signals.received or 'a signal to another rank'} after step {step}"
    save_or_fail(job, optimizer, step, why)
    raise Stopped(f"{why}; run the same command again to go on")


def roll_back(job: Job, optimizer: AdamW) -> int | None:
    """To the newest state on disk. Returns its step; None, and nothing has changed, where there is none yet."""
    saved_meanwhile(job, wait=True)
    world = job.world
    found = world.on_main(partial(checkpoint.find_newest, job.out, job.progress.say))
    if found is None:
        return None
    load_state(found, optimizer)
    world.wait_for_all()  # it is read everywhere before it may be removed
    return found.step


def load_state(found: checkpoint.Checkpoint, optimizer: AdamW) -> None:
    """Load a checkpoint into the model and its optimizer."""
    checkpoint.load(found, optimizer.tensors())
    optimizer.n_updates = found.manifest["n_updates"]


# ---- the model ----------------------------------------------------------------------------------------------------


def finish(job: Job, model: Transformer, optimizer: AdamW) -> None:
    """The model as a complete Hugging Face folder. On a full disk the training state is saved, if that fits."""
    saved_meanwhile(job, wait=True)
    whole = model if job.world.size == 1 else whole_model(job, model)
    problem = None
    try:
        if job.world.is_main:
            save_hf(
                job.out, whole, max_shard_bytes=job.config.max_shard_bytes, bos_id=job.tokenizer.bos_id,
                eos_ids=sorted(job.tokenizer.stop_ids),
                generation_config=job.source.generation_config if job.source else None,
            )  # fmt: skip
            job.tokenizer.save(job.out)
            (job.out / HALVED).unlink(missing_ok=True)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem := job.world.broadcast(problem):
        why = f"the model could not be written ({problem})"
        save_or_fail(job, optimizer, job.total_steps, why)
        text = f"{why}; the training state is saved: make room and run the same command again"
        raise job.world.error_on_all_ranks(CriaError(text))


def whole_model(job: Job, model: Transformer) -> Transformer | None:
    """The model in the host's memory of the first rank."""
    job.world.note_place("the model's export")
    tensors = fsdp.gather_parameters(model, job.world)
    if not job.world.is_main:
        return None
    whole = new_model(job.model_config, "meta", job.dtype)
    whole.load_state_dict(tensors, assign=True)
    return whole
