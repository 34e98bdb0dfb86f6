"""How a launch is handed to the CUDA library: a stand-in for it notes every argument."""

import ctypes
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from kernels.native import cuda
from kernels.native.library import NativeError


def test_arguments_as_the_library_takes_them():
    x = torch.zeros(3)
    found = [cuda._as_ctypes(value) for value in (x, 2.5, 7, -(2**40), None)]
    assert [type(value) for value in found] == [
        ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    assert [value.value for value in found] == [x.data_ptr(), 2.5, 7, -(2**40), None]
    tile = torch.zeros(2, 3, 5, 128).half()[..., :64]
    request = cuda._as_ctypes(cuda.TileMap(tile, (1, 2, 4, 32)))._obj
    assert request.address == tile.data_ptr() and list(request.sizes) == [64, 5, 3, 2]
    assert list(request.strides) == [256, 5 * 256, 15 * 256] and list(request.box) == [32, 4, 2, 1]


class OnTheGpu:
    """A tensor's address, and a device that is not here."""

    def __init__(self, address):
        self.address, self.device = address, torch.device("cuda:1")

    def data_ptr(self):
        return self.address


@pytest.mark.parametrize(("code", "said"), [(0, None), (1, "cria_x: the compiled function was given a size"),
                                            (1002, r"cria_x: CUDA says 'word 2' \(error 2\)")])  # fmt: skip
def test_a_launch_runs_on_the_stream_of_its_tensors_device(code, said, monkeypatch):
    given, inside = [], []

    @contextmanager
    def on(device):
        inside.append(str(device))
        yield
        inside.append("left")

    def cria_x(*args):
        given.append(([arg.value for arg in args], list(inside)))
        return code

    library = SimpleNamespace(cria_x=cria_x, cria_cuda_error=lambda number: f"word {number}".encode())
    monkeypatch.setattr(cuda.torch, "Tensor", OnTheGpu)
    monkeypatch.setattr(cuda.torch.cuda, "device", on)
    monkeypatch.setattr(cuda.torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4096))
    monkeypatch.setattr(cuda, "load_cuda", lambda: library)
    launch = cuda.CudaLaunch("x.cu", "cria_x", "x", (1.5, OnTheGpu(64), None, 9), choices=(2, 0))
    if said:
        with pytest.raises(NativeError, match=said):
            cuda.run_on_gpu(launch)
    else:
        cuda.run_on_gpu(launch)
    assert given == [([1.5, 64, None, 9, 2, 0, 4096], ["cuda:1"])] and inside == ["cuda:1", "left"]


def test_a_launch_goes_to_whoever_runs_launches(monkeypatch):
    given = []
    assert cuda.runner is cuda.run_on_gpu
    monkeypatch.setattr(cuda, "runner", given.append)
    launch = cuda.CudaLaunch("x.cu", "cria_x", "x", ())
    cuda.run(launch)
    assert given == [launch] and (launch.grid, launch.threads, launch.shared_bytes, launch.choices) == ((1,), 32, 0, ())


def test_the_library_is_of_this_version(monkeypatch):
    library = SimpleNamespace(cria_cuda_error=SimpleNamespace())
    asked = []
    monkeypatch.setattr(cuda, "load", lambda *args: asked.append(args) or library)
    assert cuda.load_cuda.__wrapped__() is library and asked == [("cuda", cuda.ABI_VERSION)]
    assert library.cria_cuda_error.argtypes == [ctypes.c_int] and library.cria_cuda_error.restype is ctypes.c_char_p
