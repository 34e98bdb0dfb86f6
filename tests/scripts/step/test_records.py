"""Records of a process that measures: failures, time, and sizes that are halved."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts.step import bench, breakdown, peers, ranks, records
from scripts.step.records import TooLarge, halve_until_it_fits


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path):
    file = records.Records(tmp_path / "r.json")
    file.attempt("a", lambda: 1 / 0)
    file.attempt("b", lambda: {"last_loss": float("nan"), "kinds": {"a": np.float32(2)}})
    with pytest.raises(RuntimeError):  # the device can be used no more
        file.attempt("c", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))
    file.deadline = 0
    file.attempt("d", lambda: pytest.fail("began after the time"))
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert [r["name"] for r in found["records"]] == ["a", "b", "c"] and found["left_out"] == ["d"]
    assert found["records"][0]["failed"] == "ZeroDivisionError: division by zero"
    assert found["records"][1]["last_loss"] is None and "CUDA error" in found["records"][2]["failed"]


def test_other_allocators_want_of_memory_is_known():
    for error, is_it in (
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True), (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False), (ValueError("x"), False),
    ):  # fmt: skip
        assert records.is_out_of_memory(error) == is_it
    with pytest.raises(ValueError, match="other"):
        halve_until_it_fits(8, 1, lambda size: (_ for _ in ()).throw(ValueError("other")))


@pytest.mark.parametrize("fits", [8, 5, 4, 2, 1])
def test_a_size_is_halved_until_it_fits_and_the_least_one_is_tried(fits):
    tried = []

    def measure(size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate")
        return {"size": size}

    sizes = [size for size in (8, 4, 2) if size > fits]
    if fits < 2:
        with pytest.raises(TooLarge, match="out of memory at 8, 4, 2: out of memory"):
            halve_until_it_fits(8, 2, measure)
    else:
        found = halve_until_it_fits(8, 2, measure)
        assert found.pop("out_of_memory_at", []) == sizes and found == {"size": max(s for s in (8, 4, 2) if s <= fits)}
    assert tried == [size for size in (8, 4, 2) if size > fits or size * 2 > fits]


@pytest.mark.parametrize(
    ("module", "measure"),
    [(bench, "measure_variant"), (breakdown, "measure_breakdown"), (peers, "measure_peer"), (ranks, "VARIANTS")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_flag_of_a_measuring_process_reaches_its_measurement(module, measure, monkeypatch, tmp_path):
    names = {bench: bench.VARIANTS, breakdown: breakdown.PROFILED, peers: peers.PEERS, ranks: ranks.VARIANTS}[module]
    wanted, measured, made = list(names)[-2:], [], []

    class Stand(records.Records):
        def __init__(self, path=None, minutes=None):
            made.append((path, minutes))
            super().__init__(None, minutes)

    def note(*args, smoke=None, is_time_up=None):
        measured.append((*args, smoke, is_time_up))
        return {"name": "x"}

    monkeypatch.setattr(module, "Records", Stand)
    if module is ranks:
        of = {name: lambda name=name, **how: note(name, **how) for name in names}
        monkeypatch.setattr(ranks, "VARIANTS", of)
    else:
        monkeypatch.setattr(module, measure, note)
    monkeypatch.setattr(module, "format_part", lambda result: [], raising=False)
    monkeypatch.setattr(records, "free_memory", lambda: None)
    module.main(["--only", *wanted, "--json", str(tmp_path / "x"), "--minutes", "7", "--smoke"])
    assert made == [(str(tmp_path / "x"), 7.0)]
    first = [bench.VARIANTS[name] for name in wanted] if module is bench else wanted
    assert [call[0] for call in measured] == first and all(True in call for call in measured)
    told = [value for value in measured[0] if callable(value)]
    assert module is breakdown or (len(told) == 1 and told[0]() is False)
    with pytest.raises(SystemExit):
        module.main(["--only", "nothing", "--smoke"])


def test_without_only_everything_is_measured():
    assert records.parse_arguments("x", "doc", ["a", "b"], ["--smoke"]).only == ["a", "b"]


def test_a_record_has_the_seconds_it_took(monkeypatch):
    now = iter([3.0, 8.0])
    monkeypatch.setattr(records, "time", SimpleNamespace(monotonic=lambda: next(now)))
    file = records.Records.__new__(records.Records)
    file.path, file.result, file.may_begin = None, {"records": []}, lambda name: True
    file.attempt("a", lambda: {"b": 1})
    assert file.result["records"] == [{"name": "a", "b": 1, "seconds": 5.0}]


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("\n first line\nsecond"), "ValueError: first line"), (ValueError(""), "ValueError: "),
     (ValueError("x" * 400), "ValueError: " + "x" * 300),
     (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
      "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")],
)  # fmt: skip
def test_a_failure_is_told_by_its_first_line_and_want_of_memory_ends_no_process(error, said, monkeypatch, capsys):
    freed = []
    monkeypatch.setattr(records, "free_memory", lambda: freed.append(1))

    def fail():
        raise error

    file = records.Records()
    file.attempt("a", fail)
    (record,) = file.result["records"]
    assert record["failed"] == said and freed == [1]
    out, err = capsys.readouterr()
    assert out == f"  a{' ' * 61}failed: {said}\n" and "Traceback" in err


def test_flags_of_a_measuring_process(monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(records, "GPU", True)
    found = records.parse_arguments("x.y", "Doc.\nMore.", ["a", "b"], ["--minutes", "2.5", "--only", "b"])
    assert vars(found) == {"only": ["b"], "json": None, "minutes": 2.5, "smoke": False} and not threads
    monkeypatch.setattr(records, "GPU", False)
    assert records.parse_arguments("x.y", "Doc.\nMore.", ["a", "b"], ["--smoke"]).minutes is None and threads == [1]
    for flags, said in (([], "no GPU is visible to torch"), (["--smoke", "--minutes", "nan"], "--minutes")):
        with pytest.raises(SystemExit):
            records.parse_arguments("x.y", "Doc.\nMore.", ["a", "b"], flags)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        records.parse_arguments("x.y", "Doc.\nMore.", ["a", "b"], ["--help"])
    said = capsys.readouterr().out
    assert "usage: python -m x.y" in said and "Doc." in said and "More." not in said and "of a; b" in said
