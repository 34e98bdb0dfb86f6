"""The demo over several seeds, beside the demo of before."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from scripts.speed import demo
from tests.helpers.calls import Calls
from tests.helpers.clocks import Ticks


def usage(user, system):
    return SimpleNamespace(ru_utime=user, ru_stime=system)


def test_a_run_of_the_demo_is_told_by_its_own_seconds_and_its_held_out_figures(monkeypatch, tmp_path):
    usages, asked = iter([usage(100.0, 10.0), usage(130.0, 12.06)]), []
    Ticks(monkeypatch, demo)
    of = SimpleNamespace(getrusage=lambda who: asked.append(who) or next(usages), RUSAGE_CHILDREN=-1)
    monkeypatch.setattr(demo, "resource", of)
    calls = Calls()
    monkeypatch.setattr(demo.subprocess, "run", calls.stand_in("run"))
    lines = [{"event": "eval", "loss": 0.8}, {"event": "score", "equal": 1, "answers": 24, "overlap": 0.1},
             {"event": "train", "loss": 9.0}, {"event": "train", "loss": 8.0}, {"event": "eval", "loss": 0.2},
             {"event": "score", "equal": 19, "answers": 25, "overlap": 0.9}]  # fmt: skip
    monkeypatch.setattr(demo, "read_metrics", lambda path: lines if path == tmp_path / "metrics.jsonl" else None)
    expected = {
        "seconds": 16.2, "cpu_seconds": 32.1, "loss": [0.8, 0.2], "equal": [1, 19], "answers": 24,
        "overlap": [0.1, 0.9], "steps": 2,
    }  # fmt: skip
    assert demo.take_run(tmp_path, ["--seed", "3"]) == expected and asked == [-1, -1]
    command = [sys.executable, "-m", "engine.finetune", "--resume", "never", "--out", str(tmp_path), "--seed", "3"]
    assert calls.lines == [f"run({command}, check=True, stdout={demo.subprocess.DEVNULL})"]
    lines[:] = lines[2:3]
    usages = iter([usage(0.0, 0.0)] * 2)
    assert demo.take_run(tmp_path, [])["answers"] == 0


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_each_run_of_the_demo_has_its_seed_and_stands_over_the_demo_of_before(seeds, monkeypatch, tmp_path, call_main):
    given = []

    def take_run(out, flags):
        given.append(flags)
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"config": {"dtype": "bf16"}}))
        return {"cpu_seconds": 30.0 if "--seed" in flags else 40.0}

    monkeypatch.setattr(demo, "take_run", take_run)
    call_main(demo, "--json", tmp_path / "x", "--seeds", seeds)
    assert [flags[1] for flags in given if flags[0] == "--seed"] == [str(seed) for seed in range(seeds)]
    (before,) = [flags for flags in given if flags[0] != "--seed"]
    assert before[-2:] == ["--dtype", "bf16"] and "seed-tasks" in before
    found = json.loads((tmp_path / "x").read_text())
    assert found["cpu_ratio"]["median"] == 0.75 and len(found["runs"]) == seeds


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    calls, seconds = Calls(), iter([30.0, 36.0, 40.0, 48.0])

    def take_run(out, flags):
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"config": {"dtype": "bf16"}}))
        return {"cpu_seconds": next(seconds)}

    monkeypatch.setattr(demo, "take_run", calls.stand_in("take_run", take_run))
    assert tell(demo, "--seeds", 3) == snapshot
    log = re.sub(r"PosixPath\('[^']*/(.*?)'\)", r"\1", calls.text())
    assert log == snapshot(name="calls")


def test_flags_have_defaults(defaults_of):
    assert defaults_of(demo, "--json", "x") == {"json": "x", "seeds": 5}
