"""What is told of training states whose manifests or rows are not what they should be, to the letter."""

import json

import pytest
import torch

from engine.base.errors import DataError
from engine.model.shard import Shard
from engine.output.checkpoint import read_manifest
from engine.output.tensor_rows import RowMap, check_fit, check_row_map, map_rows_to_files

FILE = {"bytes": 8, "sha256": "ab"}
ONE = {"format": 1, "step": 3, "files": {"state.safetensors": FILE}}
NAMES = [f"state-0000{i}-of-00002.safetensors" for i in range(2)]
SEVERAL = {
    "format": 2, "step": 0, "tensors": {"a": {"dtype": "F32", "shape": [5, 2]}},
    "files": {name: FILE | {"rows": {"a": rows}} for name, rows in zip(NAMES, ([0, 3], [3, 5]), strict=True)},
}  # fmt: skip
CASES = [
    (ONE, {}), (ONE, {"format": 3}), (ONE, {"step": -1}), (ONE, {"step": "3"}), (ONE, {"step": True}),
    (ONE, {"n_updates": 0}), (ONE, {"n_updates": -1}), (ONE, {"n_updates": 2**63 - 1}), (ONE, {"n_updates": 2**63}),
    (ONE, {"max_tokens": "9"}), (ONE, {"settings": []}), (ONE, {"settings": {}}), (ONE, {"model": None}),
    (ONE, {"files": {}}), (ONE, {"files": {NAMES[0]: FILE}}), (ONE, {"files": {"state.safetensors": {"bytes": 8.0}}}),
    (ONE, {"files": {"state.safetensors": {"bytes": 8, "sha256": None}}}),
    (ONE, {"files": {"stateXsafetensors": FILE}}),
    (SEVERAL, {}), (SEVERAL, {"files": {"state.safetensors": FILE}}), (SEVERAL, {"tensors": {}}),
    (SEVERAL, {"files": {NAMES[0]: SEVERAL["files"][NAMES[0]]}}), (SEVERAL, {"files": {}, "tensors": {}}),
    (SEVERAL, {"tensors": {"a": {"dtype": "F8", "shape": [5, 2]}}}),
    (SEVERAL, {"tensors": {"a": {"dtype": "F32", "shape": [6, 2]}}}),
]  # fmt: skip


def test_what_is_told_of_a_manifest(tmp_path, snapshot):
    lines = []
    for base, changes in CASES:
        (tmp_path / "manifest.json").write_text(json.dumps(base | changes))
        try:
            told = "read" if read_manifest(tmp_path) == base | changes else "changed"
        except DataError as error:
            told = str(error).replace(str(tmp_path), "STATE")
        lines += [f"{base['format']} {changes}", f"  {told}"]
    assert "\n".join(lines) + "\n" == snapshot


A = {"dtype": "F32", "shape": [5, 2]}


@pytest.mark.parametrize(
    ("tensors", "files", "told"),
    [
        ({"a": A}, [{"a": [0, 5]}], None), ({"a": A}, [{"a": [2, 5]}, {"a": [0, 2]}], None),
        ({"a": A}, [{"a": [0, 0]}, {"a": [0, 5]}], None), ({"a": {"dtype": "F32", "shape": []}}, [{"a": [0, 1]}], None),
        ({"a": {"dtype": "F32", "shape": [0, 2]}}, [], None),
        ({"a": A}, [{"a": [0, 4]}], "a: rows [4, 5) are held by no file"),
        ({"a": A}, [{"a": [1, 5]}], "a: rows [0, 1) are held by no file"),
        ({"a": A}, [], "a: rows [0, 5) are held by no file"),
        ({"a": A}, [{"a": [0, 3]}, {"a": [2, 5]}], "a: rows [2, 3) are held twice, or are none of it"),
        ({"a": A}, [{"a": [0, 6]}], "a: rows [5, 6) are held twice, or are none of it"),
        ({"a": A}, [{"a": [3, 2]}], "a: rows [3, 2)"), ({"a": A}, [{"a": [0, 5.0]}], "a: rows [0, 5.0)"),
        ({"a": {"dtype": "F32", "shape": [-1]}}, [], "a: dtype F32, shape [-1]"),
        ({"a": {"dtype": "I4", "shape": [5]}}, [{"a": [0, 5]}], "a: dtype I4, shape [5]"),
    ],
)  # fmt: skip
def test_every_row_is_held_once(tensors, files, told):
    row_map = RowMap(tensors, {str(i): rows for i, rows in enumerate(files)})
    if told is None:
        check_row_map(row_map)
        return
    with pytest.raises(ValueError) as error:
        check_row_map(row_map)
    assert str(error.value) == told


def test_files_hold_the_rows_of_their_writers_and_those_without_are_left_out():
    rows = {"x": {"a": ("F32", [5, 2], 0, 3), "b": ("I64", [], 0, 1)}, "y": {"a": ("F32", [5, 2], 3, 5)}, "z": {}}
    found = map_rows_to_files(rows | {"z": {"a": ("F32", [5, 2], 5, 5)}})
    assert found.tensors == {"a": A, "b": {"dtype": "I64", "shape": []}}
    assert found.files == {"x": {"a": [0, 3], "b": [0, 1]}, "y": {"a": [3, 5]}}
    empty = map_rows_to_files({"x": {"a": ("F32", [0, 2], 0, 0)}})
    assert empty.files == {"x": {"a": [0, 0]}} and map_rows_to_files({"x": {}}).files == {"x": {}}
    with pytest.raises(
        ValueError, match=r"^a: y is to hold rows of \{'dtype': 'F16', 'shape': \[5, 2\]\}, another one of"
    ):
        map_rows_to_files(rows | {"y": {"a": ("F16", [5, 2], 3, 5)}})


def test_the_first_tensors_that_do_not_fit_are_told(tmp_path):
    stored = {name: A for name in "abcd"} | {"q": {"dtype": "U8", "shape": [2]}, "other": A}
    wanted = {name: Shard(torch.zeros(2, 2, dtype=torch.bfloat16), 3, 5) for name in "abcd"}
    wanted |= {"q": Shard(torch.zeros(2, dtype=torch.uint8))}
    row_map = RowMap({f"param.{name}" if name != "other" else name: entry for name, entry in stored.items()}, {})
    check_fit(tmp_path, row_map, {f"param.{name}": shard for name, shard in wanted.items()}, "param.")
    bad = {"a": Shard(torch.zeros(2, 2), 0, 4), "c": wanted["c"], "q": Shard(torch.zeros(2)), "z": wanted["a"]}
    with pytest.raises(DataError) as error:
        check_fit(tmp_path, row_map, {f"param.{name}": shard for name, shard in bad.items()}, "param.")
    assert str(error.value) == (
        f"{tmp_path}: 5 tensors do not fit this model, first param.a ((5, 2), wanted (4, 2)), param.b ((5, 2), wanted "
        "None), param.d ((5, 2), wanted None)"
    )
    with pytest.raises(DataError, match=r"first param.q \(torch.uint8, wanted torch.float32\)$"):
        check_fit(tmp_path, RowMap({"param.q": stored["q"]}, {}), {"param.q": bad["q"]})
