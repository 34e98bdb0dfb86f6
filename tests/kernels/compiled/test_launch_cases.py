"""The cases that the gate compiles and the tuner times: which there are, and what each gives its launch function."""

import pytest
import torch

from kernels.compiled.launch_cases import Make, all_cases
from kernels.compiled.launches import patched
from kernels.measure.tuner import TOY
from kernels.ops import common

OPS = sorted({case.op for case in all_cases()})


def told(value):
    """Return an argument as text: a tensor's shape, dtype, strides if it is a view, and where it lies."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(told, value))}]"
    if not torch.is_tensor(value):
        return value.op if hasattr(value, "op") else str(value)
    text = f"{'x'.join(map(str, value.shape)) or 'one'} {str(value.dtype).removeprefix('torch.')}"
    text += f" strides {value.stride()}" if not value.is_contiguous() else ""
    return text if value.device.type == "meta" else f"{text} {value.device}"


def short(text, most=700):
    return text if len(text) <= most else f"{text[:most]}... {len(text)} characters"


@pytest.mark.parametrize("op", OPS)
def test_what_each_case_gives_its_launch_function(op, snapshot):
    lines = []
    with patched(common, chip_override="sm_90"):
        for case in all_cases([op]):
            function, *args = case.build(Make(tokens=256, largest=1 << 15))
            name = getattr(function, "_qualname", None) or f"{function.__module__}.{function.__name__}"
            lines.append(f"{case.label}: {name}({short(', '.join(map(told, args)))})")
    text = "\n".join(lines) + "\n"
    middle = text.find("\n", len(text) // 2) + 1 if len(text) > 7500 else len(text)
    assert text[:middle] == snapshot(name="1")
    if text[middle:]:
        assert text[middle:] == snapshot(name="2")


def test_a_maker_makes_tensors_of_its_sizes_device_and_dtype():
    meta, toy = Make(), Make("cpu", **TOY)
    assert (meta.tokens, meta.dtype, meta.device.type, meta.size(1 << 29)) == (8192, torch.bfloat16, "meta", 1 << 29)
    assert (toy.tokens, toy.size(100), toy.size(7)) == (24, 64, 7)
    assert told(meta(3, 4)) == "3x4 bfloat16" and told(meta(3, dtype=torch.float32, low=0.5)) == "3 float32"
    assert (
        told(meta.integers(5, high=3, dtype=torch.int32)) == "5 int32" and told(meta.integers(5, high=3)) == "5 int64"
    )
    torch.manual_seed(0)
    normal, uniform = toy(40, 50), toy(40, 50, low=0.5, dtype=torch.float64)
    assert normal.dtype == torch.float32 and abs(normal.mean()) < 0.1 and 0.9 < normal.std() < 1.1
    assert (
        uniform.dtype == torch.float64 and uniform.min() >= 0.5 and uniform.max() < 1.5 and 0.25 < uniform.std() < 0.33
    )
    whole = toy.integers(400, high=5, dtype=torch.uint8)
    assert whole.dtype == torch.uint8 and set(whole.tolist()) == {0, 1, 2, 3, 4}


def test_cases_are_those_of_the_ops_named():
    assert {case.op for case in all_cases(["rope", "swiglu"])} == {"rope", "swiglu"}
    assert len(all_cases()) == sum(len(all_cases([op])) for op in OPS) and all_cases(["none"]) == []


def test_random_numbers_are_made_on_the_device(monkeypatch):
    given = []
    for name in ("randn", "rand", "randint"):
        real = getattr(torch, name)

        def noting(*args, device, real=real, name=name):
            given.append((name, str(device)))
            return real(*args)

        monkeypatch.setattr(torch, name, noting)
    make = Make("cuda:1")
    assert make(3).dtype == make(3, low=0.0).dtype == torch.bfloat16 and make.integers(3, high=2).shape == (3,)
    assert given == [("randn", "cuda:1"), ("rand", "cuda:1"), ("randint", "cuda:1")]
