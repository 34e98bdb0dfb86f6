"""The generated pages say what their files say: worst results, failures and findings too, though there are none now."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest

from scripts.pages import (
    adapters,
    cards,
    data,
    decoding,
    faults,
    kernels,
    nf4,
    picture,
    plots,
    ranks,
    serving,
    without_gpu,
)
from tests.helpers.run import ROOT


def read(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


@pytest.mark.parametrize("module", [kernels, cards, ranks, picture], ids=lambda module: module.__name__.split(".")[-1])
def test_a_page_that_says_something_else_is_told(module, tmp_path, monkeypatch, call_main):
    """And one that is as it would be written is left alone."""
    for name in ("page", "render", "render_cuda"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *_: "text")
    monkeypatch.setattr(module, "picture", lambda theme: "text", raising=False)
    if module is picture:
        monkeypatch.setattr(picture, "FOLDER", tmp_path)
        files = [tmp_path / f"overview-{theme}.svg" for theme in picture.THEMES]
    else:
        monkeypatch.setattr(module, "DOC", tmp_path / "page.md")
        files = [module.DOC]
    assert call_main(module, "--check")  # there is none
    call_main(module)
    written = [file.read_text() for file in files]
    assert not call_main(module, "--check")
    for file in files:
        file.write_text("other")
        assert call_main(module, "--check") and file.read_text() == "other"
        file.write_text(written[0])


def test_the_page_of_kernels_is_what_the_records_say(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels", "--check"])
    kernels.main()


def test_the_page_of_cards_is_what_the_estimate_says():
    """Of one card; it takes as long for each."""
    page = cards.DOC.read_text()
    card = cards.find_card("RTX-4090")
    for model in cards.SHAPES[:2]:
        for adapter in cards.KINDS:
            assert cards.row(card, model, adapter) in page


@pytest.mark.parametrize("least", [False, True])
def test_a_card_gets_the_fastest_setting_that_fits_it_and_the_host(least, monkeypatch):
    def outcome(speed, host):
        return SimpleNamespace(memory=SimpleNamespace(host=host), projection=SimpleNamespace(tokens_per_s=speed))

    fits = [outcome(5, 0), outcome(9, 2 * cards.HOST_BYTES), outcome(7, cards.HOST_BYTES)]
    found = iter([
        SimpleNamespace(fits=True, outcome=fits[0], alternatives=[outcome(99, 0)]),
        SimpleNamespace(fits=False, outcome=outcome(99, 0), alternatives=fits[1:] if not least else []),
    ])  # fmt: skip
    monkeypatch.setattr(cards, "estimate_run", lambda *_: next(found))
    assert cards.take_fastest(cards.find_card("RTX-4090"), "llama-7b", "none") is fits[0 if least else 2]


def test_findings_and_the_worst_error_of_any_record_are_shown():
    records = [
        {"chip": chip, "triton": triton, "dtype": "bfloat16", "error": ratio, "torch_error": 1.0, "ratio": ratio,
         "n_findings": n, "wrong": ["x"] * n, "op": "rope", "case": "a", "worst": "dx",
         "kernels": [{"kernel": "k", "instructions": i, "load_bytes": 32, "load_sectors": 1, "store_bytes": 0,
                      "store_sectors": 0, "shared_cycles": 0, "shared_ideal_cycles": 0}]}
        for chip, triton, ratio, n, i in (("sm_80", "3.9.0", 0.5, 0, 1000), ("sm_90", "3.10.0", 1.5, 2, 2000),
                                          ("sm_80", "3.10.0", 0.7, 1, 3000))
    ]  # fmt: skip
    row = kernels.format_simulated_row("a", records, "3.10.0")
    assert "| 1.5 / 1 | 3 | 3 / 2 |" in row
    lines = kernels.render_simulated("rope", {"versions": {"3.9.0": {}, "3.10.0": {}}, "records": records})
    assert lines[-1] == row  # 3.10 is newer than 3.9
    page = "\n".join(without_gpu.simulated({"records": records, "versions": {}}))
    assert (
        "| results beyond that | 3 |" in page
        and "| findings: races, missing waits, accesses out of bounds | 3 |" in page
    )


def test_spills_of_any_chip_and_version_are_shown():
    record = {"kernel": "_a_kernel", "case": "c", "tile": {}, "num_warps": 1, "num_stages": 1, "instructions": 1,
              "alu": 1,
              "registers": 1, "shared_bytes": 0, "programs_per_sm": 1, "matrix": {}, "wide": 1, "narrow": 0,
              "bytes_per_element": 1.0, "from": "static", "spills": 0}  # fmt: skip
    group = {"1.0": {"sm_80": record, "sm_90": record | {"spills": 77}}, "2.0": {"sm_80": record}}
    assert "| 77 |" in kernels.format_row(group, ["1.0", "2.0"])


def test_a_wrong_feature_is_no_right_one():
    lines = [{"client": "a", "feature": feature, "right": feature != "c"} for feature in "bcd"]
    assert "| a | 2 of 3 | b, c, d |" in serving.clients({"lines": lines, "versions": {}})


def test_the_peer_of_serving_is_the_fastest():
    def figures(speed, ratio):
        return {"tokens_per_s": {"median": speed}, "ours_over_it": dict.fromkeys(("median", "min", "max"), ratio)}

    servers = {"slow": figures(10.0, 6.0), "cria": figures(60.0, 1.0), "fast": figures(30.0, 2.0)}
    assert serving.serving_row({"servers": servers, "what": "9 requests"})[1:] == (
        "60", "30 (fast)", "2.00 (2.00 to 2.00)"
    )  # fmt: skip


@pytest.mark.parametrize("what", ["dedup", "data_gen", "data_servers"])
def test_what_must_not_be_is_not_published(what):
    figures = copy.deepcopy(read(what))
    assert getattr(data, what)(figures)
    if what == "dedup":
        figures["all_pairs"]["same_decisions"] = False
    elif what == "data_gen":
        figures["identical"] = False
    else:
        list(figures["servers"].values())[-1]["recorded_and_sent_again"] = 1
    with pytest.raises(AssertionError):
        getattr(data, what)(figures)


def test_a_bill_stands_beside_the_usages_and_a_kill_beside_what_it_sent_again():
    servers = read("data_servers")
    for found in servers["servers"].values():
        found["cost"] |= {"spent_usd": 1.0, "uncertain_usd": 3.0}
        found["usage_usd"] = 2.0
    assert "$1.000000; $2.000000; $3.000000" in "\n".join(data.data_servers(servers))
    figures = read("data_gen")
    figures["runs"]["killed"] |= {"kills": 17, "recorded_and_sent_again": 0}
    page = "\n".join(data.data_gen(figures))
    assert "| recorded requests that the killed run sent again | 0 |" in page and "17 times" in page.replace("\n", " ")


def test_a_rate_of_reading_is_of_cpu_seconds():
    figures = read("decoding")
    one = figures["runs"][0]
    one["cpu_ms_a_token"]["cria"]["median"], one["ms_a_token"]["cria"]["median"] = 10.0, 70.0
    figures["weight_bytes"] = 420_000_000
    assert "ours reads 42.0 GB" in " ".join("\n".join(decoding.decoding(figures)).split())


def test_numbers_that_differ_in_nf4_are_counted_over_all_parts():
    figures = read("nf4")
    counts = next(iter(figures["compared"].values()))
    counts["different"] = {name: 2 for name in counts["different"]}
    name = next(iter(figures["compared"]))
    assert f"| {name} | {counts['tensors']} | {counts['numbers']:,} | {2 * len(counts['different'])} |" in nf4.nf4(
        figures
    )


# ---- the page of faults, the pictures of kernels --------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a.test_b" name="test_c[1]"/><testcase classname="tests.a.test_b" name="test_c[2]"><{kind}/>
</testcase></testsuite></testsuites>"""


