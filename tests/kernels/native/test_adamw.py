"""AdamW of csrc/cpu: every bit of the reference under each instruction set, and no access outside of its tensors."""

import itertools
import math

import pytest
import torch

import kernels
from kernels.native.arguments import AdamWArguments
from kernels.native.cpu import load_cpu
from kernels.native.library import NativeError, check
from kernels.ops import adamw as op
from kernels.ops import common
from tests.helpers import native

pytestmark = native.needs_cxx

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "grad_scale": 0.3}
MODES = [(torch.float32, "split", states) for states in op.STATES] + [
    (torch.bfloat16, master, states) for master in op.MASTERS for states in op.STATES
]
modes = pytest.mark.parametrize(("dtype", "master", "states"), MODES, ids=lambda x: str(x).removeprefix("torch."))
SIZES = (0, 1, 255, 256, 257, 4095, 4097, 100_003)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    return native.load_instruction_sets(tmp_path_factory.mktemp("native"))


def bits(t):
    """Return what must be equal: the bit patterns, but one NaN for all, since torch's own differ from size to size."""
    if not t.is_floating_point():
        return t
    return torch.where(t.isnan(), torch.full_like(t, math.nan), t).view({2: torch.int16, 4: torch.int32}[t.itemsize])


def start(n, dtype, master, states, odd=False):
    """Return a parameter and its state, which begin one element into their memory if odd, and a source of numbers."""
    draw = torch.Generator().manual_seed(n)
    make = lambda t: torch.cat((t.new_zeros(int(odd)), t.flatten()))[int(odd) :]  # noqa: E731
    param = make(torch.randn(n, generator=draw).to(dtype))
    state = kernels.adamw_state(param, master, states)
    return param, op.AdamWState(**{name: make(t) for name, t in state.tensors().items()}), draw


