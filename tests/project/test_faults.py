"""What goes wrong around a run: kills, signals, full disks, strange folders. Each run is a process of its own."""

import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forks import Started
from tests.helpers.run import BEFORE_CALL, PARTS_OF_A_RUN, environment, events, finetune
from tests.helpers.small_model import small_model

STEPS = 12


def arguments(out, data, *more):
    return [
        "--model", str(small_model()), "--data", str(data), "--out", str(out), "--epochs", "4", "--lr", "1e-3",
        "--global-batch-size", "8", "--micro-batch-size", "2", "--save-every", "2", "--keep", "2", "--device", "cpu",
        "--eval-fraction", "0.1", "--eval-every", "3", *map(str, more),
    ]  # fmt: skip


def start(*args, patch=""):
    """Start the command in the background. patch: Python that runs first, with PARTS_OF_A_RUN, `die` and `term`."""
    code = (
        f"{PARTS_OF_A_RUN}\n"
        "die, term = (lambda n=n: os.kill(os.getpid(), n) for n in (signal.SIGKILL, signal.SIGTERM))\n"
        f"{patch}\n"
        "sys.exit(run_main(finetune.main, sys.argv[1:]))\n"
    )
    return Started(code, *args, env=environment())


def end(process):
    """(exit code, stdout, stderr); the code of a killed one is negative."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(rows file, output folder) of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    rows = [
        {"instruction": f"Count to {i}.", "input": "now" * (i % 3), "output": " ".join(map(str, range(i)))}
        for i in range(26)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    finetune(*arguments(folder / "out", folder / "rows.json"))
    assert len(events(folder / "out")) == STEPS
    return folder / "rows.json", folder / "out"


def curve(out, event="train", keys=("step", "loss", "grad_norm", "lr", "tokens")):
    return [tuple(line[key] for key in keys) for line in events(out, event)]


def assert_as_unbroken(out, unbroken):
    """Every loss, every held-out loss and the final weights, bit for bit."""
    assert curve(out) == curve(unbroken[1])
    assert curve(out, "eval", ("step", "loss")) == curve(unbroken[1], "eval", ("step", "loss"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, unbroken[1]))
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
    assert not list(out.glob(".tmp-*"))


def test_two_runs_are_bit_equal(unbroken, tmp_path):
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


# One folder, killed again and again: each resume dies a little later. Calls are counted in each process.
KILLS = [
    "before(step.Steps, 'compute_gradients', 2, die)",  # between steps
    "before(Transformer, 'loss', 12, die)",  # within step 3, gradients half there
    "before(AdamW, 'step', 2, die)",  # before an update
    "from kernels.ops import adamw_many; before(adamw_many, 'adamw', 30, die)",  # within an update
    "before(saver, 'write_safetensors', 1, die)",  # in a save, three ways
    "before(saver.json, 'dump', 1, die)",
    "before(checkpoint.os, 'rename', 1, die)",
    "before(checkpoint, 'remove_checkpoint', 1, die)",  # in rotation
    "before(evaluation, 'evaluate', 1, die)",
    "before(saving, 'save_hf', 1, die)",  # the loop is over, the model not yet written
    "before(os, 'replace', 4, die)",  # within the export
]


def kill_again_and_again(folder, data, kills, patch=""):
    """Kill a run, and each resume of it, at these places; return the newest state after each kill."""
    newest = []
    for kill in kills:
        code, out, err = end(start(*arguments(folder, data), patch=BEFORE_CALL + patch + kill))
        assert code == -signal.SIGKILL, (kill, code, out, err)
        newest.append(max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0))
    return newest


def test_kill_9_then_resume_is_bit_equal(unbroken, tmp_path):
    newest = kill_again_and_again(tmp_path / "out", unbroken[0], KILLS)
    assert newest == sorted(newest) and newest[0] == 0 and newest[-1] == STEPS, newest
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_kill_9_at_random_moments_then_resume_is_bit_equal(unbroken, tmp_path):
    """Again and again, some steps and some moments after the run has begun to write, until one gets through."""
    seed = time.time_ns() % 2**32
    print("seed", seed)
    generator, metrics = torch.Generator().manual_seed(seed), tmp_path / "out" / "metrics.jsonl"
    reached = []

    def n_steps():
        return metrics.read_bytes().count(b'"train"') if metrics.exists() else 0

    for _ in range(4):
        before = metrics.stat().st_ino if metrics.exists() else None
        process = start(*arguments(tmp_path / "out", unbroken[0]))
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_ino != before):
            time.sleep(0.01)  # a resumed run begins with a new metrics.jsonl
        steps = n_steps() + int(torch.randint(4, (), generator=generator)) + (not reached)
        while process.poll() is None and n_steps() < steps:
            time.sleep(0.01)
        time.sleep(0.1 * torch.rand(1, generator=generator).item())
        process.kill()
        if end(process)[0] == -signal.SIGKILL:
            reached.append(len(events(tmp_path / "out")))
    assert reached and 0 < max(reached) <= STEPS, reached
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


# One folder: each resume is stopped a little later, and the last state is that of the step in the third column.
STOPS = [
    ("SIGINT", "before(evaluation, 'evaluate', 1, term)", 0),
    ("SIGTERM", "before(saver, 'write_safetensors', 1, term)", 2),  # in a save
    ("SIGTERM", "before(Transformer, 'loss', 8, term)", 3),  # within step 4: as if it had not begun
    ("SIGINT", "before(packing, 'collate', 10, term)", None),
    ("SIGTERM", "before(evaluation, 'evaluate', 1, term)", 6),
    ("SIGHUP", "before(Transformer, 'loss', 6, term); before(saver, 'write_safetensors', 1, term)", 7),  # twice
]


def test_a_signal_saves_once_and_exits_143_and_the_run_goes_on_bit_equal(unbroken, tmp_path):
    for name, where, saved in STOPS:
        patch = BEFORE_CALL + where.replace("term", f"lambda: os.kill(os.getpid(), signal.{name})")
        code, out, err = end(start(*arguments(tmp_path / "out", unbroken[0]), patch=patch))
        assert code == 143, (where, code, out, err)
        assert f"stopped by {name} after step" in err and "Traceback" not in err
        saves = [line["step"] for line in events(tmp_path / "out", "save")]
        assert len(saves) == len(set(saves)) and (saved is None or saves[-1] == saved), (where, saves)
        assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "stopped"
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_a_signal_while_data_is_prepared_exits_143_at_once(unbroken, tmp_path):
    patch = BEFORE_CALL + "before(datasets, 'encode_rows', 1, term)"
    code, _, err = end(start(*arguments(tmp_path / "out", unbroken[0], "--token-cache", "off"), patch=patch))
    assert code == 143 and "before the first step; there is nothing to save" in err
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_a_second_signal_leaves_at_once_with_the_old_state_whole(unbroken, tmp_path):
    patch = (
        BEFORE_CALL
        + """