@pytest.mark.parametrize("kind", ["failure", "error", "skipped"])
def test_no_outcome_is_told_as_another(kind, tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT.format(kind=kind))
    found = faults.read_outcomes(tmp_path / "junit.xml")
    assert found == {("a/test_b.py", "test_c"): ["passed", kind]}
    assert faults.describe_outcomes(["passed", kind]) == f"1 as expected, 1 {kind}"
    assert faults.describe_outcomes(["passed"]) == "as expected" and faults.describe_outcomes([kind]) == f"1 {kind}"
    assert "not run" in faults.format_page({}) and "as expected" not in faults.format_page({})


def test_the_page_of_faults_is_made_of_a_run_that_was_made(tmp_path, monkeypatch, call_main):
    (tmp_path / "junit.xml").write_text(JUNIT.format(kind="error"))
    monkeypatch.setattr(faults, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(faults, "run_named_tests", lambda: pytest.fail("the tests were run"))
    monkeypatch.setattr(faults, "ROWS", [(1, ("a < b | c", "it", [("a/test_b.py", "test_c")]))])
    monkeypatch.setattr(faults, "find_missing_tests", lambda: [])
    call_main(faults, "--junit", tmp_path / "junit.xml")
    assert "| 1 | a &lt; b \\| c | it | `a/test_b::test_c` | 1 as expected, 1 error |" in faults.PAGE.read_text()


def test_a_test_that_is_named_but_not_defined_is_missing(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_b():\n    test_c\n")
    monkeypatch.setattr(faults, "ROOT", tmp_path)
    tests = [("test_a.py", "test_b"), ("test_a.py", "test_c"), ("test_d.py", "test_b")]
    monkeypatch.setattr(faults, "ROWS", [(1, ("a", "b", tests))])
    assert faults.find_missing_tests() == ["test_a.py::test_c", "test_d.py::test_b"]


@pytest.mark.parametrize("measured", [True, False])
def test_pictures_are_drawn_under_the_ceilings_that_the_report_measured(measured, tmp_path, monkeypatch, call_main):
    own, first = {"gemm_tflops": 1.0}, {"gemm_tflops": 2.0}
    parts = {"kernels": {"records": [1], "ceilings": {"rope": first}}, "machine": {"device": "x"}}
    (tmp_path / "x.json").write_text(json.dumps({"parts": parts | ({"ceilings": own} if measured else {})}))
    drawn = []
    monkeypatch.setattr(plots, "draw", lambda result, folder: drawn.append((result, folder)) or [])
    call_main(plots, tmp_path / "x.json", "--out", tmp_path / "there")
    ((result, folder),) = drawn
    assert result["ceilings"] == (own if measured else first) and str(folder) == str(tmp_path / "there")
    with pytest.raises(ValueError, match="no kernel benchmarks"):
        plots.read_benchmarks({"parts": {"machine": {}}})


def test_other_answers_of_a_merged_model_are_told():
    figures = read("adapters")
    figures["merged"] |= {"answers": 6, "same_in_transformers": 4, "same_in_llama_cpp": 3}
    page = " ".join("\n".join(adapters.adapters(figures)).split())
    assert "to 4 of 6 prompts in transformers and to 3 of 6 in llama.cpp" in page
    figures["curve"] |= {"loss": [3.0, 1.0], "peft_loss": [4.0, 2.0]}
    assert adapters.adapters_row(figures)[1:3] == ("3.0000 to 1.0000", "4.0000 to 2.0000 (PEFT)")
