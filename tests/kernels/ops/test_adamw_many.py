"""AdamW over many tensors: the bits of a call for each, in one launch for each kind of tensor."""

import itertools
import math

import pytest
import torch

import kernels
from kernels.compiled.simulation import on_machine
from kernels.ops import adamw as op
from kernels.ops.adamw_many import update_many
from tests.helpers.kernels import CHIP, needs_kernels

both = pytest.mark.parametrize("impl", [pytest.param("triton", marks=needs_kernels), "ref"])

TILES = {
    "adamw": {"update": {"TILES": 2, "BLOCK": 512}, "update_8bit": {"TILES": 2, "BLOCK": 512}},
    "grad_norm": {"partial": {"TILES": 2, "BLOCK": 256}, "total": {"BLOCK": 4}},
}
MODES = [  # dtype of the parameters, master, states
    (torch.bfloat16, "split", "fp32"), (torch.bfloat16, "split", "8bit"), (torch.bfloat16, "fp32", "fp32"),
    (torch.bfloat16, "stochastic", "bf16"), (torch.bfloat16, "stochastic", "8bit"), (torch.float32, "split", "bf16"),
]  # fmt: skip
modes = pytest.mark.parametrize(("dtype", "master", "states"), MODES, ids=lambda x: str(x).removeprefix("torch."))
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def sizes_of(states):
    """Return numbers of elements: more than one chunk, a part of one, none; then numbers that no vector divides."""
    most = op.LEAST_8BIT if states == "8bit" else 1024  # what is enough for 8-bit states, and for a whole chunk
    return [most + 528, most, 16, 0, 512, most + 1, 7]


def make(sizes, dtype, master, states, device, shift=0):
    """Parameters, states, and two gradients of each. With shift they begin that many elements into memory."""
    draw = torch.Generator().manual_seed(0)

    def one(n, dtype=dtype):
        return torch.randn(n + shift, generator=draw).to(device, dtype)[shift:]

    params = [one(n) for n in sizes]
    made = [kernels.adamw_state(p, master, states) for p in params]
    return params, made, [[one(n) for n in sizes] for _ in range(2)]


def copy(params, states):
    """The same numbers in other memory."""
    return [p.clone() for p in params], [
        op.AdamWState(**{name: t.clone() for name, t in state.tensors().items()}) for state in states
    ]


def find_differences(params, states, others, other_states):
    """The places of tensors that differ in a bit."""
    return [
        (i, name)
        for i, (a, b) in enumerate(zip(states, other_states, strict=True))
        for name, t in {"param": params[i], **a.tensors()}.items()
        if not t.view(torch.uint8).equal({"param": others[i], **b.tensors()}[name].view(torch.uint8))
    ]


