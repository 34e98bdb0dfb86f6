"""Steps of two ranks in bf16, with each kind of the optimizer's states: the bits of one process."""

import pytest
import torch

from tests.helpers import rank_steps
from tests.helpers.forks import ranks
from tests.helpers.rank_steps import KINDS, LR, N_STEPS

CODE = "from tests.helpers.rank_steps import main\nmain()"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks has after its steps, of one process group for all kinds."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, said = ranks(2, folder, code=CODE)
    assert codes == [0, 0], said
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def gradients(model, step):
    """Return each micro-batch's gradients {name: bf16}, and the sum of the losses."""
    made, total = [], 0.0
    for batch in rank_steps.micro_batches(step):
        loss = model.loss(batch)
        loss.backward()
        total += loss.item()
        made.append({name: p.grad for name, p in model.named_parameters()})
        for p in model.parameters():
            p.grad = None
    return made, total


def add_up(parts, replicas):
    """Sum four micro-batches' gradients of a parameter as two ranks do, of which each has every second one.

    Always in fp32 over the ranks. Replicas keep their own sums in fp32 and round once; shards round after each pass.
    """
    a, b, c, d = (part.float() for part in parts)
    if replicas == 2:
        return ((a + c) + (b + d)).bfloat16()
    return (a + b).bfloat16() + (c + d).bfloat16()


def run_alone(replicas, kind):
    model = rank_steps.make_model()
    optimizer, figures = rank_steps.make_optimizer(model, *kind), []
    for step in range(1, N_STEPS + 1):
        made, loss = gradients(model, step)
        for name, p in model.named_parameters():
            p.grad = add_up([part[name] for part in made], replicas)
        norm = optimizer.grad_norm()
        figures.append((loss, norm.item()))
        optimizer.step(LR, norm, 0.0, torch.isfinite(norm))
    return {name: shard.tensor for name, shard in optimizer.tensors().items()}, figures


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("replicas", [1, 2])
def test_two_ranks_in_bf16_have_the_bits_of_one(found, replicas, kind):
    """Weights, master and states; gradients are summed in fp32, and a shard rounds at random as the whole does."""
    wanted, figures = run_alone(replicas, kind)
    mine = [rank[(replicas, *kind)] for rank in found]
    for one in mine:
        assert one["rows"].keys() == wanted.keys()
        assert [x for pair in one["figures"] for x in pair] == pytest.approx(
            [x for pair in figures for x in pair], 1e-5
        )
    for name, whole in wanted.items():
        parts = [one["rows"][name] for one in mine]
        if replicas == 2:
            assert all(part.equal(whole) for part, _ in parts), name
        else:
            assert [first for _, first in parts] == [0, len(parts[0][0])], name
            assert torch.cat([part for part, _ in parts]).equal(whole), name