from engine.base.signals import Signals
def handle(self, *args, real=Signals.handle):
    real(self, *args)
    handled.append(1)
def term_twice():
    term()
    while not handled:
        time.sleep(0.01)
    term()
    time.sleep(60)
handled, Signals.handle = [], handle
before(saver, 'write_safetensors', 3, term_twice)
"""
    )
    began = time.monotonic()
    code, _, err = end(start(*arguments(tmp_path / "out", unbroken[0]), patch=patch))
    assert code == 1 and "SIGTERM again: leaving at once" in err and time.monotonic() - began < 58
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_a_closed_terminal_saves_and_the_run_goes_on_bit_equal(unbroken, tmp_path):
    """The terminal is gone before the signal comes: whatever is printed meanwhile and then must harm nothing."""
    master, slave = os.openpty()
    code = f"{PARTS_OF_A_RUN}\nsys.exit(run_main(finetune.main, sys.argv[1:]))"

    def own_terminal():
        fcntl.ioctl(slave, termios.TIOCSCTTY)

    args = [sys.executable, "-c", code, *arguments(tmp_path / "out", unbroken[0])]
    process = subprocess.Popen(
        args,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=own_terminal,
        env=environment(),
    )
    os.close(slave)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b'"train"') >= 3):
        if select.select([master], [], [], 0.01)[0]:
            os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(120) == 143
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "stopped"
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_under_nohup_a_hang_up_is_nothing(unbroken, tmp_path):
    patch = BEFORE_CALL + "before(Transformer, 'loss', 32, lambda: os.kill(os.getpid(), signal.SIGHUP))"
    patch = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + patch
    code, _, err = end(start(*arguments(tmp_path / "out", unbroken[0]), patch=patch))
    assert code == 0, err
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_a_full_disk_costs_a_save_not_the_run(unbroken, tmp_path):
    patch = (
        "def full(*args, **kwargs): raise OSError(28, 'No space left on device')\n"
        "real, calls = saver.write_safetensors, []\n"
        "def sometimes(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    return full() if len(calls) == 2 else real(*args, **kwargs)\n"
        "saver.write_safetensors = sometimes"
    )
    code, out, err = end(start(*arguments(tmp_path / "out", unbroken[0]), patch=patch))
    assert code == 0, err
    assert "warning: step 4: the state could not be saved (No space left on device)" in out
    assert [line["step"] for line in events(tmp_path / "out", "save")] == [2, 6, 8, 10, 12]
    assert_as_unbroken(tmp_path / "out", unbroken)


@pytest.mark.parametrize("save_every", ["2", "end"])
def test_a_full_disk_at_the_last_save_exits_1_with_the_state_intact(unbroken, tmp_path, save_every):
    arguments_ = [*arguments(tmp_path / "out", unbroken[0])]
    arguments_[arguments_.index("--save-every") + 1] = save_every
    patch = "def full(*args, **kwargs): raise OSError(28, 'No space left on device')\nsaving.save_hf = full"
    code, _, err = end(start(*arguments_, patch=patch))
    assert code == 1 and "Traceback" not in err
    assert "the model could not be written (No space left on device); the training state is saved" in err
    done = finetune(*arguments_)
    assert "going on after step 12" in done.stdout
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_too_little_disk_is_said_before_the_first_step(unbroken, tmp_path):
    patch = "from engine.output import folder; folder.shutil.disk_usage = lambda p: type('D', (), {'free': 10**6})"
    args = ["--random-init", *arguments(tmp_path / "out", unbroken[0])]
    args[args.index("--model") + 1] = "tiny"  # whose head alone is 12.6 MB
    code, _, err = end(start(*args, patch=patch))
    assert code == 2 and "about 0.1 GB are to be written and 0.0 GB are free there" in err


def test_a_finished_run_is_not_run_again(unbroken):
    before = (unbroken[1] / "model.safetensors").stat().st_mtime_ns
    done = finetune(*arguments(unbroken[1], unbroken[0]))
    assert "holds this run, finished" in done.stdout
    assert (unbroken[1] / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def stopped_once(unbroken, tmp_path_factory):
    """The output folder of a run stopped after step 6, which no test may change."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    patch = BEFORE_CALL + "before(Transformer, 'loss', 32, term)"
    assert end(start(*arguments(out, unbroken[0]), patch=patch))[0] == 143
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of the output folder of a run stopped after step 6."""
    return shutil.copytree(stopped_once, tmp_path / "out")


def test_changed_settings_and_data_are_refused_unless_allowed(unbroken, stopped, tmp_path):
    done = finetune(*arguments(stopped, unbroken[0], "--seed", 7, "--beta1", 0.8), check=False)
    assert done.returncode == 2
    assert "beta1: 0.9 -> 0.8; seed: 42 -> 7" in done.stderr and "--allow-changed" in done.stderr
    rows = json.loads(unbroken[0].read_text())
    rows[3]["output"] = "Changed."
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = finetune(*arguments(stopped, tmp_path / "rows.json"), check=False)
    assert done.returncode == 2 and "the data: its tokens have another sha256" in done.stderr
    done = finetune(*arguments(stopped, tmp_path / "rows.json", "--allow-changed"))
    assert "going on after step 6" in done.stdout


def test_what_does_not_change_the_maths_may_differ_on_resume(unbroken, stopped, tmp_path):
    moved = tmp_path / "elsewhere.json"
    moved.write_bytes(unbroken[0].read_bytes())
    finetune(*arguments(stopped, moved, "--sample-every", "end", "--log-every", 5, "--max-shard-bytes", 10**6))
    assert curve(stopped) == curve(unbroken[1])


def test_a_broken_newest_state_falls_back(unbroken, stopped):
    path = stopped / "checkpoint-6" / "state.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 64
    path.write_bytes(raw)
    done = finetune(*arguments(stopped, unbroken[0], "--resume", stopped / "checkpoint-6"), check=False)
    assert done.returncode == 3 and "checkpoint-6/state.safetensors: changed since it was written" in done.stderr
    done = finetune(*arguments(stopped, unbroken[0]))
    assert "passed over:" in done.stdout and "going on after step 4" in done.stdout
    assert_as_unbroken(stopped, unbroken)


def test_rewinding_to_an_older_state_takes_the_newer_ones_away(unbroken, tmp_path):
    """Else the way that was left would win at the next resume."""
    patch = BEFORE_CALL + "before(Transformer, 'loss', 39, term)"
    assert end(start(*arguments(tmp_path / "out", unbroken[0]), patch=patch))[0] == 143  # after step 8
    patch = BEFORE_CALL + "before(AdamW, 'step', 1, term)"
    args = arguments(tmp_path / "out", unbroken[0], "--resume", tmp_path / "out" / "checkpoint-6")
    assert end(start(*args, patch=patch))[0] == 143
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    finetune(*arguments(tmp_path / "out", unbroken[0]))
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_a_state_of_elsewhere_starts_a_folder_of_its_own(unbroken, stopped, tmp_path):
    state = stopped / "checkpoint-4"
    finetune(*arguments(tmp_path / "new", unbroken[0], "--resume", state))
    assert (
        load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(unbroken[1] / "model.safetensors").keys()
    )
    assert curve(tmp_path / "new") == curve(unbroken[1])[4:]
    done = finetune(*arguments(tmp_path / "new", unbroken[0], "--resume", state), check=False)
    assert done.returncode == 2 and "has states of its own that it would replace" in done.stderr


def test_resume_never_starts_over(unbroken, stopped):
    done = finetune(*arguments(stopped, unbroken[0], "--resume", "never"))
    assert "going on" not in done.stdout
    assert_as_unbroken(stopped, unbroken)


def test_a_folder_that_holds_something_else_is_left_alone(unbroken, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / ".lock").write_text("somebody's")
    done = finetune(*arguments(tmp_path, unbroken[0]), check=False)
    assert done.returncode == 2 and "holds thesis.tex and no run.json of ours" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "thesis.tex"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(unbroken, tmp_path):
    (tmp_path / "file").write_text("")
    done = finetune(*arguments(tmp_path / "file" / "out", unbroken[0]), check=False)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "data:" not in done.stdout


def test_two_runs_cannot_share_a_folder(unbroken, tmp_path):
    go = tmp_path / "go"
    patch = f"""