@both
@modes
def test_bits_are_those_of_a_call_for_each(dtype, master, states, impl, device):
    """Also where two tensors share a seed, and where one is of another kind than the others."""
    sizes = sizes_of(states)
    params, made, grads = make(sizes, dtype, master, states, device)
    decays, seeds = [0.1 * (i % 2) for i in range(len(sizes))], [i // 2 for i in range(len(sizes))]
    offsets = [8 * i * i for i in range(len(sizes))]
    others, other_states = copy(params, made)
    for step, given in enumerate(grads, 1):
        given[1] = given[1].float()
        kernels.adamw_many(
            params, given, made, step=step, weight_decays=decays, seeds=seeds, offsets=offsets, impl=impl, **SETTINGS
        )
        for i, grad in enumerate(given):
            kernels.adamw(
                others[i], grad, other_states[i], step=step, weight_decay=decays[i], seed=seeds[i], offset=offsets[i],
                impl=impl, **SETTINGS,
            )  # fmt: skip
    assert not find_differences(params, made, others, other_states)


@needs_kernels
def test_shards_that_begin_within_eight_elements_round_as_the_whole(device):
    """Tensors at odd addresses, cut where no group of random bits begins."""
    (whole,), (state,), grads = make([1500], torch.bfloat16, "stochastic", "bf16", device)
    cuts = [0, 301, 303, 1050, 1500]
    parts = [whole[a:b].clone() for a, b in itertools.pairwise(cuts)]
    made = [kernels.adamw_state(part, "stochastic", "bf16") for part in parts]
    for step, (grad,) in enumerate(grads, 1):
        settings = {"step": step, "impl": "triton", **SETTINGS}
        kernels.adamw(whole, grad, state, weight_decay=0.1, seed=3, **settings)
        kernels.adamw_many(
            parts, [grad[a:b] for a, b in itertools.pairwise(cuts)], made, weight_decays=[0.1] * 4,
            seeds=[3] * 4, offsets=cuts[:-1], **settings,
        )  # fmt: skip
    assert torch.cat(parts).view(torch.int16).equal(whole.view(torch.int16))
    assert torch.cat([s.v for s in made]).view(torch.int16).equal(state.v.view(torch.int16))


@needs_kernels
@pytest.mark.parametrize("apply", [False, True])
def test_numbers_on_the_device_count(apply, device):
    """lr and the clip factor as tensors, and apply, without which nothing changes."""
    params, made, grads = make(sizes_of("8bit")[:5], torch.bfloat16, "split", "8bit", device)
    (before, states_before), (others, other_states) = copy(params, made), copy(params, made)
    on_device = {
        "lr": torch.tensor(0.015625, device=device), "grad_scale": torch.tensor(0.25, device=device),
        "apply": torch.tensor(apply, device=device),
    }  # fmt: skip
    settings = SETTINGS | {"step": 1, "weight_decays": [0.1] * 5, "impl": "triton"}
    kernels.adamw_many(params, grads[0], made, **settings | on_device)
    if not apply:
        assert not find_differences(params, made, before, states_before)
        return
    kernels.adamw_many(others, grads[0], other_states, **settings | {"lr": 0.015625, "grad_scale": 0.25})
    assert not find_differences(params, made, others, other_states)
    assert find_differences(params, made, before, states_before)


@pytest.mark.skipif(not CHIP, reason="launches are counted on the PTX machine")
def test_a_launch_for_each_kind_of_tensor():
    """Aligned tensors, those that are not, and those too small for 8-bit states."""
    params, made, grads = make(sizes := sizes_of("8bit"), torch.bfloat16, "split", "8bit", "cpu")
    with on_machine(CHIP) as launches:
        kernels.adamw_many(params, grads[0], made, step=1, weight_decays=[0.1] * len(sizes), impl="triton", **SETTINGS)
    names = [launch.kernel for launch in launches]
    assert names == ["update_many_kernel", "update_many_kernel", "update_kernel", "update_kernel"]
    assert not any(launch.findings for launch in launches)


@pytest.mark.skipif(not CHIP, reason="launches are counted on the PTX machine")
def test_an_access_beyond_a_tensor_is_found():
    """The machine knows what a table reaches, and nothing more."""
    params, made, grads = make([4096, 4096], torch.bfloat16, "split", "fp32", "cpu")
    lists = [[s.m for s in made], [s.v for s in made], [], [], [s.low for s in made], []]
    numbers = (1e-2, None, 1.0, None, None, 0.9, 0.99, 1e-8, [0.0, 0.0], 1, [0, 0], [0, 0])
    with on_machine(CHIP) as launches:
        update_many(params, grads[0], *lists, *numbers)
        assert not launches[0].findings
        update_many(params, [g[:4080] for g in grads[0]], *lists, *numbers)
    assert {finding.kind for finding in launches[1].findings} == {"global"}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_what_shares_a_launch_and_of_what_does_not(dtype, device):
    """Aligned gradients beside others, gradients at odd addresses, and gradients of two dtypes."""
    _, _, (grads, _) = make(sizes_of("fp32"), dtype, "split", "fp32", device)
    moved = [torch.cat([g.new_zeros(1), g])[1:] for g in grads]
    mixed = [g.float() if i % 2 else g for i, g in enumerate(grads)]
    truth = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    for given in (grads, moved, mixed):
        norm = kernels.grad_norm(given, "triton")
        assert abs(norm.item() / truth - 1) < 1e-6 and kernels.grad_norm(given, "triton").equal(norm)


@modes
def test_registered_for_torch_compile(dtype, master, states, device):
    most = sizes_of(states)[1]
    params, made, (grads, _) = make([most, most + 16], dtype, master, states, device)
    kept = [[t for s in made if (t := getattr(s, name)) is not None] for name in (
        "m", "v", "m_absmax", "v_absmax", "low", "master")]  # fmt: skip
    numbers = (1e-2, None, 1.0, None, None, 0.9, 0.99, 1e-8, [0.1, 0.0], 1, [7, 8], [0, 8])
    torch.library.opcheck(update_many, (params, grads, *kept, *numbers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": [torch.zeros(8), torch.zeros(9)]}, r"grad is \(9,\)"), ({"step": 0}, "step 0"),
        ({"seeds": [0, -1]}, "seed -1"), ({"impl": "magic"}, "impl is 'magic'"), ({"weight_decays": [0.0]}, "shorter"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("impl", ["auto", "cuda"])  # neither gets as far as a launch
def test_what_does_not_fit_is_said(changes, message, impl):
    params = [torch.zeros(8), torch.zeros(8)]
    states = [kernels.adamw_state(p) for p in params]
    given = SETTINGS | {"grads": [torch.zeros(8)] * 2, "step": 1, "weight_decays": [0.0] * 2, "impl": impl} | changes
    with pytest.raises(ValueError, match=message):
        kernels.adamw_many(params, states=states, **given)
