"""Kernels that compute nothing and collectives that send nothing: what they allocate and would send is counted."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.interpreter import GridExecutor


@pytest.fixture
def unlaunched(monkeypatch):
    """Kernels that compute nothing in Triton's interpreter, where only what is kept and allocated counts."""
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)


@pytest.fixture
def fake_ranks(request):
    """The process group of rank 0 among request.param ranks."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()
