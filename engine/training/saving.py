"""Write a run's training states and its model, report what was written, and survive a full disk."""

from pathlib import Path
from typing import NoReturn

from engine.base.errors import CriaError, NotFiniteError, Stopped, reading
from engine.data.batches import Batches
from engine.distributed import fsdp
from engine.formats.adapters import save_adapter
from engine.formats.find import list_checkpoints
from engine.formats.save import save_hf
from engine.model.config import EMBEDDED_MODEL
from engine.model.llama import Transformer, new_model
from engine.output import checkpoint, folder
from engine.output.checkpoint import Checkpoint
from engine.output.saver import Saver
from engine.planning.weights import state_bytes
from engine.text.chat_templates import adopt_style
from engine.training.micro_batch_size import HALVED
from engine.training.optimizer import AdamW
from engine.training.plan import Plan
from engine.training.planning_input import setting_from_config
from engine.training.run import Run


def require_disk_space(plan: Plan) -> None:
    """Raise UsageError where --out has no room for the model and the training states that the run will keep."""
    config = plan.config
    n_states = config.keep + 1 - len(list_checkpoints(plan.out)) if plan.saves_during_run else 0
    state = state_bytes(plan.model_config, setting_from_config(config, plan.dtype))
    need_bytes = state.trained + (state.trained + state.master + state.states) * max(0, n_states)
    folder.require_disk_space(plan.out, need_bytes, "free some, choose another folder, or lower --keep")


def load_checkpoint(found: Checkpoint, optimizer: AdamW) -> None:
    """Load a training state into the model and its optimizer."""
    checkpoint.load(found, optimizer.tensors())
    with reading(found.folder / checkpoint.MANIFEST, "choose another checkpoint"):
        optimizer.n_updates = found.manifest["n_updates"]


class Checkpoints:
    """The training states of a run, written by a thread while the run goes on.

    saved_step: the step whose state this process wrote last or began from.
    """

    def __init__(self, plan: Plan, run: Run, optimizer: AdamW, batches: Batches, saved_step: int | None) -> None:
        self.plan, self.run, self.optimizer, self.batches = plan, run, optimizer, batches
        self.saved_step = saved_step
        self.writing_step: int | None = None
        world = run.world
        exchange = world.gather_beside_training if world.size > 1 else None
        self.saver = Saver(plan.out, plan.config.keep, world.rank, world.size, exchange, plan.device)

    def save(self, step: int) -> None:
        """Begin to write the state of a step. A full disk costs this state, not the run."""
        self.run.world.note_place(f"the save of step {step}")
        self.report_finished_save(wait=True)
        facts = self.plan.recorded_facts(self.batches.packing.max_tokens) | {"n_updates": self.optimizer.n_updates}
        self.writing_step = step
        self.saver.save(step, self.optimizer.tensors() if self.run.world.writes_checkpoint else {}, facts)

    def report_finished_save(self, wait: bool = False) -> None:
        """Report the state that the thread is writing, if it is done. wait: wait until it is.

        Raises NotFiniteError on every rank for a state that holds NaN or an infinity: no later step mends it.
        """
        try:
            done = self.saver.wait() if wait else self.saver.poll()
        except OSError as error:
            reason = f"the state could not be saved ({error.strerror or error}); older states are intact"
            self.run.progress.print_message(f"warning: step {self.writing_step}: {reason}")
            self.run.metrics.write("skip", step=self.writing_step, reason=reason)
            return
        except NotFiniteError as error:
            raise self.describe_not_finite(error) from None
        if done:
            self.saved_step = done.step
            self.run.metrics.write(
                "save", step=done.step, path=done.folder.name, seconds=done.seconds, held_seconds=done.held_seconds,
                bytes=done.bytes,
            )  # fmt: skip

    def save_or_fail(self, step: int, why: str) -> None:
        """Write the state of a step and wait for it, unless it is on disk already. why: the reason that ends the run.

        Raises CriaError on every rank when it cannot be written, NotFiniteError when it holds NaN or an infinity.
        """
        self.report_finished_save(wait=True)
        if self.saved_step == step:
            return
        self.save(step)
        try:
            done = self.saver.wait()
            assert done is not None, "a state was given to the saver just now"
        except OSError as error:
            text = f"{why}; step {step}: the state could not be saved ({error.strerror or error})"
            raise self.run.world.error_on_all_ranks(CriaError(text)) from None
        except NotFiniteError as error:
            raise self.describe_not_finite(error) from None
        self.saved_step = done.step
        self.run.metrics.write("save", step=step, path=done.folder.name, seconds=done.seconds, bytes=done.bytes)

    def describe_not_finite(self, error: NotFiniteError) -> CriaError:
        """Return what every rank raises for a state that is not finite."""
        text = f"step {self.writing_step}: the state is not saved: {error}; lower --lr, older states are intact"
        return self.run.world.error_on_all_ranks(NotFiniteError(text))

    def stop_run(self, step: int) -> NoReturn:
        """Save the state of a step because a signal came, and raise Stopped."""
        why = f"stopped by {self.run.signals.received or 'a signal to another rank'} after step {step}"
        self.save_or_fail(step, why)
        raise Stopped(f"{why}; run the same command again to go on")

    def roll_back(self) -> int | None:
        """Load the newest state on disk and return its step. Without one, change nothing and return None."""
        self.report_finished_save(wait=True)
        world = self.run.world
        found = world.run_on_main(lambda: checkpoint.find_newest(self.plan.out, self.run.progress.print_message))
        if found is None:
            return None
        load_checkpoint(found, self.optimizer)
        world.wait_for_all()  # every rank has read it before any may remove it
        return found.step

    def close(self) -> None:
        """Wait for the state that is being written."""
        self.saver.close()


