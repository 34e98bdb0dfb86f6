"""A process group whose collectives do nothing, for what FSDP2 allocates and sends."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def fake_ranks(request):
    """The process group of rank 0 among request.param ranks."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()
