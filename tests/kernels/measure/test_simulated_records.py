"""Records of the simulation: how a case is run and judged, and what is printed of it."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from kernels.measure import simulated_records as records
from kernels.measure.cases import rope_case, swiglu_case
from kernels.measure.truth import Truth


@pytest.mark.parametrize("late", [True, False])
def test_a_case_runs_on_both_machines_as_late_or_as_early_as_asked(late, monkeypatch):
    """Triton's launches come first. Its kernels are chosen, and what they write over are copies."""
    entered, given = [], []

    def machine(name):
        @contextmanager
        def context(chip, late, reverse):
            entered.append((name, chip, late, reverse))
            yield [name]

        return context

    monkeypatch.setattr(records, "on_machine", machine("triton"))
    monkeypatch.setattr(records, "cuda_on_machine", machine("csrc"))
    case = swiglu_case(4, 8)
    inputs, upstream = case.inputs("cpu", torch.float32), (torch.randn(4, 8),)

    def ours(i, impl):
        given.append((i.gate_up.data_ptr(), impl, len(entered)))
        return case.reference(i)

    object.__setattr__(case, "ours", ours)
    results, launches = records._run_on("sm_80", records.SimulatedCase(case), inputs, upstream, late)
    assert entered == [("triton", "sm_80", late, not late), ("csrc", "sm_80", late, not late)]
    ((pointer, impl, n_entered),) = given
    assert impl == "triton" and pointer != inputs.gate_up.data_ptr() and n_entered == 2
    leaf = inputs.gate_up.clone().requires_grad_()
    (want,) = torch.autograd.grad(torch.nn.functional.silu(leaf[:, :8]) * leaf[:, 8:], leaf, upstream)
    assert launches == ["triton", "csrc"] and len(results) == 2 and torch.allclose(results[1], want, atol=1e-6)


def test_bits_are_equal_or_not():
    nan, x = torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 1.0])
    other = torch.tensor([torch.nan]).view(torch.int32) + 1
    equal = records._have_equal_bits
    assert equal(nan, nan.clone()) and equal(None, None) and equal(x, x.clone())
    assert not equal(x, None) and not equal(None, x) and not equal(x, torch.tensor([-0.0, 1.0]))
    assert not equal(nan[:1], other.view(torch.float32))
    assert equal(torch.arange(6.0).view(2, 3).T, torch.tensor([[0.0, 3], [1, 4], [2, 5]]))


def launch(kernel, factor):
    names = ("blocks", "instructions", "multiply_adds", "barriers", "load_bytes", "load_sectors", "store_bytes",
             "store_sectors", "shared_cycles", "shared_ideal_cycles", "instructions.float", "instructions.special",
             "instructions.matrix", "instructions.other")  # fmt: skip
    return SimpleNamespace(kernel=kernel, counters={name: factor * 2**i for i, name in enumerate(names)})


def test_counters_are_sums_of_a_kernels_launches():
    first, second = records._count_launches([launch("a", 1), launch("b", 5), launch("a", 2)])
    want = {
        "blocks": 1, "instructions": 2, "float": 1024 + 2048, "matrix": 4096, "multiply_adds": 4, "barriers": 8,
        "load_bytes": 16, "load_sectors": 32, "store_bytes": 64, "store_sectors": 128, "shared_cycles": 256,
        "shared_ideal_cycles": 512,
    }  # fmt: skip
    assert first == {"kernel": "a", "launches": 2, **{name: 3 * n for name, n in want.items()}}
    assert second == {"kernel": "b", "launches": 1, **{name: 5 * n for name, n in want.items()}}
    assert records.add_counters([first, second]) == {"launches": 3, **{name: 8 * n for name, n in want.items()}}