def write_model(plan: Plan, run: Run, checkpoints: Checkpoints, model: Transformer) -> None:
    """Write the model as a complete Hugging Face folder, an adapter as PEFT's. On a full disk save the training state.

    Raises CriaError on every rank where the model could not be written, NotFiniteError where it holds NaN or an
    infinity.
    """
    checkpoints.report_finished_save(wait=True)
    whole = model if run.world.size == 1 else gather_model(plan, run, model)
    problem = not_finite = None
    try:
        if run.world.is_main:
            assert whole is not None, "rank 0 has the whole model"
            write_files(plan, whole, plan.out)
    except OSError as error:
        problem = error.strerror or str(error)
    except NotFiniteError as error:
        not_finite = f"the model is not written: {error}; lower --lr"
    problem, not_finite = run.world.broadcast((problem, not_finite))
    if not_finite:
        raise run.world.error_on_all_ranks(NotFiniteError(not_finite))
    if problem:
        why = f"the model could not be written ({problem})"
        checkpoints.save_or_fail(plan.total_steps, why)
        text = f"{why}; the training state is saved: make room and run the same command again"
        raise run.world.error_on_all_ranks(CriaError(text))


def write_files(plan: Plan, model: Transformer, out: Path) -> None:
    """Write the files of the model and of its tokenizer. An OSError or NotFiniteError leaves the folder as it was."""
    tokenizer = adopt_style(plan.tokenizer, plan.config.prompt_style)
    if plan.adapter is not None:
        named = plan.config.model
        base = named if named == EMBEDDED_MODEL else plan.facts["settings"]["model"]
        save_adapter(out, model, base, plan.facts["base_sha256"])
    else:
        save_hf(
            out, model, max_shard_bytes=plan.config.max_shard_bytes, bos_id=tokenizer.bos_id,
            eos_ids=sorted(tokenizer.stop_ids),
            generation_config=plan.source.generation_config if plan.source else None,
        )  # fmt: skip
    tokenizer.save(out)
    (out / HALVED).unlink(missing_ok=True)


def gather_model(plan: Plan, run: Run, model: Transformer) -> Transformer | None:
    """Return the model with all that was trained in the host's memory of rank 0, None on other ranks."""
    run.world.note_place("the model's export")
    tensors = fsdp.gather_parameters(model, run.world)
    if not run.world.is_main:
        return None
    whole = new_model(plan.model_config, "meta", plan.dtype, adapter=plan.adapter)
    whole.load_state_dict(tensors, strict=plan.adapter is None, assign=True)
    return whole
