"""What a recorded run may differ in."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import finetune as command
from engine import generate
from engine.base.errors import DataError, UsageError, run_main
from engine.training import resume
from engine.training.resume import Start, find_changes, find_checkpoint, find_start, get_recorded_tokens, is_finished
from tests.helpers.run import finetune
from tests.helpers.small_model import small_model


@pytest.mark.parametrize("part", ["settings", "model"])
@pytest.mark.parametrize("odd", ["x", [1], None, 3])
def test_a_manifest_whose_parts_are_no_objects_is_a_data_error(part, odd):
    facts = {"settings": {"loss_norm": "token"}, "model": {}, "dtype": "float32", "data_sha256": "0", "max_tokens": 9}
    plan = SimpleNamespace(
        recorded_facts=lambda tokens: facts,
        config=SimpleNamespace(micro_batch_tokens=9),
        packing=SimpleNamespace(max_tokens=9),
    )
    assert find_changes(plan, facts) == []
    with pytest.raises(DataError, match=f"its {part} are no object"):
        find_changes(plan, facts | {part: odd})


@pytest.mark.parametrize(
    "given, recorded, tokens", [(None, {"max_tokens": 9}, 9), (None, {}, 5), (5, {"max_tokens": 9}, 5), (5, {}, 5)]
)
def test_micro_batches_stay_as_large_as_they_were_unless_a_flag_says_so(given, recorded, tokens):
    plan = SimpleNamespace(config=SimpleNamespace(micro_batch_tokens=given), packing=SimpleNamespace(max_tokens=5))
    assert get_recorded_tokens(plan, recorded) == tokens


@pytest.mark.parametrize("halved", [None, 3])
def test_a_run_that_was_out_of_memory_begins_with_half_its_micro_batches_and_knows_it(halved, monkeypatch):
    """It would else run out of memory again, or halve them once more."""
    found = SimpleNamespace(manifest={"max_tokens": 7})
    plan = SimpleNamespace(config=SimpleNamespace(micro_batch_tokens=None), packing=SimpleNamespace(max_tokens=9))
    asked = []
    monkeypatch.setattr(resume, "find_checkpoint", lambda plan, say: found)
    monkeypatch.setattr(resume, "read_halving", lambda plan, tokens, say: asked.append(tokens) or halved)
    assert find_start(plan, print) == Start(found, halved or 7, halved is not None)
    found = None
    assert find_start(plan, print) == Start(None, halved or 9, halved is not None) and asked == [7, 9]


def plan_of(out, resume, allow_changed=False):
    config = SimpleNamespace(resume=str(resume), allow_changed=allow_changed)
    return SimpleNamespace(config=config, out=out)


@pytest.mark.parametrize("allow", [False, True])
def test_a_state_of_other_settings_is_refused_or_told(allow, tmp_path, monkeypatch):
    found, said = SimpleNamespace(folder=tmp_path / "checkpoint-3", manifest={}), []
    monkeypatch.setattr(resume, "find_newest", lambda out, say: found)
    monkeypatch.setattr(resume, "find_changes", lambda plan, recorded: ["lr: 2 -> 1", "dim: 4 -> 8"])
    plan = plan_of(tmp_path, "auto", allow)
    if allow:
        assert find_checkpoint(plan, said.append) is found
        (told,) = said
        assert "going on with other settings" in told and told.endswith("checkpoint-3: lr: 2 -> 1; dim: 4 -> 8")
    else:
        with pytest.raises(UsageError, match=r"with other settings \(lr: 2 -> 1; dim: 4 -> 8\)"):
            find_checkpoint(plan, said.append)
        assert said == []


def test_a_state_from_elsewhere_does_not_replace_those_that_are_there(tmp_path, monkeypatch):
    other, out = tmp_path / "other" / "checkpoint-3", tmp_path / "out"
    monkeypatch.setattr(resume, "open_checkpoint", lambda folder: SimpleNamespace(folder=folder, manifest={}))
    monkeypatch.setattr(resume, "find_changes", lambda plan, recorded: [])
    assert find_checkpoint(plan_of(out, other), print).folder == other
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="has states of its own that it would replace; choose a new --out"):
        find_checkpoint(plan_of(out, other), print)
    assert find_checkpoint(plan_of(out, out / "checkpoint-1"), print).folder == out / "checkpoint-1"
    monkeypatch.chdir(tmp_path)  # by another name of the same folder
    assert find_checkpoint(plan_of(out, "out/checkpoint-1"), print).folder == Path("out/checkpoint-1")


FACTS = {
    "settings": {"loss_norm": "micro-mean", "lr": 1}, "model": {"dim": 8}, "dtype": "bf16", "data_sha256": "0",
    "base_sha256": "1", "max_tokens": 9,
}  # fmt: skip


@pytest.mark.parametrize(
    "recorded, found",
    [
        ({}, []),
        ({"max_tokens": 8}, ["micro_batch_tokens, which micro-mean depends on: 8 -> 9"]),
        ({"settings": {"loss_norm": "micro-mean", "lr": 2, "old": 3}}, ["lr: 2 -> 1", "old: 3 -> None"]),
        ({"model": {}}, ["dim: None -> 8"]),
        ({"dtype": "fp32"}, ["dtype: fp32 -> bf16"]),
        ({"data_sha256": "2"}, ["the data: its tokens have another sha256"]),
        ({"base_sha256": None}, ["the base: its weights are other ones"]),
    ],
)
def test_each_change_is_told(recorded, found):
    plan = SimpleNamespace(recorded_facts=lambda tokens: FACTS, config=SimpleNamespace(micro_batch_tokens=9),
                           packing=SimpleNamespace(max_tokens=9))  # fmt: skip
    assert find_changes(plan, FACTS | recorded) == found
    by_token = FACTS | {"settings": {"loss_norm": "token"}}
    plan.recorded_facts = lambda tokens: by_token
    assert find_changes(plan, by_token | {"max_tokens": 8}) == [], "where the maths does not depend on it"


DAMAGED = {
    "cut off": lambda text: text[:100],
    "no JSON": lambda text: text.replace(":", ";", 1),
    "no UTF-8": lambda text: text.encode().replace(b"s", b"\xf3", 1),
    "another status": lambda text: text.replace('"done"', '"dong"'),
    "no status": lambda text: text.replace('"status"', '"statvs"'),
    "facts are no object": lambda text: re.sub(r'"facts": \{.*?\n \},', '"facts": [1],', text, flags=re.DOTALL),
    "seconds are no number": lambda text: re.sub(r'"seconds": [\d.e-]+', '"seconds": "1"', text),
    "states of no kind": lambda text: text.replace('"optimizer_states": "fp32"', '"optimizer_states": "fp3r"'),
}


def test_a_damaged_record_of_a_run_is_named_and_nothing_is_lost(tmp_path, rows_file, capsys):
    """A finished model must not be trained anew and replaced, nor asked in another style than it was trained in."""
    out = tmp_path / "out"
    arguments = [
        "--model", small_model(), "--data", rows_file, "--out", out, "--dtype", "fp32", "--global-batch-size", 2,
        "--max-length", 64, "--max-steps", 1, "--save-every", 1,
    ]  # fmt: skip

    def call(*more, main=command.main):
        code = run_main(main, [str(argument) for argument in more])
        return code, "".join(capsys.readouterr())

    assert call(*arguments)[0] == 0
    whole, model = (out / "run.json").read_text(), (out / "model.safetensors").read_bytes()
    made = (out / "model.safetensors").stat().st_mtime_ns
    for name, damage in DAMAGED.items():
        content = damage(whole)
        (out / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        assert (out / "run.json").read_bytes() != whole.encode(), name
        code, said = call(*arguments)
        assert code == 3 and "run.json" in said and "--resume never to start over" in said, (name, said)
        code, said = call("--model", out, "--prompt", "Hi", "--max-new-tokens", 1, main=generate.main)
        assert code == (3 if name in ("cut off", "no JSON", "no UTF-8") else 0), (name, said)
        assert code == 0 or ("run.json" in said and "--prompt-style" in said), (name, said)
    assert (out / "model.safetensors").stat().st_mtime_ns == made
    code, said = call(*arguments, "--resume", "never")
    assert code == 0 and (out / "model.safetensors").read_bytes() == model, said
    assert (out / "model.safetensors").stat().st_mtime_ns != made


def test_a_run_goes_on_only_as_it_began(tmp_path, rows_file):
    arguments = [
        "--model", small_model(), "--data", rows_file, "--out", tmp_path / "out", "--dtype", "bf16",
        "--global-batch-size", 2, "--max-length", 64, "--save-every", 1, "--optimizer-states", "8bit", "--max-steps", 1,
    ]  # fmt: skip
    finetune(*arguments)
    done = finetune(*arguments, "--master-weights", "stochastic", check=False)
    assert done.returncode == 2 and "master" in done.stderr, done.stderr
    done = finetune(*arguments[:-4], "--optimizer-states", "fp32", "--max-steps", 1, check=False)
    assert done.returncode == 2 and "states" in done.stderr, done.stderr


@pytest.mark.parametrize("resume", ["auto", "never", "out/checkpoint-1"])
@pytest.mark.parametrize("status", ["done", "stopped", None])
@pytest.mark.parametrize(
    "is_changed, allow, has_state",
    [(False, False, False), (True, False, True), (True, True, False), (True, True, True)],
)
def test_a_run_is_finished_where_nothing_is_left_to_do(resume, status, is_changed, allow, has_state, tmp_path):
    if status:
        (tmp_path / "run.json").write_text(json.dumps({"status": status, "facts": FACTS}))
    if has_state:
        (tmp_path / "checkpoint-1").mkdir()
    facts = FACTS | {"dtype": "fp32"} if is_changed else FACTS
    config = SimpleNamespace(micro_batch_tokens=9, resume=resume, allow_changed=allow)
    plan = SimpleNamespace(out=tmp_path, config=config, packing=SimpleNamespace(max_tokens=9),
                           recorded_facts=lambda tokens: facts)  # fmt: skip
    if status == "done" and resume != "never" and is_changed and not (allow and has_state):
        with pytest.raises(UsageError, match=r"a finished run with other settings \(dtype: bf16 -> fp32\)"):
            is_finished(plan)
    else:
        assert is_finished(plan) == (status == "done" and resume == "auto" and not is_changed)