def gradient(draw, n, dtype, step):
    g = torch.randn(n, generator=draw) * 10 ** (6 * torch.rand(n, generator=draw) - 6)
    g[n // 3 : n // 3 + 300] = 0  # whole blocks of 0
    if step == 3 and n > 1:
        g[n // 2], g[n // 4], g[0] = math.nan, math.inf, -math.inf
    g = g.to(dtype)
    if step == 3 and n > 1:
        g.view({2: torch.int16, 4: torch.int32}[g.itemsize])[n // 5] = -1  # a NaN that rounding carries into a number
    return g


def assert_equal(ours, theirs, told):
    for name, ours_, theirs_ in zip(("param", *theirs[1].tensors()), tensors(ours), tensors(theirs), strict=True):
        assert bits(ours_).equal(bits(theirs_)), (name, told)


def tensors(pair):
    return pair[0], *pair[1].tensors().values()


@modes
def test_every_bit_is_the_references(dtype, master, states, libraries, monkeypatch):
    """Every size and instruction set, both kinds of gradients, addresses and offsets of all kinds, NaN and Inf."""
    assert "plain" in libraries
    for n, odd in zip(SIZES, itertools.cycle((False, True))):
        *theirs, draw = start(n, dtype, master, states, odd)
        copies = {name: start(n, dtype, master, states, odd)[:2] for name in libraries}
        for step in range(1, 4):
            grad = gradient(draw, n, dtype if step % 2 else torch.float32, step)
            given = SETTINGS | {"weight_decay": 0.1 * (step % 2), "step": step, "seed": 2**32 - step}
            given["offset"] = 2**35 + 8 * step + (0 if states == "8bit" else step)
            kernels.adamw(theirs[0], grad, theirs[1], impl="ref", **given)
            for name, loaded in libraries.items():
                monkeypatch.setattr(op, "load_cpu", lambda loaded=loaded: loaded)
                kernels.adamw(copies[name][0], grad, copies[name][1], impl="native", **given)
                assert_equal(copies[name], theirs, (name, n, step))


@modes
def test_threads_change_nothing(dtype, master, states):
    grads = [torch.randn(100_003, generator=torch.Generator().manual_seed(step)) for step in (1, 2)]
    results = []
    for threads in (1, 3):
        *ours, _ = start(100_003, dtype, master, states)
        torch.set_num_threads(threads)
        try:
            for step, grad in enumerate(grads, 1):
                kernels.adamw(ours[0], grad, ours[1], impl="native", weight_decay=0.1, step=step, **SETTINGS)
        finally:
            torch.set_num_threads(1)
        results.append(ours)
    assert_equal(*results, "threads")


def test_it_runs_by_itself_and_takes_numbers_as_tensors(monkeypatch):
    """impl="auto" is the compiled function on a CPU; lr, the clip factor and apply may be tensors, fp64 too."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    assert op.choose_impl("adamw", "auto", torch.zeros(1), has_native=True) == "native"
    wanted = [start(300, torch.bfloat16, "split", "bf16")[:2] for _ in range(4)]
    grad = gradient(torch.Generator().manual_seed(1), 300, torch.bfloat16, 1)
    numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 1, "offset": 5}
    lr, scale, no = torch.tensor([0.01], dtype=torch.float64), torch.tensor(0.3), torch.tensor(False)
    kernels.adamw(wanted[0][0], grad, wanted[0][1], lr=lr, grad_scale=scale, impl="ref", **numbers)
    kernels.adamw(wanted[1][0], grad, wanted[1][1], lr=lr, grad_scale=scale, apply=~no, **numbers)
    assert_equal(wanted[1], wanted[0], "tensors")
    kernels.adamw(wanted[2][0], grad, wanted[2][1], lr=lr, grad_scale=math.nan, apply=no, **numbers)
    assert_equal(wanted[2], wanted[3], "apply")


def test_what_does_not_fit_is_refused(monkeypatch):
    param, state, _ = start(300, torch.bfloat16, "split", "fp32")
    given = SETTINGS | {"weight_decay": 0.1, "step": 1}
    with pytest.raises(ValueError, match=r"adamw: m is .* wanted contiguous"):
        strided = op.AdamWState(**state.tensors() | {"m": torch.zeros(600)[::2]})
        kernels.adamw(param, param, strided, impl="native", **given)
    with pytest.raises(ValueError, match=r"adamw: grad is \(300,\) torch.float16"):
        kernels.adamw(param, param.half(), state, impl="native", **given)
    torn = torch.frombuffer(bytearray(601), dtype=torch.uint8)[1:].view(torch.uint8)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: torn.untyped_storage().data_ptr() + 1)
    with pytest.raises(NativeError, match="adamw: the compiled function was given a pointer that is not aligned"):
        kernels.adamw(param, param, state, impl="native", **given)


MISSING = [
    *((name, mode) for name in ("param", "grad", "m", "v") for mode in ({}, {"states": 2}, {"master_type": 3})),
    *((name, {"states": 2}) for name in ("m_absmax", "v_absmax", "maps")),
    ("master", {"master_type": 1}), ("low", {"master_type": 2}),
]  # fmt: skip
WRONG = [
    ({"grad_type": 2}, "a mode"), ({"grad_type": -1}, "a mode"), ({"states": 3}, "a mode"), ({"states": -1}, "a mode"),
    ({"master_type": 4}, "a mode"), ({"master_type": -1}, "a mode"), ({"n": -1}, "a size"), ({"offset": -1}, "a size"),
    ({"threads": 0}, "a size"), ({"m_absmax": 66}, "a pointer"), ({"maps": 66}, "a pointer"),
    ({"low": 65}, "a pointer"),
    *(({name: None, **mode}, "a mode") for name, mode in MISSING),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "what"), WRONG, ids=str)
def test_the_library_refuses_what_it_would_read_or_write_beyond(changes, what):
    addresses = dict.fromkeys(("param", "grad", "m", "v", "m_absmax", "v_absmax", "low", "master", "maps"), 64)
    numbers = {"n": 1, "offset": 0, "grad_type": 0, "states": 0, "master_type": 0, "threads": 1}
    with pytest.raises(NativeError, match=f"adamw: the compiled function was given {what}"):
        check(load_cpu().cria_adamw(AdamWArguments(**addresses | numbers | changes)), "adamw")


def test_sanitizers_find_nothing(tmp_path_factory):
    """Both sanitizers over a fuzz of sizes, modes and addresses; one access too far is found."""
    folder = tmp_path_factory.getbasetemp()
    assert native.run_sanitized(folder, "adamw") == "288 calls\n"
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        native.run_sanitized(folder, "adamw", "overrun")
