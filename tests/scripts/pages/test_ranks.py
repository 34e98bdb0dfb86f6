"""docs/ranks.md against the estimate."""

import sys
from types import SimpleNamespace

import pytest

from scripts.pages import ranks


def test_the_page_of_ranks_is_what_the_estimate_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ranks", "--check"])
    ranks.main()
    page = ranks.DOC.read_text()
    assert page.count("### 8 x ") == 12 and "Everything here is projected" in page
    monkeypatch.setattr(ranks, "page", lambda: page + "more")
    with pytest.raises(SystemExit, match=r"docs/ranks.md is not what the estimate says; run python -m scripts"):
        ranks.main()


def way(fits=True, total=1.0, memory=8e10, **more):
    """Return an estimate of one mesh."""
    sent = {"gather forward": 3e9, "gather backward": 2e9, "reduce": 5e9, "sum": 0.0}
    traffic = SimpleNamespace(
        step_bytes=lambda n: {kind: n * size for kind, size in sent.items()}, gather=[4e6, 0], reduce=[8e6, 0],
        sum=[2e6, 0], group_seconds=lambda i, last: (0.001, 0.002, 0.004) if (i, last) == (0, True) else None,
        concurrent_seconds=lambda *three: sum(three),
    )  # fmt: skip
    projection = SimpleNamespace(
        traffic=traffic, work=SimpleNamespace(tokens=1000), communication_s=0.25, tokens_per_s=4321.4, total_s=720.0,
        seconds={"communication": 0.125, "update": 0.0625, "total": total}, dollars=12.345, block_s=(0.008, 0.016),
        not_hidden_seconds={"begin": 0.001, "forward": 0.002, "backward": 0.003, "end": 0.004},
    )  # fmt: skip
    cut = SimpleNamespace(micro_batches=2)
    outcome = SimpleNamespace(memory=SimpleNamespace(total=memory), projection=projection, cut=cut)
    return SimpleNamespace(fits=fits, outcome=outcome)


def test_meshes_that_do_not_fit_or_would_cut_blocks_are_told(snapshot):
    found = {1: way(), 2: way(fits=False, memory=1.234e11), 8: way(total=0.5)}
    assert ranks.costs_table(found, 8) + "\n" + ranks.blocks_table(found) == snapshot


def test_the_fastest_mesh_that_fits_is_told_beside_that_of_auto():
    found = {1: way(total=1.0), 2: way(total=0.75), 4: way(total=0.1, fits=False)}
    one, two = ranks.mesh_name(1), ranks.mesh_name(2)
    assert one != two
    assert ranks.verdict(found, 2) == f"`--replicas` auto takes {two}, projected to be the fastest that fits."
    assert ranks.verdict(found, 1) == f"`--replicas` auto takes {one}; {two} is projected to be 250 ms a step faster."


def test_a_mesh_that_cuts_blocks_is_left_out(monkeypatch):
    asked = []

    def estimate(card, n, config):
        asked.append((card, n, config.model, config.replicas, config.optimizer_states))
        if config.replicas == 4:
            raise ranks.UsageError("blocks would be cut")
        return config.replicas

    monkeypatch.setattr(ranks, "estimate", estimate)
    assert ranks.estimates("H100", "llama-7b", "8bit") == {1: 1, 2: 2, 8: 8}
    assert asked == [("H100", 8, "llama-7b", r, "8bit") for r in (1, 2, 4, 8)]


def test_texts_have_lines_of_120_columns_and_tables_their_cells():
    assert ranks.text("a" * 59 + " " + "b" * 60 + " c") == "a" * 59 + " " + "b" * 60 + "\nc\n"
    assert ranks.table(("a", "b"), [(1, "x"), ("", 2.5)]) == "| a | b |\n| --- | --- |\n| 1 | x |\n|  | 2.5 |\n"