def wait():
    while not os.path.exists({str(go)!r}):
        time.sleep(0.01)
before(step.Steps, 'compute_gradients', 2, wait)
"""
    first = start(*arguments(tmp_path / "out", unbroken[0]), patch=BEFORE_CALL + patch)
    try:
        while not (tmp_path / "out" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        second = finetune(*arguments(tmp_path / "out", unbroken[0]), check=False)
        assert second.returncode == 2 and "another run is writing there" in second.stderr
    finally:
        go.touch()
        code, _, err = end(first)
    assert code == 0, err
    assert_as_unbroken(tmp_path / "out", unbroken)


AHEAD = "plan.Plan.runs_ahead = True\n"  # as on a GPU: a step is told when the next has been given to the device


def test_a_host_that_runs_ahead_tells_the_same(unbroken, tmp_path):
    code, out, err = end(start(*arguments(tmp_path / "out", unbroken[0]), patch=AHEAD))
    assert code == 0, (out, err)
    assert_as_unbroken(tmp_path / "out", unbroken)


def test_a_host_that_runs_ahead_is_killed_and_stopped_and_resumed_bit_equal(unbroken, tmp_path):
    out = tmp_path / "out"
    kills = (
        "before(Transformer, 'loss', 12, die)",
        "before(AdamW, 'step', 4, die)",
        "before(loop, 'report_step', 3, die)",
    )
    kill_again_and_again(out, unbroken[0], kills, patch=AHEAD)
    for where in (
        "before(Transformer, 'loss', 8, term)",
        "before(loop, 'evaluate_if_due', 3, term)",  # between the step's own look for signals and the last one
    ):
        code, said, err = end(start(*arguments(out, unbroken[0]), patch=BEFORE_CALL + AHEAD + where))
        (last,) = re.findall(r"stopped by SIGTERM after step (\d+)", err)
        assert code == 143 and [line["step"] for line in events(out)] == list(range(1, int(last) + 1)), (said, err)
    finetune(*arguments(out, unbroken[0]))
    assert_as_unbroken(out, unbroken)


@pytest.mark.parametrize("ahead", ["", AHEAD], ids=["told at once", "told late"])
def test_a_loss_that_is_no_number_changes_nothing_and_ends_the_run_with_4(unbroken, tmp_path, ahead):
    patch = ahead + (
        "real, calls = step.Steps.compute_gradients, []\n"
        "def poisoned(*args):\n"
        "    batch, loss = real(*args)\n"
        "    calls.append(1)\n"
        "    return batch, loss * float('nan') if len(calls) in (2, 4, 5, 6) else loss\n"
        "step.Steps.compute_gradients = poisoned"
    )
    code, out, err = end(start(*arguments(tmp_path / "out", unbroken[0], "--max-skips", 2), patch=patch))
    assert code == 4, (out, err)
    assert "step 6: 3 steps in a row had no finite loss or gradient" in err and "rows.json:" in err
    skipped = events(tmp_path / "out", "skip")
    assert [line["step"] for line in skipped] == [2, 4, 5, 6] and len(skipped[0]["rows"]) == 8
    manifest = json.loads((tmp_path / "out" / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["n_updates"] == 2, "a step that was left out is no update: AdamW's corrections go by it"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


# Losses of some steps are told as if they were twice as high; few steps are enough to compare with.
SPIKY = """
from engine.training import loss_spikes as spikes
spikes.LEAST, real_pass = 4, step.Steps.compute_gradients
def spiky(self, n, lr):
    batch, loss = real_pass(self, n, lr)
    return batch, loss * 2 if n in STEPS else loss
