"""AdamW in Triton and its reference: how a master and the states are kept, rounding, codes; the gradients' norm."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

import kernels
from engine.model.config import ModelConfig
from engine.model.llama import new_model
from engine.output import checkpoint
from engine.training.optimizer import AdamW
from kernels.compiled.simulation import on_machine
from kernels.ops import adamw as op
from kernels.ops import eight_bit as dynamic_map
from kernels.ops import grad_norm as norm_op
from kernels.ops.common import launch_table
from tests.helpers.kernels import CHIP, needs_gpu, needs_kernels
from tests.helpers.run import worst
from tests.helpers.training_states import save_checkpoint

both = pytest.mark.parametrize("impl", [pytest.param("triton", marks=needs_kernels), "ref"])

TILES = {
    "adamw": {"update": {"BLOCK": 512}, "update_8bit": {"BLOCK": 512}},
    "grad_norm": {"partial": {"TILES": 2, "BLOCK": 256}, "total": {"BLOCK": 4}},
}
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
# dtype of the parameter, master, states
MODES = [(torch.float32, "split", states) for states in op.STATES] + [
    (torch.bfloat16, master, states) for master in op.MASTERS for states in op.STATES
]
modes = pytest.mark.parametrize(("dtype", "master", "states"), MODES, ids=lambda x: str(x).removeprefix("torch."))


@pytest.fixture
def large_tiles(monkeypatch):
    """Those of the interpreter's own, for the tests of very many numbers."""
    for table in launch_table("adamw").values():
        monkeypatch.setitem(table["interpreter"], "0", table["interpreter"]["0"] | {"BLOCK": 1 << 16})


def bits(t):
    """What two tensors must share to be the same, NaN and -0 included."""
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()]) if t.is_floating_point() else t


def same(a, b):
    return a.dtype == b.dtype and bits(a).equal(bits(b))


def clone(state):
    return op.AdamWState(**{name: t.clone() for name, t in state.tensors().items()})


def run(param, state, grads, impl, first=1, **changes):
    for step, grad in enumerate(grads, first):
        kernels.adamw(param, grad, state, step=step, impl=impl, **SETTINGS | changes)
    return param, state


def several_tiles(states):
    """Return a number of elements that fills several tiles, and is enough for 8-bit states if they are wanted."""
    return op.LEAST_8BIT if states == "8bit" else 1024


def start(n, dtype, master, states, device, seed=0):
    """A parameter, its state, and a function that makes gradients; a few blocks of the states hold nothing but 0."""
    draw = torch.Generator().manual_seed(seed)
    param = torch.randn(n, generator=draw).to(device, dtype)
    quiet = slice(n // 2, n // 2 + 700)

    def gradient(dtype=dtype):
        g = torch.randn(n, generator=draw) * 10 ** (4 * torch.rand(n, generator=draw) - 4)
        g[quiet] = 0
        return g.to(device, dtype)

    return param, kernels.adamw_state(param, master, states), gradient


# ---- against the formula --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("n", [0, 1, 7, 255, 513, 1025])
def test_fp32_is_as_near_to_fp64_as_torchs(n, impl, device):
    param, state, gradient = start(n, torch.float32, "split", "fp32", device)
    grads = [gradient() for _ in range(5)]
    names = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "foreach": False}
    copies = [torch.nn.Parameter(param.clone().to(dtype)) for dtype in (torch.float32, torch.float64)]
    for copy in copies:
        optimizer = torch.optim.AdamW([copy], **names)
        for g in grads:
            copy.grad = g.to(copy.dtype)
            optimizer.step()
    run(param, state, grads, impl)
    theirs, truth = (copy.detach() for copy in copies)
    assert worst(param - truth) <= 2 * worst(theirs - truth) + 1e-7


