"""engine.finetune --adapter lora as a user runs it: one curve through kills and full disks; what it leaves, refuses."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import export, finetune
from engine.base.errors import run_main
from engine.formats.adapters import open_adapter
from engine.formats.source import open_source
from engine.training import saving
from tests.helpers.adapters import write_adapter
from tests.helpers.forks import Started
from tests.helpers.run import BEFORE_CALL, PARTS_OF_A_RUN, environment, events
from tests.helpers.small_model import small_model

STEPS = 6
SHAPE = ("--lora-r", 4, "--lora-alpha", 8, "--lora-rank-pattern", "down_proj=2", "--rslora")
DROPPED = ("--lora-dropout", 0.2)


def arguments(rows, out, *more, model=None):
    return [
        "--model", model or small_model(), "--data", rows, "--out", out, "--adapter", "lora", "--device", "cpu",
        "--dtype", "fp32", "--lr", "1e-2", "--max-length", 64, "--global-batch-size", 8, "--micro-batch-tokens", 128,
        "--max-steps", STEPS, "--save-every", 2, "--keep", 9, *more,
    ]  # fmt: skip


def run(*args, code=0, main=finetune.main):
    assert run_main(main, [str(a) for a in args]) == code


def curve(out):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in events(out)]


def factors(out):
    return load_file(out / "adapter_model.safetensors")


def assert_same(out, reference):
    """Every loss and every factor, bit for bit."""
    assert curve(out) == curve(reference) and len(curve(out)) == STEPS
    ours, theirs = factors(out), factors(reference)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert (out / "adapter_config.json").read_bytes() == (reference / "adapter_config.json").read_bytes()


@pytest.fixture(scope="module")
def plain(rows, tmp_path_factory):
    """Return the folder of a run without dropout, with held-out rows."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run(*arguments(rows, out, *SHAPE, "--eval-fraction", 0.2, "--eval-every", 3))
    return out


@pytest.fixture(scope="module")
def dropped(rows, tmp_path_factory):
    """Return the folder of a run with dropout."""
    out = tmp_path_factory.mktemp("dropped") / "out"
    run(*arguments(rows, out, *SHAPE, *DROPPED))
    return out


# ---- what a run computes and leaves ---------------------------------------------------------------------------------