step.Steps.compute_gradients = spiky
"""


def test_a_loss_spike_is_told_with_its_rows_and_changes_nothing(unbroken, tmp_path):
    code, out, err = end(start(*arguments(tmp_path / "out", unbroken[0]), patch=SPIKY.replace("STEPS", "(7, 8)")))
    assert code == 0 and out.count("is a spike: the median was") == 1, (out, err)
    (spike,) = events(tmp_path / "out", "spike")
    assert spike["step"] == 7 and spike["back_to"] is None and len(spike["rows"]) == 8
    assert spike["loss"] > spike["median"] + 6 * spike["deviation"] > 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", unbroken[1]))
    assert all(ours[k].equal(theirs[k]) for k in ours)


def test_a_loss_spike_is_undone_on_request(unbroken, tmp_path):
    """Back to the state of step 6 and on with step 9, as if 7 and 8 had had no finite loss; killed or not."""
    nan = (
        "real = step.Steps.compute_gradients\n"
        "def poisoned(self, n, lr):\n"
        "    batch, loss = real(self, n, lr)\n"
        "    return batch, loss * float('nan') if n in (7, 8) else loss\n"
        "step.Steps.compute_gradients = poisoned"
    )
    assert end(start(*arguments(tmp_path / "nan", unbroken[0]), patch=nan))[0] == 0
    theirs = load_file(tmp_path / "nan" / "model.safetensors")
    spiky = SPIKY.replace("STEPS", "(8,)")
    for name, kill in (("through", ""), ("killed", "before(saving.Checkpoints, 'save', 4, die)")):
        args = arguments(tmp_path / name, unbroken[0], "--spike-rollback")
        code, out, err = end(start(*args, patch=BEFORE_CALL + spiky + kill))
        assert "back to the state of step 6, the rows of 2 steps are left out" in out, (out, err)
        if kill:
            assert code == -signal.SIGKILL
            code, _, err = end(start(*args, patch=spiky))
        assert code == 0, err
        ours = load_file(tmp_path / name / "model.safetensors")
        assert all(ours[k].equal(theirs[k]) for k in theirs)
        assert [line["back_to"] for line in events(tmp_path / name, "spike")] == [6]
        assert [line["step"] for line in events(tmp_path / name)] == list(range(1, STEPS + 1))


def test_spikes_in_a_row_that_going_back_does_not_end_end_the_run_with_4(unbroken, tmp_path):
    args = arguments(tmp_path / "out", unbroken[0], "--spike-rollback", "--max-skips", 1)
    code, out, err = end(start(*args, patch=SPIKY.replace("STEPS", "(6, 8, 9)")))
    assert code == 4 and "step 9: the loss spiked 2 times in a row after the state of step 8" in err, (out, err)
    assert "rows.json:" in err and [line["back_to"] for line in events(tmp_path / "out", "spike")] == [4, 6, 8]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[]", "no rows"),
        ('[{"instruction": "a"}]', "rows.json:1"),
        ('[{"instruction": "a", "output": 3}]', "output"),
        ('[{"instruction": "a", "instruction": "b", "output": "c"}]', "instruction"),
        (
            '[{"instruction": "' + "long " * 600 + '", "output": "short"}]',
            "no example is left of 1 rows: 1 had no response",
        ),
    ],
)
def test_bad_data_exits_3(tmp_path, rows, message):
    (tmp_path / "rows.json").write_text(rows)
    done = finetune("--model", small_model(), "--data", tmp_path / "rows.json", "--out", tmp_path / "o", check=False)
    assert done.returncode == 3 and message in done.stderr and "Traceback" not in done.stderr


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, rows_file):
    rows = json.loads(rows_file.read_text())
    rows[5]["output"] = None
    rows_file.write_text("[\n\n" + ",\n".join(map(json.dumps, rows)) + "]")
    done = finetune(
        "--model", small_model(), "--data", rows_file, "--out", tmp_path / "o", "--skip-bad-rows", "--max-steps", 1,
    )  # fmt: skip
    assert "1 bad rows skipped" in done.stdout and "rows.json:8: row 6: output: got null" in done.stdout
    assert json.loads((tmp_path / "o" / "run.json").read_text())["data"]["skipped"] == 1


def test_the_reference_path_is_said_once(tmp_path, rows_file):
    done = finetune("--model", small_model(), "--data", rows_file, "--out", tmp_path / "o", "--max-steps", 2)
    assert done.stdout.count("kernels: ref") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_not_silently_the_cpu(tmp_path, rows_file):
    done = finetune(
        "--model", small_model(), "--data", rows_file, "--out", tmp_path / "o", "--device", "cuda", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_allocated(smollm2, tmp_path, rows_file):
    done = finetune(
        "--model", "tinyllama-1.1b", "--random-init", "--tokenizer", smollm2, "--data", rows_file,
        "--out", tmp_path / "o", check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "has 49152 tokens, the model embeds 32000" in done.stderr


def test_several_ranks_that_nobody_started_are_refused(tmp_path, rows_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = finetune("--model", small_model(), "--data", rows_file, "--out", tmp_path / "o", check=False)
    assert (
        done.returncode == 2 and "LOCAL_RANK is None, wanted a number: start several ranks by torchrun" in done.stderr
    )


def test_another_model_of_the_same_shape_is_another_run(tmp_path, rows_file):
    """A finished run in --out is neither taken for this one nor overwritten."""
    settings = "--data", rows_file, "--out", tmp_path / "o", "--max-steps", 1, "--device", "cpu"
    finetune("--model", small_model(), *settings)
    finetune("--model", small_model(), "--data", rows_file, "--out", tmp_path / "base", "--max-steps", 2)
    for more in ((), ("--allow-changed",)):
        done = finetune("--model", tmp_path / "base", *settings, *more, check=False)
        assert done.returncode == 2
        assert f"holds a finished run with other settings (model: {small_model()} -> " in done.stderr


def test_a_model_that_is_not_there(tmp_path, rows_file):
    done = finetune("--model", tmp_path / "gone", "--data", rows_file, "--out", tmp_path / "o", check=False)
    assert done.returncode == 3 and "gone: no such folder or file" in done.stderr
    assert not (tmp_path / "o").exists()


# ---- memory ---------------------------------------------------------------------------------------------------------

# A card on which a second forward of more than LIMIT tokens in a step finds no memory beside the first one's gradients.
SMALL_CARD = """
real = Transformer.loss
def loss(model, batch, *seed):
    if len(batch.tokens) > LIMIT and model.norm.grad is not None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more.")
    return real(model, batch, *seed)
