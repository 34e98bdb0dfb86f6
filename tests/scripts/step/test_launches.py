"""The launches, bytes and instructions of a step, against those counted by hand for a toy."""

import json

from scripts.step.rows import TOY
from tests.helpers.compiler import run_compiler


def test_a_toys_step_counted_by_hand(tmp_path):
    path = tmp_path / "launches.json"
    path.write_text(json.dumps({"records": {"before": {}}}))
    command = ("--smoke", "--tokens", "384", "--instructions", "--json", path, "--label", "now")
    done = run_compiler("scripts.step.launches", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(path.read_text())["records"]
    assert set(records) == {"before", "now"}
    kinds = records["now"]["kinds"]
    assert kinds["norms"]["launches"] == 3 * (2 * TOY.n_layers + 1)  # forward, backward, the sum of dw
    # Forward: four matrices a layer, the last one's first in two parts. Backward: dx and dw of each. The head: three.
    assert kinds["GEMM"]["launches"] == 3 * (4 * TOY.n_layers + 1) + 3
    assert kinds["optimizer"]["launches"] >= 1 and kinds["swiglu"]["launches"] == 2 * TOY.n_layers
    assert kinds["cross entropy"]["instructions"] > 0 and kinds["GEMM"]["instructions"] == 0
    total = records["now"]["all"]
    assert total == {name: sum(kind[name] for kind in kinds.values()) for name in total}
