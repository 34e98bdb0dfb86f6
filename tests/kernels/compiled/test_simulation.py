"""Launches of Triton's kernels on the PTX machine."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from kernels.compiled import cuda_simulation, simulation
from kernels.compiled.ptx import Options, PtxError
from kernels.compiled.simulation import _allocate, on_machine
from kernels.compiled.tensor_map import encode_tensor_map
from kernels.native import cuda
from kernels.ops import common
from tests.helpers.compiler import run_compiler

OLDEST = Path(sys.prefix) / "triton-3.6"  # put there by `make test`


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_tiles_by_tensor_descriptors(version):
    if version == "3.6" and not OLDEST.exists():
        pytest.skip(f"needs Triton 3.6 in {OLDEST}: pip install --no-deps --target {OLDEST} triton==3.6.0")
    done = run_compiler("tests.helpers.descriptor_kernels", path=[OLDEST] if version == "3.6" else ())
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 10
    for case in cases:
        specialised = "specialised" in case["case"]
        assert case["error"] < 2**-7 and case["bulk copies"] >= 1 and (case["wgmma"] >= 2 or case["case"] == "sum"), (
            case
        )
        assert bool(case["setmaxnreg"]) is specialised
        if specialised and version == "3.6":  # a tile overwrites what stores passed to the warps, without a fence
            assert case["findings"] and all(text.startswith("proxy: overwrites") for text in case["findings"])
        else:
            assert case["findings"] == []


@pytest.mark.parametrize(("n_bytes", "alignment"), [(0, 1), (1, 16), (48, 128), (1000, 256)])
def test_a_kernels_own_memory_is_aligned_and_no_longer_than_asked(n_bytes, alignment):
    """A byte more would hide a write past it."""
    for _ in range(5):
        memory = _allocate(n_bytes, alignment)
        assert memory.nbytes == n_bytes and memory.data_ptr() % alignment == 0


def test_it_does_not_run_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(PtxError, match="TRITON_INTERPRET is set"), on_machine("sm_90"):
        pass


# ---- what reaches the machine, by stand-ins -------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "override"), [(None, "sm_80"), ("sm_90", "sm_90"), ("interpreter", None)])
def test_kernels_are_compiled_for_the_chip_and_launched_by_a_table(table, override, monkeypatch):
    given, function = [], object()
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    findings = []
    monkeypatch.setattr(
        simulation,
        "run_launch",
        lambda *args: (
            given.append((*args, common.chip_override, common.INTERPRETED)) or SimpleNamespace(findings=findings)
        ),
    )

    def edit(ptx):
        return ptx

    before = common.chip_override, common.INTERPRETED
    with on_machine("sm_80", edit, strict=True, table=table, late=True, reverse=True, check=False) as results:
        simulation.JITFunction.run(function, 1, grid=(3,), warmup=False, num_warps=4)
        findings.append("a race")
        with pytest.raises(AssertionError, match="a race"):
            simulation.JITFunction.run(function, 1, grid=(3,), warmup=False)
    options = Options(late=True, reverse=True, check=False)
    assert given[0] == ((function, (1,), {"num_warps": 4}), (3,), "sm_80", edit, options, override, True)
    assert len(results) == 2 and (common.chip_override, common.INTERPRETED) == before
    with on_machine("sm_80") as results:
        simulation.JITFunction.run(function, 1, grid=(3,), warmup=False)
    assert given[2][3:5] == (None, Options()) and len(results) == 1


def test_a_launch_is_compiled_once_and_given_its_arguments(monkeypatch):
    """With memory for each block, what a table reaches, and two parameters that Triton appends."""
    compiled, launched = [], []
    metadata = SimpleNamespace(
        name="k", tensordesc_meta=None, global_scratch_size=48, global_scratch_align=64, num_warps=8, shared=96
    )
    module = SimpleNamespace(launch=lambda *args, **named: launched.append((args, named)) or "result")
    x, reached = torch.zeros(4), torch.zeros(2)
    x.reached = [reached]
    signature = {"x": "*fp32", "BLOCK": "constexpr", "n": "i32", "scale": "fp32", "none": "*fp32"}
    bound = {"x": x, "BLOCK": 64, "n": 5, "scale": 2, "none": None}
    monkeypatch.setattr(simulation, "_modules", {})
    monkeypatch.setattr(
        simulation,
        "bind_arguments",
        lambda f, args, kwargs, chip: (f"options of {chip}", signature, {(1,): 64}, {}, bound),
    )
    monkeypatch.setattr(simulation, "ASTSource", lambda *args: args)
    monkeypatch.setattr(simulation, "_compile", lambda *args: compiled.append(args) or (module, metadata))
    fn = SimpleNamespace(__module__="m", __qualname__="k")
    function = SimpleNamespace(fn=fn)
    options = Options(late=True)
    for grid in ((2, 3), lambda named: (named["n"], 1)):
        assert simulation.run_launch((function, (), {}), grid, "sm_90", None, options) == "result"
    assert compiled == [((function, signature, {(1,): 64}, {}), "sm_90", "options of sm_90", None)]
    for (args, named), shape, blocks in zip(launched, ((2, 3), (5, 1)), (6, 5), strict=True):
        kernel, grid, values = args
        assert (
            kernel is None and grid == shape and values[0] is x and values[1:4] == [5, 2.0, None] and values[5] is None
        )
        assert type(values[2]) is float and values[4].nbytes == 48 * blocks and values[4].data_ptr() % 64 == 0
        assert (named["num_warps"], named["shared_bytes"], named["options"]) == (8, 96, options)
        assert named["tensors"].keys() == {"x", "scratch", "reached 0"} and named["tensors"]["reached 0"] is reached
    simulation.run_launch((function, (), {}), (1,), "sm_90", len, options)
    simulation.run_launch((function, (), {}), (1,), "sm_80", None, options)
    assert [args[1:] for args in compiled[1:]] == [
        ("sm_90", "options of sm_90", len),
        ("sm_80", "options of sm_80", None),
    ]


def test_a_tensor_descriptor_becomes_a_map_its_sizes_and_strides():
    base = torch.zeros(200, dtype=torch.bfloat16)
    view = SimpleNamespace(base=base, shape=[5, 24], strides=[32, 1], padding="nan")
    metadata = SimpleNamespace(name="k", tensordesc_meta=[{"swizzle": 2, "block_size": [4, 16]}])
    signature = {"d": "tensordesc<bf16[4, 16]>", "n": "i64"}
    reach, values = simulation._as_parameters(signature, {"d": view, "n": 7}, metadata)
    expected = base.as_strided((5, 24), (32, 1))
    assert values == [encode_tensor_map(expected, [4, 16], 64, True), 5, 24, 32, 1, 7]
    assert reach["d"].shape == (5, 24) and reach["d"].stride() == (32, 1) and reach["d"].data_ptr() == base.data_ptr()
    with pytest.raises(PtxError, match="k: d is a tensor descriptor, which the machine runs on sm_90 only"):
        simulation._as_parameters(signature, {"d": view, "n": 7}, SimpleNamespace(name="k", tensordesc_meta=None))


def test_a_launch_of_csrc_is_given_its_arguments(monkeypatch):
    """Maps as bytes; what a table or a map reaches beside them; the one kernel that has the name."""
    launched, read = [], []
    tile, reached, x = torch.zeros(2, 3, 5, 64).half(), torch.zeros(3), torch.zeros(4)

    class Result(tuple):
        pass

    module = SimpleNamespace(
        params={"long_a_name": [], "long_b_name": []},
        launch=lambda *args, **named: launched.append((args, named)) or "ran",
    )
    monkeypatch.setattr(cuda_simulation, "_read", lambda *args: read.append(args) or module)
    monkeypatch.setattr(cuda_simulation, "replace", lambda result, kernel: (result, kernel))
    mapped = cuda.TileMap(tile, (1, 1, 4, 64))
    launch = cuda.CudaLaunch(
        "x.cu", "cria_x", "b_na", (x, mapped, 2.5, None), grid=(7,), threads=96, shared_bytes=80, reached=[reached]
    )
    with cuda_simulation.cuda_on_machine("sm_80", len, late=True) as results:
        cuda.run(launch)
    assert results == [("ran", "cria_x")] and read == [("x.cu", "sm_80", len)]
    (((kernel, grid, values), named),) = launched
    assert (kernel, grid) == ("long_b_name", (7,)) and values[0] is x and values[2:] == [2.5, None]
    assert values[1] == encode_tensor_map(tile, (1, 1, 4, 64), 128)
    assert (named["num_warps"], named["shared_bytes"], named["options"]) == (3, 80, Options(late=True))
    assert named["tensors"]["reached 0"] is reached and named["tensors"]["reached 1"] is tile
    for name, n in (("_name", 2), ("zoo", 0)):
        wrong = cuda.CudaLaunch("x.cu", "cria_x", name, (x,))
        with pytest.raises(PtxError, match=f"x.cu: {n} kernels are called {name}, wanted one"):
            cuda_simulation.run_launch(wrong, "sm_90")
    assert read[1:] == [("x.cu", "sm_90", None)] * 2