Transformer.loss = loss
"""


def on_a_small_card(unbroken, out, limit, *more, patch=""):
    args = [
        "--model", small_model(), "--data", unbroken[0], "--out", out, "--epochs", 3, "--lr", "1e-3",
        "--global-batch-size", 26, "--device", "cpu", "--max-length", 128, *more,
    ]  # fmt: skip
    return end(start(*args, patch=SMALL_CARD.replace("LIMIT", str(limit)) + patch))


def test_out_of_memory_halves_the_micro_batch_once_says_so_and_goes_on(unbroken, tmp_path):
    budget = "--micro-batch-tokens", 400
    code, out, err = on_a_small_card(unbroken, tmp_path / "roomy", 10**9, *budget)
    assert code == 0 and "out of memory" not in out, (out, err)
    assert events(tmp_path / "roomy")[0]["computed_tokens"] > 400, "there must be several micro-batches"
    code, out, err = on_a_small_card(unbroken, tmp_path / "small", 220, *budget)
    assert code == 0, (out, err)
    assert out.count("out of memory with micro-batches of 400 tokens") == 1
    assert "Tried to allocate 2.00 GiB); going on with 200" in out.replace("\n", " ")
    for a, b in zip(events(tmp_path / "small"), events(tmp_path / "roomy"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], 1e-4)
    facts = json.loads((tmp_path / "small" / "run.json").read_text())["facts"]
    assert facts["max_tokens"] == 200


def test_out_of_memory_again_ends_the_run_with_what_would_help(unbroken, tmp_path):
    code, _, err = on_a_small_card(unbroken, tmp_path / "out", 100, "--micro-batch-tokens", 400)
    assert code == 1 and "Traceback" not in err
    assert "out of memory with micro-batches of 200 tokens" in err and "lower --micro-batch-tokens" in err


def test_out_of_memory_never_changes_the_mean_of_means(unbroken, tmp_path):
    more = "--micro-batch-tokens", 400, "--loss-norm", "micro-mean"
    code, _, err = on_a_small_card(unbroken, tmp_path / "out", 220, *more)
    assert code == 1 and "out of memory with micro-batches of 400 tokens" in err


def test_the_largest_micro_batch_is_tried_before_the_first_step(unbroken, tmp_path):
    """As on a GPU, whose memory a CPU stands in for: too large a one is halved there, and then fits."""
    gpu = """