def test_the_worst_result_is_that_of_the_largest_error_beside_torchs():
    """Or beside the floor, where torch makes no error; one that is missing is passed over."""
    truth = SimpleNamespace(
        names=["a", "b", "c", "d"], found=[torch.zeros(2, dtype=torch.float64)] * 4, errors=[0.5, 0.001, 0.0, 0.0],
        floors=[0.0, 0.0, 1e-3, 0.0],
    )  # fmt: skip

    def results(*errors):
        return [None if e is None else torch.tensor([0.0, e]) for e in errors]

    assert records._find_worst(truth, results(5.0, 0.0234567, 0.02, 0.0)) == ("b", 0.0235, 0.001)
    assert records._find_worst(truth, results(5.0, 0.005, 0.02, None)) == ("c", 0.02, 0.0)
    assert records._find_worst(truth, results(5.0, 0.005, 0.002, 0.0)) == ("a", 5.0, 0.5)
    assert records._find_worst(truth, results(0.0, 0.0, 0.0, 0.0)) == ("a", 0.0, 0.5)
    assert records._find_worst(truth, [None] * 4) == ("none", 0.0, 0.0)


def test_the_gradients_of_a_simulation_are_random_and_its_truth_is_fp64(monkeypatch):
    given = {}

    class Noting(Truth):
        def __init__(self, case, inputs, upstream, dtype, wide):
            given.update(upstream=upstream, dtype=dtype, wide=wide, inputs=inputs)
            super().__init__(case, inputs, upstream, dtype, wide)

    def run(chip, case, inputs, upstream, late):
        assert upstream is given["upstream"] and inputs is given["inputs"]
        common_table = records.common.launch_table("rope")
        by_chip = next(iter(common_table.values()))[chip]
        by_chip[next(iter(by_chip))]
        return [t.clone() for t in given["truth"].found], []

    monkeypatch.setattr(records, "Truth", lambda *args: given.setdefault("truth", Noting(*args)))
    monkeypatch.setattr(records, "_run_on", run)
    record, used = records.simulate(records.SimulatedCase(rope_case(8, 2, 1, 16), torch.bfloat16), "sm_90")
    assert (given["dtype"], given["wide"]) == (torch.bfloat16, torch.float64)
    for t, shape in zip(given["upstream"], ((8, 2, 16), (8, 1, 16)), strict=True):
        assert t.shape == shape and t.dtype == torch.bfloat16 and 0.7 < t.float().std() < 1.3
    for t, output in zip(given["upstream"], given["truth"].found, strict=False):
        assert (t.float() - output.float()).abs().max() > 0.5  # numbers of their own
    ((op, kernel, chip, _),) = used
    assert (op, kernel, chip) == ("rope", "rotate", "sm_90")
    assert (record["ratio"], record["wrong"], record["error"], record["kernels"]) == (0, [], 0.0, [])
    assert record["torch_error"] > 0 and record["n_findings"] == 0


def made(op, chip="sm_90", **more):
    kernels = [{"kernel": name, "launches": 1, "instructions": 1_230_000, "load_bytes": 600, "store_bytes": 200,
                "load_sectors": 30, "store_sectors": 20, "shared_cycles": 40, "shared_ideal_cycles": 30}
               for name in ("a", "b")]  # fmt: skip
    return {"op": op, "case": "T=4", "dtype": "bfloat16", "chip": chip, "worst": "dx", "error": 0.0123, "wrong": [],
            "torch_error": 0.0456, "ratio": 0.27, "n_findings": 0, "findings": [],
            "kernels": kernels} | more  # fmt: skip


def test_what_is_printed_of_records(snapshot):
    found = [
        made("rope"), made("rope", "sm_80", case="T=5", ratio=1.5, worst="output 0", error=2.0, n_findings=7,
                           findings=["a: race", "b: out of bounds"]),
        made("rope", wrong=["dx is off by 1", "dx differs between late and early"],
             ratio=0.5), made("swiglu", kernels=[]),
    ]  # fmt: skip
    found[3]["kernels"] = [{"kernel": "a", **dict.fromkeys(found[0]["kernels"][0].keys() - {"kernel"}, 0)}]
    text = "\n".join([*map(records.format_record, found), "", records.format_summary(found)])
    assert text + "\n" == snapshot
