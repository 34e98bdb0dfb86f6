"""AlpacaEval's rows: what they say a comparison cost and took."""

import json

import pytest

from data_gen.api.prices import PICO
from data_gen.judging.annotations import build_annotation, write_annotations
from data_gen.judging.answers import Questions
from data_gen.judging.comparisons import Pair
from data_gen.judging.verdicts import Verdict, join_verdicts

QUESTIONS = Questions(("old", "new"), ("one",), ("d",), (("a", "b"),))


@pytest.mark.parametrize(
    "costs", [(1, 2), (123_456_789, 1), (0, 45_000), (PICO, 3), (7, None), (None, 7), (None, None)]
)
def test_the_prices_of_the_rows_add_up_to_the_bill(costs):
    """They do to the picodollar: a judge that costs $0.0000004 a verdict is not free."""
    verdicts = {i: Verdict("1", "", f"said {i}", "m", i + 5, cost) for i, cost in enumerate(costs) if cost is not None}
    row = build_annotation(join_verdicts(Pair(0, 0, 1, "a", "b", (0, 1)), verdicts), QUESTIONS, "x", {5: 0.5, 6: 0.25})
    assert round(row["price_per_example"] * PICO) == sum(verdict.cost for verdict in verdicts.values())
    assert row["time_per_example"] == sum(0.5 / (1 + i) for i in verdicts)
    assert row["dataset"] == "d"
    assert row["raw_completion"] == [f"said {i}" if i in verdicts else None for i in (0, 1)]


@pytest.mark.parametrize(
    "names", [("org/m", "org-m", "n"), ("x" * 60 + "1", "x" * 60 + "2", "y" * 99), ("a", "b", "c")]
)
def test_models_whose_names_look_alike_have_files_of_their_own(tmp_path, names):
    questions = Questions(names, ("one",), (None,), (("a", "b", "c"),))
    places = (0, 1), (0, 2), (1, 2), (0, None)
    judged = [join_verdicts(Pair(0, base, other, "a", "b", None), {}) for base, other in places]
    paths = write_annotations(tmp_path, judged, questions, "j", {})
    found = [[(row["generator_1"], row["generator_2"]) for row in json.loads(path.read_text())] for path in paths]
    wanted = [(names[base], "constant answer" if other is None else names[other]) for base, other in places]
    assert found == [[pair] for pair in wanted] and len(set(paths)) == 4
    assert paths[1].name.startswith("annotations-2-") and paths[3].name == "canary.json"