@needs_kernels
@modes
def test_kernel_and_reference_agree(dtype, master, states, device):
    """m, v and their codes in every bit, p but for the last of a square root and of a division. Several tiles, the last
    of them broken; a gradient in fp32 and in bf16."""
    ours, state, gradient = start(several_tiles(states) + 517, dtype, master, states, device)
    theirs, their_state = ours.clone(), clone(state)
    for step, grad in enumerate([gradient(), gradient(), gradient(torch.float32)], 1):
        run(ours, state, [grad], "triton", first=step, seed=5)
        run(theirs, their_state, [grad], "ref", first=step, seed=5)
        for name in state.tensors().keys() - {"low", "master"}:
            assert same(state.tensors()[name], their_state.tensors()[name]), (step, name)
        wide, their_wide = op.master_of(ours, state), op.master_of(theirs, their_state)
        unit = 2**-23 * (their_wide.abs() + 0.05)  # of the weight and of the largest update
        if dtype == torch.bfloat16 and master == "stochastic":
            assert (wide != their_wide).double().mean() < 1e-3
        else:
            assert ((wide - their_wide).abs() <= 2 * step * unit).all(), step
    assert {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[states] == state.m.dtype


@pytest.mark.skipif(not CHIP, reason="counted on the PTX machine")
@modes
def test_streams_move_in_whole_sectors(dtype, master, states):
    """Of the sectors that loads and stores ask for, 95% are used, in sizes that tiles divide."""
    param, state, gradient = start(2 * op.LEAST_8BIT, dtype, master, states, "cpu")
    with on_machine(CHIP) as launches:
        run(param, state, [gradient()], "triton")
    counters = launches[0].counters
    for kind in ("load", "store"):
        assert counters[f"{kind}_bytes"] >= 0.95 * 32 * counters[f"{kind}_sectors"] > 0


@both
def test_what_is_on_the_device_counts_as_what_is_given(impl, device):
    """lr and the clip factor as tensors, fp64 too, and as numbers."""
    results = []
    for make in (float, lambda x: torch.tensor(x, device=device), lambda x: torch.tensor([x], device=device).double()):
        param, state, gradient = start(300, torch.bfloat16, "split", "fp32", device)
        run(param, state, [gradient() for _ in range(2)], impl, lr=make(0.015625), grad_scale=make(0.25))
        results.append((param, state.low))
    assert all(same(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    param, state, gradient = start(300, torch.bfloat16, "split", "fp32", device)
    run(param, state, [0.25 * gradient() for _ in range(2)], impl, lr=0.015625)
    assert same(param, results[0][0])


@both
def test_a_slice_of_a_buffer(impl, device):
    """Tensors that begin at odd addresses, and neighbours that stay as they are."""
    n = 1030
    param, state, gradient = start(n, torch.bfloat16, "split", "bf16", device)
    buffers = {name: torch.full((n + 2,), 3, device=device).to(t.dtype) for name, t in state.tensors().items()}
    buffer = torch.full((n + 2,), 3.0, device=device, dtype=torch.bfloat16)
    for name, t in state.tensors().items():
        buffers[name][1:-1] = t
    buffer[1:-1] = param
    grads = [gradient() for _ in range(2)]
    run(param, state, grads, impl)
    inner = op.AdamWState(**{name: t[1:-1] for name, t in buffers.items()})
    run(buffer[1:-1], inner, grads, impl)
    assert same(buffer[1:-1], param) and all(same(getattr(inner, k), t) for k, t in state.tensors().items())
    assert all(t[0] == 3 and t[-1] == 3 for t in (buffer, *buffers.values()))


# ---- the master -----------------------------------------------------------------------------------------------------


def split(x):
    """(bf16, int16) of which x (fp32) is made: the parameter is x rounded to nearest, ties away from zero."""
    low = x.view(torch.int32).to(torch.int16)
    return ((x.view(torch.int32) - low) >> 16).to(torch.int16).view(torch.bfloat16), low


AWKWARD = [
    0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.17e-38, -5.8e-39, 3.4028234e38, -3.4028234e38,
    1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 - 2**-23, 1 + 2**-8 + 2**-23,  # ties, and either side of one
]  # fmt: skip


@both
def test_split_master_is_fp32_bit_for_bit_over_many_steps(impl, device):
    """With awkward numbers among the first weights, and Inf and NaN among the gradients near the end."""
    n_steps = 200 if impl == "triton" and device == "cpu" else 1000  # the interpreter takes 10 ms a step
    n, draw = 512, torch.Generator().manual_seed(0)
    wide = torch.randn(n, generator=draw) * 10 ** (6 * torch.rand(n, generator=draw) - 5)
    wide[: len(AWKWARD)] = torch.tensor(AWKWARD)
    wide = wide.to(device)
    param, low = split(wide)
    state, wide_state = kernels.adamw_state(param, "split"), kernels.adamw_state(wide)
    state.low.copy_(low)
    assert same(kernels.master_of(param, state), wide)
    for step in range(1, n_steps + 1):
        grad = (torch.randn(n, generator=draw) * 10.0 ** (step % 7 - 5)).bfloat16().to(device)
        if step == n_steps - 20:
            grad[100], grad[101], grad[102] = math.inf, -math.inf, math.nan
        settings = {"lr": 1e-2 if step % 10 else 0.0, "weight_decay": 0.1 * (step % 2), "step": step, "impl": impl}
        kernels.adamw(param, grad, state, **SETTINGS | settings)
        kernels.adamw(wide, grad, wide_state, **SETTINGS | settings)
        if step % 20 in (0, 1):
            master, finite = kernels.master_of(param, state), wide.isfinite()
            assert bits(master)[finite].equal(bits(wide)[finite]), step
            assert (same(state.m, wide_state.m) and same(state.v, wide_state.v)) or step >= n_steps - 20
            assert master.isnan().equal(wide.isnan()) and param.isnan().equal(wide.isnan()), step
            assert same(param[finite], split(wide)[0][finite])
    assert wide.isnan().sum() == 1 + 3  # of AWKWARD, and of the gradients


@both
def test_every_low_half_survives_a_step_that_changes_nothing(impl, device, large_tiles):
    """All 2^16 under a few upper halves, of both signs: ties above even and odd ones, the least, the largest."""
    uppers = torch.tensor([0x0000, 0x0001, 0x0080, 0x3F80, 0x3F81, 0x7F7F], dtype=torch.int32)
    every = torch.cat([uppers, uppers - 0x8000])[:, None] * 65536 + torch.arange(65536, dtype=torch.int32)
    wide = every.flatten().to(device, torch.int32).view(torch.float32)
    param, low = split(wide)
    state = kernels.adamw_state(param, "split")
    state.low.copy_(low)
    state.v.fill_(1.0)
    before = kernels.master_of(param, state)
    assert same(before, wide)
    run(param, state, [torch.zeros_like(param)], impl, lr=0.0, weight_decay=0.0)
    after, zero = kernels.master_of(param, state), wide == 0
    assert bits(after)[~zero].equal(bits(wide)[~zero]) and after[zero].eq(0).all()
    # Nearest, of the two neighbours; the greatest fp32 numbers lie next to bf16's Inf.
    near = (param.double() - wide.double()).abs() <= (wide.bfloat16().double() - wide.double()).abs()
    assert (near | param.isinf()).all() and (wide[param.isinf()].abs() > 3.39e38).all()


@both
def test_an_fp32_master_is_rounded_to_nearest_even(impl, device):
    wide = torch.tensor([x for x in AWKWARD if math.isfinite(x)], device=device)
    param = wide.bfloat16()
    state = kernels.adamw_state(param, "fp32")
    state.master.copy_(wide)
    run(param, state, [torch.zeros_like(param)], impl, lr=0.0, weight_decay=0.0)
    assert worst(state.master - wide) == 0 and param.equal(wide.bfloat16())


# ---- stochastic rounding --------------------------------------------------------------------------------------------

N_DRAWS = 1 << 20


def ups(part, impl, device, n=N_DRAWS, seed=0, offset=0):
    """One update from 1 to 1 - part * 2^-8, which lies between two bf16 numbers: True where it was rounded up."""
    param = torch.ones(n, device=device, dtype=torch.bfloat16)
    state = kernels.adamw_state(param, "stochastic")
    settings = SETTINGS | {"lr": part * 2**-8, "weight_decay": 0.0, "eps": 0.0}
    settings |= {"seed": seed, "offset": offset, "impl": impl}
    kernels.adamw(param, torch.ones_like(param), state, **settings, step=1)
    assert set(param.unique().tolist()) <= {1.0, 1 - 2**-8}
    return param == 1


@both
@pytest.mark.parametrize("part", [0.5, 1 / 3, 2.0**-11])
def test_stochastic_rounding_is_unbiased(part, impl, device, large_tiles):
    """The mean of a million draws is 3 standard errors at most from the number itself, for several seeds and in all."""
    means = [ups(part, impl, device, seed=seed).double().mean().item() for seed in (0, 1, 65537)]
    error = math.sqrt(part * (1 - part) / N_DRAWS)
    assert all(abs(mean - (1 - part)) < 3 * error for mean in means), means
    assert abs(sum(means) / 3 - (1 - part)) < 3 * error / math.sqrt(3)


@both
def test_stochastic_rounding_of_states_is_unbiased(impl, device, large_tiles):
    """m = 1 and v = 1, a gradient of 0: 0.9 and 0.999 lie between bf16 numbers."""
    param = torch.ones(N_DRAWS, device=device, dtype=torch.bfloat16)
    state = kernels.adamw_state(param, "fp32", "bf16")
    state.m.fill_(1), state.v.fill_(1)
    run(param, state, [torch.zeros_like(param)], impl, beta2=0.999, lr=0.0)
    for t, truth in ((state.m, 1 - torch.tensor(1 - 0.9).item()), (state.v, torch.tensor(0.999).item())):
        values = t.double()
        assert len(values.unique()) == 2 and (values - truth).abs().max() < 2**-8
        assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(N_DRAWS)


@both
def test_draws_of_other_seeds_steps_and_places_are_others(impl, device, large_tiles):
    """Two independent coins agree in half of a million tosses, within 4 standard errors."""
    half = {}
    for seed in (0, 1, 2**32 - 1):
        half[f"seed {seed}"] = ups(0.5, impl, device, seed=seed)
    half["far on"] = ups(0.5, impl, device, offset=2**35)  # beyond 32 bits of groups of eight
    half["next"] = half["seed 0"].roll(1)
    half["next group"] = half["seed 0"].roll(8)
    half["next tile"] = half["seed 0"].roll(1 << 16)
    names = list(half)
    for i, a in enumerate(names):
        for b in names[:i]:
            agree = (half[a] == half[b]).double().mean().item()
            assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(N_DRAWS), (a, b, agree)
    again = ups(0.5, impl, device, seed=1)
    assert again.equal(half["seed 1"])


def test_each_step_and_stream_draws_anew():
    draws = [op.random_bits(7, step, 0, 1 << 16, stream).double() for step in (1, 2, 2**31 - 1) for stream in range(3)]
    correlation = torch.corrcoef(torch.stack(draws))
    assert worst(correlation - torch.eye(len(draws))) < 4 / math.sqrt(1 << 16)
    assert all(0 <= t.min() < 8 and 65528 < t.max() < 65536 for t in draws)


@both
@pytest.mark.parametrize(("master", "states"), [("stochastic", "fp32"), ("stochastic", "bf16"), ("split", "bf16")])
def test_shards_round_as_the_whole(master, states, impl, device):
    """Shards are cut anywhere, and each is given its offset."""
    whole, state, gradient = start(1600, torch.bfloat16, master, states, device)
    grads = [gradient() for _ in range(3)]
    full, full_state = run(whole.clone(), clone(state), grads, impl, seed=9)
    for a, b in itertools.pairwise([0, 1, 8, 21, 540, 1055, 1600]):
        param = whole[a:b].clone()
        shard = op.AdamWState(**{name: t[a:b].clone() for name, t in state.tensors().items()})
        for first, grad in enumerate(grads, 1):
            run(param, shard, [grad[a:b]], impl, first, seed=9, offset=a)
        assert same(param, full[a:b]), (a, b)
        assert all(same(t, full_state.tensors()[name][a:b]) for name, t in shard.tensors().items()), (a, b)


@both
def test_shards_of_8_bit_states(impl, device):
    """The size of the whole decides: each of these shards alone would keep fp32 states."""
    n, cut = op.LEAST_8BIT + 512, 9 * 256
    whole, state, gradient = start(n, torch.bfloat16, "stochastic", "8bit", device)
    grad = gradient()
    parts = []
    for a, b in ((0, cut), (cut, n)):
        param = whole[a:b].clone()
        kept = kernels.adamw_state(param, "stochastic", "8bit", whole=n)
        parts.append(run(param, kept, [grad[a:b]], impl, seed=9, offset=a))
    run(whole, state, [grad], impl, seed=9)
    assert same(torch.cat([p for p, _ in parts]), whole)
    for name, t in state.tensors().items():
        assert same(torch.cat([s.tensors()[name] for _, s in parts]), t), name


def test_no_two_tensors_nor_seeds_of_a_user_share_draws():
    model = new_model(tiny(), "cpu", torch.bfloat16)
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    seeds = [s for seed in (0, 1, 42, 65536) for s in AdamW(model, **settings, seed=seed).seeds.values()]
    assert len(set(seeds)) == len(seeds)


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


def test_the_maps_are_bitsandbytes():
    """Entries of create_dynamic_map(signed), of its source: per decade, middles of linspace(0.1, 1)."""
    for signed in (True, False):
        entries = [0.0, 1.0]
        for i in range(7):
            n = 2**i if signed else 2 ** (i + 1)
            edges = torch.linspace(0.1, 1, n + 1, dtype=torch.float64)
            middles = (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
            entries += middles + [-x for x in middles] * signed
        truth = torch.tensor(sorted(entries), dtype=torch.float64)
        assert len(truth) == 256 and worst(dynamic_map.dynamic_map(signed).double() - truth) < 1e-7


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_entry(signed):
    """Random magnitudes over twelve decades, every entry, and both sides of the middle between any two."""
    entries = dynamic_map.dynamic_map(signed).double()
    middles = (entries[1:] + entries[:-1]) / 2
    x = torch.cat([entries, middles * (1 + 1e-5), middles * (1 - 1e-5), 10 ** (-12 * torch.rand(5000).double())])
    x = (torch.cat([x, -x]) if signed else x).float()
    x = x[: len(x) // 255 * 255].view(-1, 255)
    x = torch.cat([x, torch.ones(len(x), 1)], 1).flatten() * 3.7  # a maximum in every block
    code, absmax = dynamic_map.encode_ref(x, signed)
    assert same(absmax, torch.full_like(absmax, 3.7))
    ratio = x.double() / 3.7
    away = (ratio[:, None] - entries).abs()
    if not signed:
        away[ratio != 0, 0] = math.inf  # small is not none
    nearest = away.min(1).values
    chosen = away.gather(1, code.long()[:, None])[:, 0]
    assert ((chosen - nearest) <= 1e-6 * ratio.abs()).all()
    assert worst(dynamic_map.decode_ref(code, absmax, signed).double() - 3.7 * entries[code.long()]) < 1e-6


@triton.jit
def _encode_kernel(x_ptr, cells_ptr, code_ptr, absmax_ptr, SIGNED: tl.constexpr):
    at = tl.program_id(0) * 2048 + tl.arange(0, 2048)
    code, absmax = dynamic_map.encode(tl.load(x_ptr + at), cells_ptr, SIGNED, 2048)
    tl.store(code_ptr + at, code)
    tl.store(absmax_ptr + tl.program_id(0) * 8 + tl.arange(0, 8), absmax)


def awkward_ratios(signed):
    """Return three numbers on each side of every change of code and of every bound of a cell, and random ones.

    Both codes rise with the ratio within a cell, so these show any difference that there is.
    """

    def place(bits):  # is another after a change or a bound
        x = bits.view(torch.float32)
        return dynamic_map._rank_ref(x, signed) * 1000 + dynamic_map._cell(x)

    every = torch.arange(0x00800000, 0x3F800000, 4096, dtype=torch.int32)
    here = (place(every).diff() != 0).nonzero()[:, 0]
    low, high = every[here], every[here + 1]
    for _ in range(12):
        middle = (low + high) // 2
        is_low = place(middle) == place(low)
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    near = (low[:, None] + torch.arange(-2, 4, dtype=torch.int32)).flatten().view(torch.float32)
    special = torch.tensor([0, 1e-45, 1.1e-38, 2.0**-126, 2.0**-22, 1])
    return torch.cat([near, torch.rand(4000), 10 ** (-50 * torch.rand(4000)), special])


@needs_kernels
@pytest.mark.parametrize("maximum", [1.0, 3.7, 2.0**-126, 1.5 * 2.0**127, 2.0**-127, math.inf, math.nan])
@pytest.mark.parametrize("signed", [True, False])
def test_the_kernels_codes_are_the_references(signed, maximum, device):
    """Wherever a code could differ: with the maximum 1, the numbers are the ratios themselves."""
    x = awkward_ratios(signed)
    x = torch.nn.functional.pad(x, (0, -len(x) % (8 * 255))).view(-1, 255)
    x = torch.cat([x, torch.ones(len(x), 1)], 1) * (maximum if math.isfinite(maximum) else 1)  # whole programs
    x[:, 7] = maximum
    if signed:
        x *= torch.where(torch.rand(x.shape) < 0.5, -1, 1)
    x = x.flatten().to(device)
    code, absmax = x.new_empty(len(x), dtype=torch.uint8), x.new_empty(len(x) // 256)
    cells = dynamic_map.tables(x.device)[1]
    _encode_kernel[(len(x) // 2048,)](x, cells, code, absmax, signed, enable_fp_fusion=False)
    code_ref, absmax_ref = dynamic_map.encode_ref(x, signed)
    assert code.equal(code_ref) and same(absmax.nan_to_num(7), absmax_ref.nan_to_num(7))


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("states", "spoilt"), [("fp32", 1), ("bf16", 1), ("8bit", 256)])
def test_what_is_not_finite_surfaces(states, spoilt, bad, impl, device):
    """In its element, with 8-bit states in its block, then for good; and nowhere else."""
    n = several_tiles(states) + 300
    param, state, gradient = start(n, torch.bfloat16, "split", states, device)
    grads = [gradient(), gradient(), gradient()]
    grads[1][1000] = bad
    run(param, state, grads, impl)
    assert param[1000].isnan()
    block = slice(1000, 1001) if spoilt == 1 else slice(768, 1024)
    inside = torch.zeros(n, dtype=torch.bool, device=device)
    inside[block] = True
    assert param[inside].isnan().all() and param[~inside].isfinite().all()


def test_8_bit_states_track_fp32(device):
    """Least squares from far off, 200 steps: the loss falls as with fp32 states, to 0.5% of where it began."""
    draw = torch.Generator().manual_seed(1)
    x, goal = (torch.randn(64, 128, generator=draw).to(device), torch.randn(64, 64, generator=draw).to(device))
    curves = {}
    for states in ("fp32", "8bit"):
        param = torch.zeros(128, 64, device=device)
        state, curves[states] = kernels.adamw_state(param, "split", states), []
        for step in range(1, 201):
            error = x @ param - goal
            curves[states].append(error.square().mean().item())
            run(param, state, [x.T @ error / len(x)], "auto", first=step, lr=3e-3, weight_decay=0.0)
    assert state.m.dtype == torch.uint8 and curves["fp32"][-1] < 0.2 * curves["fp32"][0]
    assert max(abs(a - b) for a, b in zip(*curves.values(), strict=True)) < 0.005 * curves["fp32"][0]


# ---- in a run -------------------------------------------------------------------------------------------------------


def tiny():
    return ModelConfig(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=300, max_seq_len=64, head_dim=16,
        tied=False,
    )  # fmt: skip


@modes
def test_resumed_is_bit_equal(dtype, master, states, tmp_path):
    def optimizer_of(seed):
        model = new_model(tiny(), "cpu", dtype)
        model.init_weights(seed)
        settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        return AdamW(model, **settings, master=master, states=states, seed=3)

    def go(optimizer, steps):
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            for p in optimizer.params.values():
                p.grad = torch.randn(p.shape, generator=draw).to(dtype)
            optimizer.step(1e-2, optimizer.grad_norm(), 1.0)

    unbroken = optimizer_of(0)
    go(unbroken, range(3))
    save_checkpoint(tmp_path, 3, unbroken.tensors(), {}, keep=1)
    resumed = optimizer_of(1)
    checkpoint.load(checkpoint.open_checkpoint(tmp_path / "checkpoint-3"), resumed.tensors())
    resumed.n_updates = unbroken.n_updates
    go(unbroken, range(3, 6)), go(resumed, range(3, 6))
    ours, theirs = resumed.tensors(), unbroken.tensors()
    assert ours.keys() == theirs.keys() and all(same(ours[name].tensor, shard.tensor) for name, shard in theirs.items())
    kinds = {name.split(".")[0] for name in ours}
    assert kinds == {"param", "m", "v"} | ({"m_absmax", "v_absmax"} if states == "8bit" else set()) | (
        {{"fp32": "master", "split": "low"}.get(master, "param")} if dtype == torch.bfloat16 else set()
    )


@modes
@pytest.mark.parametrize("impl", ["triton", "ref"])
def test_where_apply_is_false_nothing_changes(dtype, master, states, impl, device):
    settings = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=2, impl=impl)
    param, state, gradient = start(several_tiles(states) + 8, dtype, master, states, device)
    op.adamw(param, gradient(), state, **settings | {"step": 1})
    before = {name: t.clone() for name, t in {"param": param, **state.tensors()}.items()}
    grad, nan = gradient(), torch.tensor(torch.nan, device=device)
    op.adamw(param, grad * nan, state, grad_scale=nan, apply=torch.tensor(False, device=device), **settings)
    assert all(t.equal(before[name]) for name, t in {"param": param, **state.tensors()}.items())
    op.adamw(param, grad, state, apply=torch.tensor(True, device=device), **settings)
    applied = {name: t.clone() for name, t in {"param": param, **state.tensors()}.items()}
    for name, t in {"param": param, **state.tensors()}.items():
        t.copy_(before[name])
    op.adamw(param, grad, state, **settings)
    assert all(t.equal(applied[name]) for name, t in {"param": param, **state.tensors()}.items())
    assert not param.equal(before["param"])
    with pytest.raises(ValueError, match="wanted one bool"):
        op.adamw(param, grad, state, apply=torch.ones((), device=device), **settings)


# ---- the operators --------------------------------------------------------------------------------------------------


@modes
def test_registered_for_torch_compile(dtype, master, states, device):
    param, state, gradient = start(several_tiles(states) + 8, dtype, master, states, device)
    kept = (state.m, state.v, state.m_absmax, state.v_absmax, state.low, state.master)
    one = torch.ones((), device=device)
    numbers = (1e-2, None, 1.0, one, one > 0, 0.9, 0.99, 1e-8, 0.1, 1, 7, 0)
    torch.library.opcheck(op.update, (param, gradient(), *kept, *numbers))


@needs_kernels
def test_nothing_else_is_written(device):
    param, state, gradient = start(600, torch.bfloat16, "split", "fp32", device)
    grad, scale = gradient(), torch.tensor(0.5, device=device)
    before = grad.clone(), scale.clone()
    run(param, state, [grad], "triton", grad_scale=scale)
    assert same(grad, before[0]) and same(scale, before[1])


def half_of_8_bits(kept):
    """States of which one has its maxima, and the other none."""
    m, v = torch.zeros(2, 8, dtype=torch.uint8 if kept == "m_absmax" else torch.float32)
    return op.AdamWState(m, v, **{kept: torch.zeros(1)})


def of_two_masters():
    low, master = torch.zeros(8, dtype=torch.int16), torch.zeros(8)
    return op.AdamWState(torch.zeros(8), torch.zeros(8), low=low, master=master)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"param": torch.zeros(8, dtype=torch.float16)}, "param is torch.float16"),
        ({"grad": torch.zeros(9)}, r"grad is \(9,\) torch.float32, wanted \(8,\)"),
        ({"grad": torch.zeros(8, dtype=torch.float16)}, "in fp32 or bf16"),
        ({"state": kernels.adamw_state(torch.zeros(9))}, r"m is \(9,\).*wanted contiguous \(8,\)"),
        ({"state": kernels.adamw_state(torch.zeros(8), states="bf16"), "param": torch.zeros(4, 4).T[:2]}, "contiguous"),
        ({"state": kernels.adamw_state(torch.zeros(8, dtype=torch.bfloat16))}, "its own master"),
        ({"state": half_of_8_bits("m_absmax")}, "the state is none of adamw_state's: m, v, m_absmax"),
        ({"state": half_of_8_bits("v_absmax")}, "the state is none of adamw_state's: m, v, v_absmax"),
        ({"state": of_two_masters(), "param": torch.zeros(8, dtype=torch.bfloat16)}, "the state is none of .*master"),
        ({"state": op.AdamWState(*torch.zeros(2, 8).double())}, "m is .* torch.float64 on .*, wanted contiguous"),
        ({"state": op.AdamWState(torch.zeros(8), torch.zeros(8).bfloat16())}, "v is .* torch.bfloat16 on"),
        ({"state": op.AdamWState(torch.zeros(8), torch.zeros(16)[::2])}, "v is .*wanted contiguous"),
        ({"state": op.AdamWState(*torch.zeros(2, 8, device="meta"))}, "m is .* on meta, wanted contiguous"),
        ({"apply": torch.ones(1)}, "apply is .* torch.float32, wanted one bool"),
        ({"apply": torch.ones(2, dtype=torch.bool)}, r"apply is \(2,\)"),
        ({"apply": torch.ones(1, dtype=torch.bool, device="meta")}, "wanted one bool on"),
        ({"lr": torch.zeros((), device="meta")}, r"lr is \(\) on meta, wanted one number on"),
        ({"step": 0}, "step 0"), ({"seed": 2**32}, "seed 4294967296"), ({"offset": -1}, "offset -1"),
        ({"lr": torch.zeros(2)}, r"lr is \(2,\)"), ({"grad_scale": torch.zeros(2)}, r"grad_scale is \(2,\)"),
        ({"impl": "magic"}, "impl is 'magic'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(changes, message):
    given = SETTINGS | {"param": torch.zeros(8), "grad": torch.zeros(8), "step": 1} | changes
    given.setdefault("state", kernels.adamw_state(torch.zeros(8)))
    if given["param"].ndim == 2:
        given["grad"] = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        kernels.adamw(**given)


@pytest.mark.parametrize("impl", ["ref", "native", "triton"])
def test_blocks_of_8_bits_that_are_rounded_at_random_begin_with_a_draw(impl):
    param, grad = torch.zeros(2, 4096, dtype=torch.bfloat16)
    for master, offset in (("stochastic", 3), ("stochastic", 4)):
        state = kernels.adamw_state(param, master, "8bit")
        with pytest.raises(ValueError, match=f"offset is {offset}, wanted a multiple of 8 for 8-bit states"):
            kernels.adamw(param, grad, state, step=1, offset=offset, impl=impl, **SETTINGS)
    for master, states, offset in (("stochastic", "8bit", 8), ("split", "8bit", 3), ("stochastic", "fp32", 3)):
        state = kernels.adamw_state(param, master, states)
        kernels.adamw(param, grad, state, step=1, offset=offset, impl="ref", **SETTINGS)


@pytest.mark.parametrize(("name", "value"), [("master", "double"), ("states", "4bit")])
def test_unknown_names_are_said(name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}', wanted one of"):
        kernels.adamw_state(torch.zeros(8), **{name: value})


# ---- the norm of the gradients --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grad_norm(dtype, impl, device):
    """Tensors that end within a tile, at its end, after it; empty ones; more partial sums than one tile of them."""
    sizes = [0, 1, 255, 512, 513, 0, 1500, 2048, 3]
    grads = [(torch.randn(n) * 10 ** (3 * torch.rand(n) - 2)).to(device, dtype) for n in sizes]
    grads.append(torch.randn(6, 40, device=device).to(dtype).T)  # not contiguous
    truth = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    norm = kernels.grad_norm(grads, impl)
    assert norm.shape == () and norm.dtype == torch.float32
    assert abs(norm.item() / truth - 1) < 1e-6
    assert all(kernels.grad_norm(grads, impl).equal(norm) for _ in range(3))
    assert kernels.grad_norm(grads[:1], impl) == 0


@both
def test_grad_norm_of_a_large_tensor_loses_nothing(impl, device, monkeypatch):
    for kernel in launch_table("grad_norm").values():
        monkeypatch.setitem(kernel["interpreter"], "0", kernel["interpreter"]["0"] | {"BLOCK": 1 << 16})
    g = torch.randn(3 << 20, device=device)
    assert abs(kernels.grad_norm([g], impl).item() / g.double().norm().item() - 1) < 1e-6


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [(0, 0), (1, 1499), (2, 0)])
def test_grad_norm_lets_what_is_not_finite_through(at, bad, impl, device):
    grads = [torch.ones(n, device=device) for n in (1, 1500, 700)]
    grads[at[0]][at[1]] = bad
    norm = kernels.grad_norm(grads, impl)
    assert norm.isnan() if math.isnan(bad) else norm.isinf()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_gradients_that_come_one_by_one_has_the_same_bits(dtype, impl, device):
    """Tensors of one chunk and of many, aligned and not, with a number that is not finite at last."""
    grads = [torch.randn(n, device=device).to(dtype) for n in (1, 255, 512, 513, 1500, 2048, 20000, 3)]
    grads.append(torch.randn(6, 40, device=device).to(dtype).T)
    for bad in (None, math.nan, math.inf):
        if bad:
            grads[4][7] = bad
        parts = [kernels.sum_squares(g, impl) for g in grads]
        norm, wanted = kernels.norm_of_sums(parts, impl), kernels.grad_norm(grads, impl)
        assert norm.dtype == torch.float32 and norm.shape == () and norm.isfinite() == (bad is None)
        assert norm.equal(wanted) or (norm.isnan() and wanted.isnan())


@pytest.mark.parametrize("impl", ["auto", "ref", "cuda"])
def test_the_norm_of_no_gradients_and_of_those_on_two_devices_is_refused(impl, device):
    with pytest.raises(ValueError, match="grad_norm: no gradients given"):
        kernels.grad_norm([], impl)
    grads = [torch.zeros(2, device=device), torch.zeros(2, device="meta")]
    for given in (grads, grads[::-1]):
        with pytest.raises(ValueError, match=r"grad_norm: gradients on \S+ and \S+, wanted one device"):
            kernels.grad_norm(given, impl)


def test_grad_norm_is_registered(device):
    grads = [torch.randn(5, device=device), torch.randn(2, 3, device=device)]
    torch.library.opcheck(norm_op.norm, (grads,))
    torch.library.opcheck(norm_op.sums, (torch.randn(1500, device=device),))
    torch.library.opcheck(norm_op.of_sums, (torch.rand(21, device=device),))


# ---- full sizes -----------------------------------------------------------------------------------------------------


@needs_gpu
def test_a_tensor_of_more_than_2_to_the_31_elements():
    """The last elements of one are updated as those of a small one."""
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    n, tail = 2**31 + 4096, 2048
    param = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    state = kernels.adamw_state(param, "stochastic", "bf16")
    run(param, state, [grad], "triton")
    short = torch.ones(tail, dtype=torch.bfloat16, device="cuda")
    short_state = kernels.adamw_state(short, "stochastic", "bf16")
    run(short, short_state, [grad[:tail]], "triton", offset=n - tail)
    assert same(param[-tail:], short) and same(state.m[-tail:], short_state.m) and (param < 1).all()
    del param, state
    assert abs(kernels.grad_norm([grad]).item() / math.sqrt(n) - 1) < 1e-6
