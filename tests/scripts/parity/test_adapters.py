"""The comparison with PEFT: what is over its bound is told and makes the exit code, and each side gets its own job."""

import json
import re
import subprocess
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from scripts.parity import adapters
from scripts.parity.adapters import BOUNDS, Peer, cut_at_stop, find_excesses, largest_difference, read_short_rows
from tests.helpers.calls import Calls
from tests.helpers.damage import with_value

RIGHT = {
    "fp64": {"a case": dict.fromkeys(("loss", "gradient", "logits", "merged_logits", "logits_back_in_peft"), 1e-12)},
    "curve": {"worst_relative_difference": {"loss": 1e-5, "grad_norm": 1.0}},
    "qlora": {"worst_relative_difference": {"loss": 1e-4, "grad_norm": 1.0}},
    "crossed": {"ours_in_peft": 1e-6, "pefts_here": 1e-6},
    "merged": {"merged_logits": 1e-6, "answers": 6, "same_in_transformers": 6, "same_in_llama_cpp": 6},
}
BOUNDED = [
    *((("fp64", "a case", name), BOUNDS["fp64"]) for name in RIGHT["fp64"]["a case"]),
    (("curve", "worst_relative_difference", "loss"), BOUNDS["loss"]),
    (("qlora", "worst_relative_difference", "loss"), BOUNDS["qlora"]),
    *((("crossed", name), BOUNDS["logits"]) for name in RIGHT["crossed"]),
    (("merged", "merged_logits"), BOUNDS["logits"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "bound"), BOUNDED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_figure_is_held_to_its_own_bound(path, bound):
    assert find_excesses(with_value(RIGHT, path, 0.99 * bound)) == []
    assert len(find_excesses(with_value(RIGHT, path, 1.01 * bound))) == 1


@pytest.mark.parametrize("name", ["same_in_transformers", "same_in_llama_cpp"])
def test_one_other_answer_is_told(name):
    assert find_excesses(with_value(RIGHT, ("merged", name), 5)) != [] == find_excesses(RIGHT)


def test_a_difference_counts_to_either_side():
    b = torch.tensor([1.0, -4.0])
    for off in (0.4, -0.4):
        assert largest_difference(b + torch.tensor([0.0, off]), b) == pytest.approx(0.1)


def test_an_answer_ends_before_the_first_stop():
    assert cut_at_stop([5, 6, 2, 7, 2], {2}) == [5, 6] and cut_at_stop([5, 6], {2}) == [5, 6]


@pytest.mark.parametrize("ends_with", [0, 1])
def test_a_peer_that_fails_ends_the_comparison(ends_with, tmp_path):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\necho "$HF_HUB_OFFLINE $3 $(cat $4)" > {tmp_path}/told\nexit {ends_with}\n')
    program.chmod(0o755)
    peer = Peer(program, tmp_path)
    if ends_with:
        with pytest.raises(subprocess.CalledProcessError):
            peer.run("train", [])
    else:
        peer.run("train", [{"a": 1}])
        assert (tmp_path / "told").read_text() == '1 train [{"a": 1}]\n'


def test_rows_that_max_length_cuts_are_left_out_and_too_few_are_told(tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b" * n} for n in (5, 500, 6, 7, 8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prompt = len(adapters.make_prompt(rows[0]))
    tokenizer = SimpleNamespace(encode=list)
    args = Namespace(data=tmp_path / "rows.json", steps=2, batch=2, max_length=prompt + 400)
    assert [len(row["output"]) for row in read_short_rows(args, tokenizer)] == [5, 6, 7, 8]
    with pytest.raises(SystemExit, match="3 rows are under --max-length; 4 wanted"):
        read_short_rows(Namespace(**vars(args) | {"max_length": prompt + 8}), tokenizer)


class Stand:
    """A peer that notes its jobs and writes a curve."""

    def __init__(self):
        self.jobs = []

    def run(self, action, jobs):
        self.jobs += jobs
        for job in jobs:
            if "folder" in job:
                Path(job["folder"], "curve.json").write_text(json.dumps([[2.0, 1.0]]))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_both_sides_train_what_is_compared(kind, tmp_path, monkeypatch):
    peer, started = Stand(), []
    monkeypatch.setattr(adapters, "finetune_curve", lambda args, out, *flags: started.append(flags) or [(2.2, 1.0)])
    args = Namespace(steps=1, batch=1, max_length=9, lr=0.1)
    found = adapters.train_twice(peer, args, tmp_path / "base", tmp_path / "run", [], kind)
    flags = dict(zip(*[iter(map(str, [*started[0][:8], *started[0][9:]]))] * 2, strict=True))
    assert peer.jobs[0]["nf4"] == (kind == "qlora") and flags["--adapter"] == kind
    assert peer.jobs[0]["rows"] == flags["--data"] and peer.jobs[0]["base"] == flags["--model"]
    assert flags["--adapter-dir"] == str(tmp_path / "run" / "initial") and started[0][8] == "--no-shuffle"
    assert found == {"loss": [2.2], "peft_loss": [2.0], "worst_relative_difference": pytest.approx({
        "loss": 0.1, "grad_norm": 0.0})}  # fmt: skip


def test_adapters_are_crossed_both_ways(tmp_path, monkeypatch):
    logits = {"ours_in_peft": 1.0, "pefts_here": 2.0}
    ours = {"out": 1.1, "trained": 2.4}
    monkeypatch.setattr(adapters, "load_adapter_beside", lambda base, folder: (folder.name, None))
    monkeypatch.setattr(adapters, "our_logits", lambda model, tokens: torch.tensor([ours[model]]))
    monkeypatch.setattr(adapters, "load_file", lambda path: {"logits": torch.tensor([logits[path.stem]])})
    peer = Stand()
    found = adapters.cross_adapters(peer, tmp_path, [1])
    assert found == pytest.approx({"ours_in_peft": 0.1, "pefts_here": 0.2})
    assert [Path(job["adapter"]).name for job in peer.jobs] == ["out", "trained"]


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_that_of_the_bounds(code, monkeypatch, tmp_path, call_main):
    for name in ("compare_gradients", "train_twice", "cross_adapters", "compare_merged", "run_module"):
        monkeypatch.setattr(adapters, name, lambda *_: {"worst_relative_difference": {"loss": 0.0}})
    monkeypatch.setattr(adapters, "read_short_rows", lambda *_: [{"output": "a"}])
    tokenizer = SimpleNamespace(encode=lambda text: [])
    monkeypatch.setattr(adapters, "load_model", lambda *_: (None, tokenizer))
    monkeypatch.setattr(Peer, "read_versions", lambda _: {})
    monkeypatch.setattr(adapters, "find_excesses", lambda result: ["something"] * code)
    assert call_main(adapters, "--json", tmp_path / "x", "--data", "d", "--python", "p") == code


@pytest.mark.parametrize("peft_trains", ["ab", "abc", "a"])
def test_a_case_is_as_far_off_as_its_worst_gradient_and_both_train_the_same_tensors(peft_trains, monkeypatch, tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    tokens = torch.tensor([0, 2, 1])

    class Model:
        def __call__(self, tokens):
            return tokens

        def logits(self, tokens):
            return weight

        def trained_parameters(self):
            return {"weight": weight}

    gradient = (torch.softmax(torch.zeros(2, 5), -1) - torch.nn.functional.one_hot(tokens[1:], 5)).double() / 2
    theirs = {name: gradient * (1 + off) for name, off in zip(peft_trains, (0.1, -0.3, 0.0), strict=False)}
    theirs |= {"loss": torch.tensor(5.0).log(), "logits": torch.ones(3, 5)}
    pieces = {name: SimpleNamespace(parameter="weight", rows_of=lambda of: of["weight"][:2]) for name in "ab"}
    read = []

    def source(name):
        return SimpleNamespace(config=None, read_into=lambda model: read.append(name))

    for name, value in {
        "load_file": lambda path: theirs, "open_source": lambda path: source(path.name),
        "open_adapter": lambda path, _: source(path.name),
        "new_model": lambda *_, **__: Model(), "list_factors": lambda *_: pieces, "save_adapter": lambda *_: None,
        "MergedSource": lambda *_: source("merged"),
    }.items():  # fmt: skip
        monkeypatch.setattr(adapters, name, value)
    if peft_trains != "ab":
        with pytest.raises(AssertionError if peft_trains == "abc" else KeyError):
            adapters.compare_case(tmp_path, tokens)
        return
    found = adapters.compare_case(tmp_path, tokens)
    assert read == ["base", "theirs", "merged"]
    assert found["gradient"] == pytest.approx(0.3 / 0.7, rel=1e-5) and found["loss"] < 1e-6 and found["logits"] == 1.0


def test_gradients_are_compared_in_every_case_and_back_in_peft(monkeypatch, tmp_path, capsys, snapshot):
    """A case with a whole head has a head of its own. Tokens and RoPE's table are the same in all."""
    calls, peer = Calls(), Stand()
    found = {f"case-{i}": {"loss": i / 8, "gradient": i / 16} for i in range(6)}
    case = calls.stand_in("compare", lambda folder, tokens: dict(found[folder.name]))
    monkeypatch.setattr(adapters, "compare_case", case)
    number = lambda path: float(path.parent.name[-1])  # noqa: E731
    logits = lambda path: {"logits": torch.tensor([8.0 + number(path) * (path.stem == "back")])}  # noqa: E731
    monkeypatch.setattr(adapters, "load_file", logits)
    monkeypatch.setattr(peer, "run", calls.stand_in("run"))
    told = adapters.compare_gradients(peer, tmp_path)
    text = "\n".join(["\n".join(map(str, told.items())), capsys.readouterr().out, calls.text()])
    assert text.replace(str(tmp_path), "FOLDER") == snapshot
    given = [load_file(tmp_path / f"case-{i}" / "given.safetensors") for i in range(6)]
    angles = torch.arange(20.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    for one in given:
        assert one["tokens"].shape == (20,) and torch.equal(one["tokens"], given[0]["tokens"])
        assert one["tokens"].max() < 97 and torch.allclose(one["cos"], angles.cos(), atol=1e-6)
        assert torch.allclose(one["sin"], angles.sin(), atol=1e-6)


def test_versions_are_those_of_the_peers_interpreter(monkeypatch):
    calls = Calls()
    ended = SimpleNamespace(stdout='{"peft": "0.21"}')
    monkeypatch.setattr(adapters.subprocess, "run", calls.stand_in("run", ended))
    assert Peer(Path("python"), Path("x")).read_versions() == {"peft": "0.21"}
    names = ["bitsandbytes", "peft", "torch", "transformers", "xllamacpp"]
    code = f"import importlib.metadata, json\nprint(json.dumps({{n: importlib.metadata.version(n) for n in {names}}}))"
    assert calls.lines == [
        f"run([PosixPath('python'), '-c', {code!r}], check=True, capture_output=True, text=True)"
    ]  # fmt: skip


def test_an_adapter_stands_beside_its_base_in_fp32(monkeypatch):
    calls = Calls()
    source, adapter = calls.thing("source", read_into=None), calls.thing("adapter", read_into=None)
    source.config, adapter.config = "the base's", "the adapter's"
    for name, result in {
        "open_source": source, "open_adapter": adapter, "new_model": "model", "load_model": ("another", "tokenizer", 0)
    }.items():  # fmt: skip
        monkeypatch.setattr(adapters, name, calls.stand_in(name, result))
    assert adapters.load_adapter_beside(Path("base"), Path("mine")) == ("model", "tokenizer")
    assert calls.lines == [
        "open_source(PosixPath('base'))", "open_adapter(PosixPath('mine'), \"the base's\")",
        "new_model(\"the base's\", 'cpu', torch.float32, 'ref', adapter=\"the adapter's\")",
        "source.read_into('model')", "adapter.read_into('model')",
        "load_model('base', device(type='cpu'), torch.float32, 'ref')",
    ]  # fmt: skip


def test_greedy_answers_of_the_merged_model_are_compared_up_to_their_stop(monkeypatch, tmp_path, snapshot):
    calls = Calls()
    answers = {"answer": [[5, 6, 2, 9], [7]], "answer_by_llama_cpp": [[5, 6], [8]]}

    def run(action, jobs):
        (job,) = jobs
        Path(job["out"]).write_text(json.dumps(answers[action]))

    peer = SimpleNamespace(run=calls.stand_in("run", run))
    tokenizer = calls.thing("tokenizer", encode=lambda text: [len(text)], decode=str)
    tokenizer.stop_ids = {2}
    beside, merged = calls.thing("beside"), calls.thing("merged")
    logits = {"beside": torch.tensor([1.0, 4.0]), "merged": torch.tensor([1.0, 5.0])}
    for name, result in {
        "run_module": None, "load_adapter_beside": (beside, tokenizer), "generate": [[5, 6, 2], [7, 2]],
        "load_model": (merged, 0, 0), "our_logits": lambda model, tokens: logits[model.label],
    }.items():  # fmt: skip
        monkeypatch.setattr(adapters, name, calls.stand_in(name, result))
    monkeypatch.setattr(adapters, "ANSWERS", 2)
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}] * 2
    found = adapters.compare_merged(peer, tmp_path, rows)
    assert found == {
        "answers": 2, "first_answer": "[5, 6, 2]", "same_in_transformers": 2, "same_in_llama_cpp": 1,
        "merged_logits": 0.25,
    }  # fmt: skip
    assert calls.text().replace(str(tmp_path), "FOLDER") == snapshot
    answers["answer"].pop()
    with pytest.raises(ValueError, match="shorter"):
        adapters.compare_merged(peer, tmp_path, rows)


@pytest.mark.parametrize("python", ["p", None])
def test_the_whole_comparison(python, monkeypatch, tell, snapshot, capsys):
    calls = Calls()
    monkeypatch.setattr(adapters.tempfile, "TemporaryDirectory", calls.folder)
    monkeypatch.setattr(Peer, "label", property(lambda peer: f"peer {peer.python} {peer.folder}"), raising=False)
    tokenizer = SimpleNamespace(label="tokenizer", encode=lambda text: list(text))
    for name, result in {
        "make_environment": (Path("bin"), {}), "compare_gradients": RIGHT["fp64"], "run_module": None,
        "load_model": (0, tokenizer, 0), "read_short_rows": [{"output": "x" * 30}, {"output": "y"}],
        "train_twice": lambda peer, args, base, folder, rows, kind: RIGHT["curve" if kind == "lora" else "qlora"],
        "cross_adapters": RIGHT["crossed"], "compare_merged": RIGHT["merged"],
    }.items():  # fmt: skip
        monkeypatch.setattr(adapters, name, calls.stand_in(name, result))
    monkeypatch.setattr(Peer, "read_versions", lambda _: {"peft": "0.21"})
    monkeypatch.setattr(adapters, "BOUNDS", adapters.BOUNDS)
    text = tell(adapters, "--data", "dir/mine.json", "--steps", 3, *(("--python", python) if python else ()))
    log = re.sub(r"json='[^']*'", "json=FILE", calls.text())
    assert text + "\n" + log == snapshot


def test_what_is_over_its_bound_is_told_in_words():
    wrong = with_value(with_value(RIGHT, ("merged", "same_in_llama_cpp"), 4), ("fp64", "a case", "gradient"), 2e-10)
    wrong = with_value(wrong, ("curve", "worst_relative_difference", "loss"), 2e-4)
    assert find_excesses(wrong) == [
        "a case, gradient is 2.0e-10 off, wanted 1e-10", "a step's loss is 2.0e-04 off, wanted 0.0001",
        "llama_cpp gives 4 of 6 answers",
    ]  # fmt: skip


def test_flags_have_defaults(defaults_of):
    assert defaults_of(adapters, "--json", "x", "--data", "d") == {
        "json": "x", "data": "d", "steps": 20, "batch": 2, "max_length": 128, "lr": 2e-4, "model": "smollm2-135m",
        "python": None,
    }  # fmt: skip
