"""A curve through the kernels against one through their references: what is run, and every figure."""

import pytest

from scripts.parity import kernel_curve
from tests.helpers.calls import Calls


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_whole_comparison(on_cpu, monkeypatch, tell, snapshot, tmp_path):
    calls = Calls()
    curves = {"triton": [(2.0, 1.0), (1.5, 4.0), (1.25, 1.0)], "ref": [(2.0, 1.0), (1.0, 4.0), (1.0, 2.0)]}
    curve = lambda args, out, *flags, environment: curves[out.name]  # noqa: E731
    monkeypatch.setattr(kernel_curve, "CPU", on_cpu)
    monkeypatch.setattr(kernel_curve.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernel_curve, "finetune_curve", calls.stand_in("finetune_curve", curve))
    monkeypatch.setattr(kernel_curve.tempfile, "TemporaryDirectory", calls.folder)
    flags = ("--steps", 3, "--batch", 4, "--max-length", 64, "--lr", 0.25)
    text = tell(kernel_curve, *flags) + "\n" + calls.text().replace(str(tmp_path), "FOLDER")
    assert text == snapshot


def test_by_default_three_hundred_steps_are_taken(monkeypatch, call_main):
    monkeypatch.setattr(kernel_curve, "finetune_curve", lambda args, *_, **__: pytest.fail(str(args)))
    expected = r"Namespace\(json='x', steps=300, batch=2, max_length=96, lr=0.001\)"
    with pytest.raises(pytest.fail.Exception, match=expected):
        call_main(kernel_curve, "--json", "x")