def test_the_loss_falls_and_the_folder_is_pefts(plain):
    losses = [loss for _, loss, _ in curve(plain)]
    assert losses[-1] < losses[0] - 0.3
    held = [line["loss"] for line in events(plain, "eval")]
    assert len(held) == 3 and held[-1] < held[0] - 0.3
    names = {path.name for path in plain.iterdir() if path.is_file()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.json", "report.html"}
    assert not [name for name in names if name.startswith("model") or name == "config.json"]
    raw = json.loads((plain / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(small_model().resolve())
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (4, 16, False)  # rank-stabilised: 8 / 2 is 16 / 4
    adapter = open_adapter(plain, open_source(small_model()).config)
    assert adapter.base_sha256 and adapter.dtype == torch.float32


def test_a_state_holds_what_is_trained_alone(plain):
    state = load_file(plain / "checkpoint-6" / "state.safetensors")
    n_factors = sum(t.numel() for t in factors(plain).values())
    parameters = {name: t for name, t in state.items() if name.startswith("param.")}
    assert sum(t.numel() for t in parameters.values()) == n_factors
    assert sum(t.numel() for name, t in state.items() if name not in parameters) == 2 * n_factors  # m and v
    assert sum(t.numel() for t in factors(plain).values()) < open_source(small_model()).config.n_parameters / 10


@pytest.mark.parametrize(
    "more",
    [
        ("--recompute", "none"),
        ("--recompute", "block", "--micro-batch-tokens", 64),
        ("--no-packing", "--no-share-prefix", "--micro-batch-size", 1),
        ("--optimizer-in-backward", "--grad-clip", 0, "--micro-batch-tokens", 1024),
    ],
)
def test_however_it_is_cut_the_curve_is_one(rows, tmp_path, more):
    clip = ("--grad-clip", 0)
    run(*arguments(rows, tmp_path / "a", *SHAPE, *clip))
    run(*arguments(rows, tmp_path / "b", *SHAPE, *clip, *more))
    for a, b in zip(curve(tmp_path / "a"), curve(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_dropout_changes_the_curve_and_samples_and_held_out_losses_drop_nothing(rows, plain, tmp_path):
    """At a rate of 0 no weight moves: the held-out loss is that of before, the training loss of nearly dropped-out
    updates is another."""
    start = write_adapter(tmp_path / "start", seed=1)
    for out, more in (("a", ()), ("b", ("--lora-dropout", 0.5))):
        config = json.loads((start / "adapter_config.json").read_text())
        config["lora_dropout"] = 0.5 if more else 0.0
        (start / "adapter_config.json").write_text(json.dumps(config))
        run(*arguments(
            rows, tmp_path / out, "--adapter-dir", start, "--lr", 0, "--eval-fraction", 0.2, "--eval-every", 3,
            "--sample-every", 3, "--sample-tokens", 8, "--save-every", "off",
        ))  # fmt: skip
    with_, without = tmp_path / "b", tmp_path / "a"
    assert all(a != b for (_, a, _), (_, b, _) in zip(curve(with_), curve(without), strict=True))
    assert len({line["loss"] for out in (with_, without) for line in events(out, "eval")}) == 1
    texts = [[line["text"] for line in events(out, "sample")] for out in (with_, without)]
    assert texts[0] == texts[1] and texts[0][:3] == texts[0][3:6] == texts[0][6:]


# ---- kills, full disks ----------------------------------------------------------------------------------------------


def killed(patch, *args):
    """Run the command in a process of its own that kills itself."""
    die = "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
    code = f"{PARTS_OF_A_RUN}{die}{BEFORE_CALL}{patch}\nsys.exit(run_main(finetune.main, sys.argv[1:]))\n"
    process = Started(code, *args, env=environment())
    said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said


@pytest.mark.parametrize(
    "kill",
    [
        "before(Transformer, 'loss', 12, die)",  # within a step
        "before(saver, 'write_safetensors', 2, die)",  # in a save
        "before(saving, 'save_adapter', 1, die)",  # the loop is over
        "before(os, 'replace', 4, die)",  # the weights have their name, the config has not
    ],
)
def test_kill_9_then_resume_is_bit_equal(rows, dropped, tmp_path, kill):
    """With dropout, whose draws depend on step and micro-batch alone."""
    args = arguments(rows, tmp_path / "out", *SHAPE, *DROPPED)
    killed(kill, *args)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    run(*args)
    assert_same(tmp_path / "out", dropped)


def test_qlora_is_one_run_through_a_kill(rows, dropped, tmp_path, capsys):
    """The frozen weights are read and quantised again; the state holds none of them."""
    qlora = (*SHAPE, *DROPPED, "--adapter", "qlora")
    run(*arguments(rows, tmp_path / "whole", *qlora))
    args = arguments(rows, tmp_path / "out", *qlora)
    killed("before(Transformer, 'loss', 12, die)", *args)
    run(*args)
    assert_same(tmp_path / "out", tmp_path / "whole")
    for (_, a, _), (_, b, _) in zip(curve(tmp_path / "out"), curve(dropped), strict=True):
        assert a != b and a == pytest.approx(b, rel=0.1)  # weights in 4 bits are near those in 32
    state = load_file(tmp_path / "out" / "checkpoint-6" / "state.safetensors")
    assert state.keys() == load_file(dropped / "checkpoint-6" / "state.safetensors").keys()
    run(*arguments(rows, tmp_path / "out", *SHAPE, *DROPPED), code=2)
    assert "other settings (adapter: qlora -> lora)" in capsys.readouterr().err


def test_a_full_disk_costs_a_repetition_of_the_command(rows, dropped, tmp_path, monkeypatch, capsys):
    args = arguments(rows, tmp_path / "out", *SHAPE, *DROPPED, "--save-every", "off")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_adapter", full)
        run(*args, code=1)
    told = capsys.readouterr().err
    assert "could not be written (No space left on device); the training state is saved: make room and run" in told
    assert (tmp_path / "out" / "checkpoint-6").is_dir()
    run(*args)
    assert_same(tmp_path / "out", dropped)


# ---- going on -------------------------------------------------------------------------------------------------------


def test_an_adapter_goes_on_where_it_ended(rows, plain, tmp_path, capsys):
    """Its shape comes with it, though the flags name none, and its B are not set to 0."""
    before = factors(plain)
    run(*arguments(rows, tmp_path / "out", "--adapter-dir", plain, "--lr", 0, "--eval-fraction", 0.2))
    after = factors(tmp_path / "out")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    first, last = events(tmp_path / "out", "eval")[0]["loss"], events(plain, "eval")[-1]["loss"]
    assert first == pytest.approx(last, rel=1e-6)
    told = capsys.readouterr().out
    assert f"updates of rank 2, 4 of all-linear, going on from {plain}" in told and "other weights" not in told
    once, again = (open_adapter(out, open_source(small_model()).config).config for out in (plain, tmp_path / "out"))
    assert once == again


def test_flags_of_a_shape_are_not_passed_over(rows, plain, tmp_path, capsys):
    args = arguments(rows, tmp_path / "out", "--lora-rank-pattern", "dwon_proj=4", "--lora-alpha-pattern", "k_proj=2")
    run(*args, code=2)
    assert "patterns dwon_proj fit no map that has an update" in capsys.readouterr().err
    run(*arguments(rows, tmp_path / "out", "--adapter-dir", plain, "--lora-r", 64, "--lora-targets", "up_proj"), code=2)
    assert "its shape is not that of --lora-r, --lora-targets; leave them out" in capsys.readouterr().err
    run(*arguments(rows, tmp_path / "out", "--adapter-dir", plain, "--lora-r", 4, *DROPPED, "--max-steps", 1))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["lora_dropout"] == 0.2


def other_base(folder):
    """Write a copy of the small model whose weights are a little other ones."""
    shutil.copytree(small_model(), folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: t * 1.001 for name, t in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_going_on_beside_other_weights_is_told(rows, plain, tmp_path, capsys):
    other = other_base(tmp_path / "other")
    run(*arguments(rows, tmp_path / "out", "--adapter-dir", plain, "--max-steps", 1, model=other))
    assert f"warning: {plain}: trained beside other weights than those of {other}" in capsys.readouterr().out


REFUSED = {
    "a changed rank": (("--lora-r", 8), 2, "other settings (lora_r: 4 -> 8); pass --allow-changed"),
    "no dropout": (("--lora-dropout", 0), 2, "lora_dropout: 0.2 -> 0.0"),
    "other maps": (("--lora-targets", "q_proj", "down_proj"), 2, "['all-linear'] -> ['q_proj', 'down_proj']"),
    "whole weights": (("--adapter", "none"), 2, "is for --adapter lora or qlora; add one"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_state_goes_on_only_as_it_began(how, rows, dropped, tmp_path, capsys):
    shutil.copytree(dropped, tmp_path / "out")
    record = (tmp_path / "out" / "run.json").read_text()
    (tmp_path / "out" / "run.json").write_text(record.replace('"status": "done"', '"status": "stopped"'))
    more, code, told = REFUSED[how]
    run(*arguments(rows, tmp_path / "out", *SHAPE, *DROPPED, *more), code=code)
    assert told in capsys.readouterr().err


def test_a_base_that_is_gone_or_has_other_weights_is_refused(rows, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(small_model(), base)
    args = arguments(rows, out, *SHAPE, model=base)
    killed("before(saving, 'save_adapter', 1, die)", *args)
    os.rename(base, tmp_path / "moved")
    state = out / "checkpoint-6"
    run(*args, code=3)
    assert "base: no such folder or file" in capsys.readouterr().err
    merge = "--model", state, "--tokenizer", small_model(), "--merge", "--out", tmp_path / "m"
    run(*merge, main=export.main, code=3)
    assert f"checkpoint-6: an adapter's state, whose base cannot be read ({base}: does" in capsys.readouterr().err
    other_base(base)
    run(*args, code=2)
    assert "(the base: its weights are other ones); pass --allow-changed" in capsys.readouterr().err
    run(*merge, main=export.main, code=3)
    assert f"whose base {base} has another shape or other weights than it had" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    shutil.rmtree(base)
    os.rename(tmp_path / "moved", base)
    run(*args)


def test_an_output_folder_holds_a_model_or_an_adapter(rows, plain, tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(small_model(), whole)
    shutil.copy(plain / "run.json", whole)  # else it is no folder of ours
    run(*arguments(rows, whole), code=2)
    assert "holds a whole model (config.json), beside which this run's would be misread" in capsys.readouterr().err
    shutil.copytree(plain, tmp_path / "adapter")
    run(*arguments(rows, tmp_path / "adapter")[:6], "--device", "cpu", code=2)
    assert "holds an adapter (adapter_config.json), beside which" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_loaded(rows, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "a")
    raw = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(raw | {"r": 8, "use_dora": True}))
    run(*arguments(rows, tmp_path / "out", "--adapter-dir", adapter), code=3)
    told = capsys.readouterr().err
    assert "use_dora is True" in told and f"{adapter}: " in told
    run(*arguments(rows, tmp_path / "out", "--lora-targets", "query"), code=2)
    assert "no map of the model is among the targets query;" in capsys.readouterr().err
    run(*arguments(rows, tmp_path / "out", "--lora-save", "lm_head"), code=2)
    assert "the model's head is its embedding" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_rank_over_what_a_map_can_have_is_told(rows, tmp_path, capsys):
    """PEFT trains it, and so does a run: the warning names the maps, and a lower rank of them is not told."""
    told = "warning: ranks over what the maps can have only add parameters"
    run(*arguments(rows, tmp_path / "wide", "--lora-r", 64, "--max-steps", 1))
    said = capsys.readouterr().out
    assert f"{told}: k_proj (64, of at most 32), v_proj (64, of at most 32); --lora-rank-pattern" in said
    run(*arguments(rows, tmp_path / "narrow", "--lora-r", 4, "--max-steps", 1))
    assert told not in capsys.readouterr().out


# ---- the state of an adapter's run as a model -----------------------------------------------------------------------


def test_a_state_is_merged_as_the_adapter_it_would_be(plain, tmp_path, capsys):
    state = plain / "checkpoint-6"
    run("--model", state, "--out", tmp_path / "no", main=export.main, code=2)
    assert "is an adapter: --merge writes its base with the updates in the weights" in capsys.readouterr().err
    for name, model in (("state", state), ("run", plain)):
        run("--model", model, "--merge", "--out", tmp_path / name, main=export.main)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("state", "run"))
    base = load_file(small_model() / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    assert all(torch.dist(ours[name], theirs[name]) <= 1e-6 * theirs[name].norm() for name in ours)
    changed = {name for name in ours if not ours[name].equal(base[name])}
    assert changed == {name for name in base if "_proj" in name}