sizes = []
torch.cuda.max_memory_allocated = lambda device: 3 << 30
torch.cuda.mem_get_info = lambda device: (0, 80 << 30)
torch.cuda.reset_peak_memory_stats = lambda device: None
at_start, make_size = fine_tuning.evaluate_if_due, fine_tuning.MicroBatchSize
def keep_size(*args):
    sizes.append(make_size(*args))
    return sizes[-1]
def evaluate_if_due(plan, run, states, model, n):
    if n == 0:
        sizes[0].try_largest(model, states.optimizer)
        assert all(p.grad is None for p in model.parameters())
    at_start(plan, run, states, model, n)
fine_tuning.evaluate_if_due, fine_tuning.MicroBatchSize = evaluate_if_due, keep_size
"""
    code, out, err = on_a_small_card(unbroken, tmp_path / "out", 220, "--micro-batch-tokens", 400, patch=gpu)
    assert code == 0, (out, err)
    assert out.index("going on with 200") < out.index("micro-batches of 200 tokens take 3.00 of 80.00 GiB")
    assert out.count("out of memory with") == 1 and out.index("take 3.00") < out.index("step 1/")


def test_out_of_memory_after_updates_within_backward_ends_the_run(unbroken, tmp_path):
    """A step that has begun to change weights cannot be taken again."""
    patch = """
