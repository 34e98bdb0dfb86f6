"""The demo with all weights, with LoRA and with QLoRA."""

import json
import re

from scripts.speed import demo_adapter
from tests.helpers.calls import Calls
from tests.helpers.run import ROOT


def test_each_kind_of_the_demo_trains_what_it_names_and_is_a_share_of_all_weights(monkeypatch, tmp_path, call_main):
    given = []

    def take_run(out, flags):
        given.append(flags)
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"config": {"dtype": "auto"}, "facts": {"dtype": "bfloat16"}}))
        return {"equal": [1]}

    monkeypatch.setattr(demo_adapter, "take_run", take_run)
    lines = [{"event": "train", "peak_memory_bytes": n} for n in (5, 9, 7)] + [{"event": "eval"}]
    monkeypatch.setattr(demo_adapter, "read_metrics", lambda path: lines)
    call_main(demo_adapter, "--json", tmp_path / "x", "--seeds", 2)
    found = json.loads((tmp_path / "x").read_text())
    assert [flags[1] if flags[0] == "--adapter" else "none" for flags in given] == [*demo_adapter.ADAPTERS] * 2
    assert [flags[-2:] for flags in given] == [["--seed", str(seed)] for seed in (0, 0, 0, 1, 1, 1)]
    assert given[0] == ["--seed", "0"] and given[3] == ["--seed", "1"]  # all weights, at their own learning rate
    state = {run["adapter"]: run["state_bytes"] for run in found["runs"]}
    assert 0.1 * state["none"] < state["lora"] < 0.5 * state["none"] and state["qlora"] < state["lora"]
    makefile = (ROOT / "Makefile").read_text()
    for flags in given:  # as `make demo` has them
        assert flags[0] == "--seed" or " ".join(flags[:-2]).replace(flags[1], "$(ADAPTER)") in makefile
    assert all(run["peak_bytes"] == 9 for run in found["runs"])
    assert all(run["dtype"] == "bfloat16" for run in found["runs"])
    weights = 134_515_008  # SmolLM2-135M: weights and gradients in bf16, fp32 masters as 2 bytes more, m and v in fp32
    assert found["runs"][0]["state_bytes"] == weights * (2 + 2 + 2 + 8)


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    calls = Calls()

    def take_run(out, flags):
        out.mkdir()
        (out / "run.json").write_text(json.dumps({"facts": {"dtype": "float32"}}))
        return {"equal": [len(flags)]}

    trains = [{"event": "train", "peak_memory_bytes": n} for n in (5, 9, 7)]
    lines = [*trains, {"event": "eval", "peak_memory_bytes": 11}]
    monkeypatch.setattr(demo_adapter, "take_run", calls.stand_in("take_run", take_run))
    monkeypatch.setattr(demo_adapter, "read_metrics", calls.stand_in("read_metrics", lines))
    assert tell(demo_adapter, "--seeds", 1) == snapshot
    log = re.sub(r"PosixPath\('/.*?([^/]*(?:/metrics.jsonl)?)'\)", r"\1", calls.text())
    assert log == snapshot(name="calls")


def test_flags_have_defaults(defaults_of):
    assert defaults_of(demo_adapter, "--json", "x") == {"json": "x", "seeds": 3}
