"""Pictures are of a result of kernels.bench, or of that in a GPU report."""

import json

import pytest

from scripts.pages import plots

BENCH = {"records": [1], "machine": "m", "ceilings": {"gbps": 3}}


@pytest.mark.parametrize("ceilings", [{"gbps": 5}, None])
def test_a_report_is_drawn_with_its_ceilings_or_those_of_its_first_benchmark(
    ceilings, monkeypatch, tmp_path, call_main
):
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda result, folder: drawn.append((result, folder)) or [])
    parts = {"kernels": {"records": [1], "ceilings": {"a": {"gbps": 3}, "b": {"gbps": 4}}}, "machine": "m"}
    report = {"parts": parts | ({"ceilings": ceilings} if ceilings else {})}
    for name, data in (("bench", BENCH), ("report", report)):
        (tmp_path / name).write_text(json.dumps(data))
        call_main(plots, tmp_path / name, "--out", tmp_path / "img")
    assert [folder for _, folder in drawn] == [str(tmp_path / "img")] * 2 and drawn[0][0] == BENCH
    assert drawn[1][0] == BENCH | {"ceilings": ceilings or {"gbps": 3}}
    with pytest.raises(ValueError, match="the report holds no kernel benchmarks"):
        plots.read_benchmarks({"parts": {"kernels": {}}})


def test_help_tells_what_is_drawn(call_main, capsys):
    assert call_main(plots, "--help") == 0
    assert plots.__doc__.strip().splitlines()[0] in capsys.readouterr().out


def test_the_pictures_that_were_drawn_are_told(monkeypatch, tmp_path, call_main, capsys):
    given = []
    monkeypatch.setattr(plots, "draw", lambda result, folder: given.append((result, folder)) or ["a.svg", "b.svg"])
    (tmp_path / "bench").write_text(json.dumps(BENCH))
    assert not call_main(plots, tmp_path / "bench")
    assert capsys.readouterr().out == "a.svg\nb.svg\n" and given == [(BENCH, "docs/img")]
    assert call_main(plots) == 2
