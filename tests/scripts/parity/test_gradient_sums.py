"""The sums of a weight's gradient, in fp32 and rounded one by one, and the error that is told of them."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts.parity import gradient_sums
from scripts.parity.gradient_sums import Sums, relative_error
from tests.helpers.calls import Calls


def test_one_sum_is_exact_and_the_other_rounded_at_each_addition():
    sums, weight = Sums(), object()
    parts = [(torch.randn(5, 3).bfloat16(), torch.randn(5, 4).bfloat16()) for _ in range(3)]
    exact, rounded = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bfloat16)
    for dy, x in parts:
        sums.add(weight, dy, x)
        exact += dy.T.float() @ x.float()
        rounded += (dy.T.float() @ x.float()).bfloat16()
    assert torch.equal(sums.fp32[weight], exact) and sums.fp32[weight].dtype == torch.float32
    assert torch.equal(sums.rounded[weight], rounded) and rounded.dtype == sums.rounded[weight].dtype


def test_an_error_is_a_relative_l2_norm_over_all_matrices():
    truth = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    found = [torch.tensor([3.3]), torch.tensor([0.0, 4.4])]
    assert relative_error(found, truth) == pytest.approx(0.1) and relative_error(truth, truth) == 0


@pytest.mark.parametrize("name", ["linear", "norm_linear", "swiglu"])
def test_what_is_watched_is_the_product_that_training_adds(name, monkeypatch):
    module = __import__(f"kernels.ops.{name}", fromlist=[name])
    monkeypatch.setattr(module, "weight_gradient", lambda dy, x, into: "what it returns")
    for other in {"linear", "norm_linear", "swiglu"} - {name}:
        of_other = __import__(f"kernels.ops.{other}", fromlist=[other])
        monkeypatch.setattr(of_other, "weight_gradient", of_other.weight_gradient)
    sums, weight, dy, x = [Sums()], object(), torch.randn(5, 3), torch.randn(5, 4)
    gradient_sums.watch_products(sums)
    assert module.weight_gradient(dy, x, weight) == "what it returns"
    assert torch.equal(sums[0].fp32[weight], dy.T @ x)


def test_operators_with_cpu_twins_run_as_kernels_do(monkeypatch):
    modules = [importlib.import_module(f"kernels.ops.{name}") for name in gradient_sums.OPS]
    chosen = [module for module in modules if hasattr(module, "choose_impl")]
    for module in chosen:
        monkeypatch.setattr(module, "choose_impl", None)
    gradient_sums.run_kernels_on_cpu()
    assert chosen and {module.choose_impl("op", "ref", None) for module in chosen} == {"triton"}


def test_exact_gradients_are_of_all_batches_in_fp32(monkeypatch):
    narrow = torch.nn.Linear(3, 2, bias=False).bfloat16()
    made = []

    class Wide(torch.nn.Linear):
        def loss(self, batch):
            return self(batch).square().sum()

    def new_model(*args):
        made.append(args)
        return Wide(3, 2, bias=False)

    monkeypatch.setattr(gradient_sums, "new_model", new_model)
    batches = [torch.randn(3), torch.randn(3)]
    found = gradient_sums.exact_gradients(narrow, "config", batches)
    w = narrow.weight.float()
    assert made == [("config", "cpu", torch.float32, "ref")] and list(found) == ["weight"]
    assert torch.allclose(found["weight"], sum(2 * torch.outer(w @ x, x) for x in batches), rtol=1e-5, atol=1e-6)


def test_the_whole_measurement(monkeypatch, tell, snapshot):
    """One weight whose gradient is the sum of two products a micro-batch; what is summed in bf16 is off by hand."""
    calls, watched = Calls(), []
    lengths = np.array([30, 40, 50, 60, 70])

    class Model(torch.nn.Module):
        label = "model"

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1, 1))

        def loss(self, part):
            def backward():
                product = torch.full((1, 1), 1 + 2.0**-9 * len(part))
                watched[0][0].add(self.w, product, torch.ones(1, 1))
                self.w.grad = torch.ones(1, 1) if self.w.grad is None else self.w.grad + 1

            calls.lines.append(f"loss({part})")
            return SimpleNamespace(backward=backward)

    rows = calls.thing("rows", loss_tokens=lengths // 2, lengths=lengths, get_examples=lambda which: which.tolist())
    rows.__class__ = type("Rows", (type(rows),), {"__len__": lambda self: 5})
    source = calls.thing("source", read_into=None)
    source.config = "config"
    exact = lambda model, config, batches: {"w": torch.full((1, 1), 2.0)}  # noqa: E731
    for name, result in {
        "find_embedded_gguf": "gguf", "open_source": source, "load_tokenizer": "tokenizer",
        "read_rows": ([*"abcdefg"], 0), "make_micro_batches": lambda examples, packing, scale: [examples],
        "new_model": lambda *_, **__: Model(), "exact_gradients": exact, "run_kernels_on_cpu": None,
        "watch_products": watched.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(gradient_sums, name, calls.stand_in(name, result))
    table = calls.thing("table", select=rows)
    monkeypatch.setattr(gradient_sums.data, "encode_rows", calls.stand_in("encode_rows", table))
    text = tell(gradient_sums, "--data", "dir/mine.json", "--rows", 5)
    assert text + "\n" + calls.text() == snapshot


def test_a_part_that_is_rounded_first_is_rounded_at_once():
    sums = Sums()
    for n in (1, 1):
        sums.add("w", torch.full((1, 1), 1 + 2.0**-9), torch.full((1, n), 1.0))
    assert sums.fp32["w"].item() == 2 + 2.0**-8 and sums.rounded["w"].item() == 2.0


def test_flags_have_defaults(defaults_of):
    data = str(gradient_sums.SEED_TASKS)
    assert defaults_of(gradient_sums, "--json", "x") == {"json": "x", "data": data, "rows": 8}