def fail(grad):
    if grad is not None and len(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more.")
calls, real_begin = [], AdamW.begin_in_backward
def begin(optimizer, lr, loss):
    calls.append(1)
    if len(calls) == 2:
        optimizer.params["layers.0.wo"].register_hook(fail)
    real_begin(optimizer, lr, loss)
AdamW.begin_in_backward = begin
"""
    args = "--micro-batch-tokens", 2000, "--optimizer-in-backward", "--grad-clip", 0
    code, _, err = on_a_small_card(unbroken, tmp_path / "out", 10**9, *args, patch=patch)
    assert code == 1 and "--optimizer-in-backward had begun" in err and "Traceback" not in err, err


@pytest.mark.parametrize("ahead", ["", AHEAD], ids=["told at once", "told late"])
def test_updates_within_backward_are_the_same_run(unbroken, tmp_path, ahead):
    ends = []
    for more in ((), ("--optimizer-in-backward",)):
        out = tmp_path / f"out{len(more)}"
        args = "--micro-batch-tokens", 2000, "--grad-clip", 0, *more
        code, _, err = on_a_small_card(unbroken, out, 10**9, *args, patch=ahead)
        assert code == 0, err
        ends.append((curve(out, keys=("step", "loss")), load_file(out / "model.safetensors")))
    assert ends[0][0] == ends[1][0] and all(t.equal(ends[1][1][name]) for name, t in ends[0][1].items())
