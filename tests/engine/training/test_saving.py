"""What a run tells and records of its states, where the disk takes them and where it does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.base.errors import CriaError, NotFiniteError, Stopped
from engine.distributed.world import World
from engine.model.adapter import AdapterConfig
from engine.model.config import EMBEDDED_MODEL, MODELS
from engine.planning.weights import count_trained
from engine.training import saving
from engine.training.config import FinetuneConfig
from engine.training.saving import Checkpoints

FULL = OSError(28, "No space left on device")
DONE = SimpleNamespace(step=4, folder=Path("out/checkpoint-4"), seconds=2.0, held_seconds=0.5, bytes=9)
SAVED = {"step": 4, "path": "checkpoint-4", "seconds": 2.0, "bytes": 9}


class Saver:
    """Remembers what it is given, and says how that went: with a result, None or an error."""

    def __init__(self, *results):
        self.given, self.results = [], list(results)

    def save(self, step, tensors, facts):
        self.given.append((step, tensors, facts))

    def wait(self):
        result = self.results.pop(0) if self.results else None
        if isinstance(result, Exception):
            raise result
        return result

    poll = wait


def make(*results, saved_step=None):
    checkpoints = object.__new__(Checkpoints)
    events, said = [], []
    checkpoints.plan = SimpleNamespace(recorded_facts=lambda tokens: {"max_tokens": tokens})
    checkpoints.run = SimpleNamespace(
        world=World(), progress=SimpleNamespace(print_message=said.append), signals=SimpleNamespace(received="SIGTERM"),
        metrics=SimpleNamespace(write=lambda event, **values: events.append((event, values))),
    )  # fmt: skip
    checkpoints.optimizer = SimpleNamespace(n_updates=3, tensors=lambda: {"w": 1})
    checkpoints.batches = SimpleNamespace(packing=SimpleNamespace(max_tokens=64))
    checkpoints.saver, checkpoints.saved_step, checkpoints.writing_step = Saver(*results), saved_step, None
    return checkpoints, events, said


@pytest.mark.parametrize("wait", [False, True])
def test_a_state_on_disk_is_recorded(wait):
    checkpoints, events, said = make(None, None, DONE)
    checkpoints.save(4)
    assert checkpoints.saver.given == [(4, {"w": 1}, {"max_tokens": 64, "n_updates": 3})]
    assert checkpoints.writing_step == 4 and checkpoints.saved_step is None
    checkpoints.report_finished_save(wait)
    assert events == [] and checkpoints.saved_step is None
    checkpoints.report_finished_save(wait)
    assert events == [("save", SAVED | {"held_seconds": 0.5})] and checkpoints.saved_step == 4 and said == []


@pytest.mark.parametrize("wait", [False, True])
def test_a_full_disk_costs_one_state(wait):
    checkpoints, events, said = make(None, FULL, None)
    checkpoints.save(4)
    checkpoints.report_finished_save(wait)
    reason = "the state could not be saved (No space left on device); older states are intact"
    assert said == [f"warning: step 4: {reason}"] and events == [("skip", {"step": 4, "reason": reason})]
    assert checkpoints.saved_step is None
    checkpoints.report_finished_save(wait)
    assert len(said) == len(events) == 1


def test_a_state_that_is_not_finite_ends_the_run():
    told = r"^step 4: the state is not saved: w holds NaN; lower --lr, older states are intact$"
    ways = {1: lambda one: (one.save(4), one.report_finished_save()), 2: lambda one: one.save_or_fail(4, "why")}
    for n_waits, save in ways.items():
        checkpoints, events, _ = make(*[None] * n_waits, NotFiniteError("w holds NaN"))
        with pytest.raises(NotFiniteError, match=told):
            save(checkpoints)
        assert events == [] and checkpoints.saved_step is None


def test_a_state_that_must_be_on_disk():
    checkpoints, events, _ = make(None, None, DONE)
    checkpoints.save_or_fail(4, "why")
    assert events == [("save", SAVED)] and checkpoints.saved_step == 4
    checkpoints.save_or_fail(4, "why")
    assert len(checkpoints.saver.given) == 1, "it is there"
    checkpoints, events, _ = make(None, None, FULL)
    with pytest.raises(CriaError, match=r"^why; step 4: the state could not be saved \(No space left on device\)$"):
        checkpoints.save_or_fail(4, "why")
    assert events == [] and checkpoints.saved_step is None


@pytest.mark.parametrize("received, who", [("SIGTERM", "SIGTERM"), (None, "a signal to another rank")])
def test_a_signal_ends_a_run_whose_state_is_saved(received, who):
    checkpoints, _, _ = make(None, None, DONE)
    checkpoints.run.signals.received = received
    with pytest.raises(Stopped, match=f"^stopped by {who} after step 4; run the same command again to go on$"):
        checkpoints.stop_run(4)
    assert checkpoints.saved_step == 4


@pytest.mark.parametrize("found", [None, SimpleNamespace(step=3)])
def test_without_a_state_on_disk_nothing_is_rolled_back(found, monkeypatch):
    checkpoints, _, _ = make()
    checkpoints.plan.out, loaded = None, []
    monkeypatch.setattr(saving.checkpoint, "find_newest", lambda out, say: found)
    monkeypatch.setattr(saving, "load_checkpoint", lambda one, optimizer: loaded.append(one))
    assert checkpoints.roll_back() == (found and 3) and loaded == ([found] if found else [])


@pytest.mark.parametrize(
    ("save_every", "keep", "there", "n_states"),
    [("5", 2, 0, 3), ("epoch", 1, 0, 2), ("5", 2, 2, 1), ("5", 2, 5, 0), ("end", 2, 0, 0), ("off", 2, 0, 0)],
)
def test_there_is_room_for_every_state_that_lies_there_at_one_time(
    tmp_path, monkeypatch, save_every, keep, there, n_states
):
    """One more than --keep, since the oldest goes when the newest is whole; those that are there have their place."""
    for step in range(there):
        (tmp_path / f"checkpoint-{step}").mkdir()
    config = FinetuneConfig(model="tiny", random_init=True, data=("x",), save_every=save_every, keep=keep,
                            optimizer_states="fp32")  # fmt: skip
    plan = SimpleNamespace(
        config=config, out=tmp_path, model_config=MODELS["tiny"], dtype=torch.bfloat16,
        saves_during_run=save_every not in ("off", "end"),
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(saving.folder, "require_disk_space", lambda out, need, remedy: asked.append((out, need)))
    saving.require_disk_space(plan)
    n = MODELS["tiny"].n_parameters
    assert asked == [(tmp_path, n * (2 + n_states * (2 + 2 + 8)))], (
        "the weights; and 16 bits more, m and v in each state"
    )


def test_of_an_adapter_s_run_what_is_trained_alone_needs_room(tmp_path, monkeypatch):
    config = FinetuneConfig(model="x", data=("x",), adapter="lora", save_every="5", keep=1, optimizer_states="fp32")
    plan = SimpleNamespace(
        config=config, out=tmp_path, model_config=MODELS["tiny"], dtype=torch.bfloat16, saves_during_run=True
    )
    asked = []
    monkeypatch.setattr(saving.folder, "require_disk_space", lambda out, need, remedy: asked.append(need))
    saving.require_disk_space(plan)
    n = count_trained(MODELS["tiny"], AdapterConfig())
    assert asked == [n * (2 + 2 * (2 + 2 + 8))] and n < 0.1 * MODELS["tiny"].n_parameters


def test_how_a_save_went_is_told_under_its_step_before_the_next_begins():
    checkpoints, events, said = make(None, FULL, SimpleNamespace(**vars(DONE) | {"step": 6}))
    checkpoints.saver.poll = lambda: None  # the first one is still under way
    checkpoints.save(4)
    checkpoints.save(5)
    assert [line.partition(": the")[0] for line in said] == ["warning: step 4"] and events[0][1]["step"] == 4
    checkpoints.save(6)
    assert checkpoints.saved_step == 6 and [one[0] for one in checkpoints.saver.given] == [4, 5, 6]


@pytest.mark.parametrize("error, told", [
    (FULL, r"^the model could not be written \(No space left on device\); the training state is saved: make room"),
    (OSError("odd"), r"^the model could not be written \(odd\); the training state is saved"),
    (NotFiniteError("w holds NaN"), r"^the model is not written: w holds NaN; lower --lr$"),
])  # fmt: skip
def test_a_model_that_cannot_be_written(error, told, monkeypatch):
    checkpoints, events, _ = make(None, None, None, DONE, saved_step=2)

    def fail(*_):
        raise error

    monkeypatch.setattr(saving, "write_files", fail)
    plan = SimpleNamespace(out=None, total_steps=4)
    with pytest.raises(CriaError, match=told):
        saving.write_model(plan, checkpoints.run, checkpoints, "a model")
    assert [name for name, _ in events] == ([] if isinstance(error, NotFiniteError) else ["save"])
    assert [one[0] for one in checkpoints.saver.given] == [4] * len(events), "the state of the last step"


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_model_is_written_with_the_tokenizer_of_its_style(adapter, tmp_path, monkeypatch):
    """It names every id that ends an answer, and the note of a run that was short of memory goes."""
    (tmp_path / saving.HALVED).write_text("{}")
    written, saved = [], []
    adopted = SimpleNamespace(bos_id=1, stop_ids={9, 2}, save=saved.append)
    monkeypatch.setattr(saving, "adopt_style", lambda *given: adopted if given == ("own", "chatml") else None)
    monkeypatch.setattr(saving, "save_hf", lambda *given, **more: written.append((*given, more)))
    monkeypatch.setattr(saving, "save_adapter", lambda *given: written.append(given))
    config = SimpleNamespace(prompt_style="chatml", model="name", max_shard_bytes=5)
    plan = SimpleNamespace(
        tokenizer="own", config=config, adapter=adapter, source=SimpleNamespace(generation_config={"top_p": 0.5}),
        facts={"settings": {"model": "the whole path"}, "base_sha256": "ab"},
    )  # fmt: skip
    saving.write_files(plan, "model", tmp_path)
    about = {"max_shard_bytes": 5, "bos_id": 1, "eos_ids": [2, 9], "generation_config": {"top_p": 0.5}}
    wanted = (tmp_path, "model", about) if adapter is None else (tmp_path, "model", "the whole path", "ab")
    assert written == [wanted] and saved == [tmp_path] and not (tmp_path / saving.HALVED).exists()
    config.model = EMBEDDED_MODEL
    saving.write_files(plan, "model", tmp_path)
    assert adapter is None or written[1] == (tmp_path, "model", EMBEDDED_MODEL, "ab"), "not a folder that goes away"


def test_a_state_that_is_being_written_is_waited_for_before_one_is_looked_for(monkeypatch):
    checkpoints, events, _ = make(DONE)
    checkpoints.plan.out = None
    monkeypatch.setattr(saving.checkpoint, "find_newest", lambda out, say: events.append("looked"))
    assert checkpoints.roll_back() is None and events == [("save", SAVED | {"held_seconds": 0.5}), "looked"]


def test_of_replicas_one_alone_writes_tensors():
    checkpoints, _, _ = make()
    checkpoints.run.world = SimpleNamespace(note_place=lambda place: None, writes_checkpoint=False)
    checkpoints.save(4)
    assert checkpoints.saver.given == [(4, {}, {"max_tokens": 64, "n_updates": 3})]


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_gathered_model_has_the_updates_of_the_adapter(adapter, monkeypatch):
    made, loaded = {}, []
    whole = SimpleNamespace(load_state_dict=lambda tensors, **more: loaded.append((tensors, more)))
    monkeypatch.setattr(saving.fsdp, "gather_parameters", lambda model, world: {"w": 1})
    monkeypatch.setattr(saving, "new_model", lambda *given, **more: made.update(more) or whole)
    plan = SimpleNamespace(model_config=None, dtype=None, adapter=adapter)
    for is_main in (False, True):
        run = SimpleNamespace(world=SimpleNamespace(note_place=lambda place: None, is_main=is_main))
        assert saving.gather_model(plan, run, None) is (whole if is_main else None)
    assert made == {"adapter": adapter} and loaded == [({"w": 1}, {"strict": adapter is None, "assign": True})]
