"""Parts that ops share."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from kernels.ops import common
from tests.helpers.run import ROOT, environment

OLDEST = Path(sys.prefix) / "triton-3.6"  # put there by `make test`


def test_an_interpreter_that_numpy_has_left_behind_is_named():
    """Else the first loop of a kernel raises TypeError from within Triton."""
    if not OLDEST.exists() or numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0":
        pytest.skip(f"needs Triton 3.6 in {OLDEST} and NumPy 2.4 or newer")
    for interpret, ends in (("1", 1), ("0", 0)):
        env = environment() | {"PYTHONPATH": f"{OLDEST}:{ROOT}", "TRITON_INTERPRET": interpret}
        done = subprocess.run(
            [sys.executable, "-c", "import kernels"], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == ends, done.stderr
        assert ("install numpy<2.4 or a newer Triton" in done.stderr) == bool(ends)


CPU_CHOICES = {  # (impl, dtype, whether the op has a native function, whether the library is there): what runs
    ("auto", torch.float32, True, True): "native", ("auto", torch.bfloat16, True, True): "native",
    ("auto", torch.float16, True, True): "ref", ("auto", torch.float64, True, True): "ref",
    ("auto", torch.float32, True, False): "ref", ("auto", torch.float32, False, True): "ref",
    ("native", torch.float32, True, True): "native", ("native", torch.float32, False, True): "ref",
    ("ref", torch.float64, True, True): "ref",
}  # fmt: skip


@pytest.mark.parametrize(("impl", "dtype", "has_native", "is_built"), CPU_CHOICES)
def test_what_runs_on_a_cpu(impl, dtype, has_native, is_built, monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(common, "find_cpu", lambda: object() if is_built else None)
    monkeypatch.setattr(common, "load_cpu", lambda: None)
    more = {"has_native": True} if has_native else {}
    assert (
        common.choose_impl("op", impl, torch.zeros(1, dtype=dtype), **more)
        == CPU_CHOICES[impl, dtype, has_native, is_built]
    )


@pytest.mark.parametrize("is_built", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_operator_on_a_cpu_is_native_where_the_library_takes_the_dtype(dtype, is_built, monkeypatch):
    """As choose_impl() has it: the library reads other dtypes' bits as fp32."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(common, "find_cpu", lambda: object() if is_built else None)
    ran = []

    @common.operator(
        f"of_tests_{str(dtype)[6:]}_{is_built}", cpu=lambda x: ran.append("cpu") or x + 1, fake=torch.empty_like,
        native=lambda x: ran.append("native") or x + 1,
    )  # fmt: skip
    def launch(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("launched on a CPU")

    launch(torch.zeros(2, dtype=dtype))
    assert ran == [common.choose_impl("op", "auto", torch.zeros(2, dtype=dtype), True).replace("ref", "cpu")]


def test_an_operator_on_a_cpu_is_launched_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", True)
    monkeypatch.setattr(common, "find_cpu", object)

    def other(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("not launched")

    @common.operator("of_tests_interpreted", cpu=other, fake=torch.empty_like, native=other)
    def launch(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    assert launch(torch.zeros(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("impl", "dtype", "interpreted", "said"),
    [
        ("fast", torch.float32, False, "impl is 'fast', wanted one of"),
        ("native", torch.float16, False, "impl='native' runs on the CPU in fp32 and bf16"),
        ("triton", torch.float32, False, "impl='triton' runs on CUDA"),
        ("triton", torch.float64, True, "impl='triton' takes fp32, bf16 and fp16"),
    ],
)
def test_what_cannot_run_on_a_cpu(impl, dtype, interpreted, said, monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", interpreted)
    with pytest.raises(ValueError, match=f"^op: {said}"):
        common.choose_impl("op", impl, torch.zeros(1, dtype=dtype))


def test_the_next_power_of_two_is_the_smallest_that_holds():
    found = [common.next_power_of_2(n) for n in range(130)]
    assert found == [min(p for p in (1, 2, 4, 8, 16, 32, 64, 128, 256) if p >= n) for n in range(130)]


@pytest.mark.parametrize(
    ("capability", "chip"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_100")],
)
def test_a_card_takes_the_launches_of_the_newest_chip_that_is_not_newer(capability, chip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.chip(torch.device("cuda")) == chip


def test_a_card_older_than_all_chips_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="this card is sm_75, wanted sm_80 or newer"):
        common.chip(torch.device("cuda"))


@pytest.mark.parametrize("op", sorted(path.stem for path in common.LAUNCH.glob("*.json")))
def test_a_size_takes_the_first_entry_that_holds_it(op, monkeypatch):
    """A size that is an entry's own is held by it; one beyond all entries takes the last."""
    monkeypatch.setattr(common, "chip_override", "sm_90")
    for kernel, by_chip in common.launch_table(op).items():
        entries = [(int(size), config) for size, config in by_chip["sm_90"].items()]
        assert entries == sorted(entries, key=lambda entry: entry[0])
        for i, (size, config) in enumerate(entries):
            following = entries[min(i + 1, len(entries) - 1)][1]
            for asked, want in ((size, config), (size + 1, following)):
                found = common.launch_config(op, kernel, torch.device("cpu"), asked)
                assert found == {name: value for name, value in want.items() if name != "from"}, (kernel, asked)
