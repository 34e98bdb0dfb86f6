"""GPUs divided among replicas, in numbers and in words."""

import pytest

from engine.model.adapter import AdapterConfig
from engine.planning.setting import Setting, describe_mesh, find_mesh_problems


@pytest.mark.parametrize(("shards", "replicas"), [(8, 1), (4, 2), (1, 8)])
def test_replicas_are_changed_without_changing_the_number_of_gpus(shards, replicas):
    setting = Setting(states="8bit", shards=shards, replicas=replicas)
    changed = setting.with_replicas(2)
    assert (changed.shards, changed.replicas, changed.n_cards, changed.states) == (4, 2, 8, "8bit")


@pytest.mark.parametrize(
    ("changes", "leave"), [({}, True), ({"shards": 2}, False), ({"replicas": 2}, False), ({"offload": False}, False),
                           ({"on_cpu": False}, False)]
)  # fmt: skip
def test_gradients_leave_one_gpu_for_a_cpu_that_updates(changes, leave):
    assert Setting(**{"offload": True, "on_cpu": True} | changes).gradients_leave == leave


def test_the_embedding_is_trained_with_the_model_or_where_an_adapter_names_it():
    found = {saved: Setting(adapter=AdapterConfig(saved=saved)).trains_embedding for saved in (
        (), ("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")
    )}  # fmt: skip
    assert Setting().trains_embedding and found == {saved: "embed_tokens" in saved for saved in found}


def test_a_mesh_in_words():
    assert [describe_mesh(*mesh) for mesh in ((8, 1), (4, 2), (1, 8))] == [
        "sharded over 8", "2 replicas of 4 shards", "8 replicas"
    ]  # fmt: skip


def test_all_problems_of_a_mesh_are_named_at_once():
    assert find_mesh_problems(8, 2, 128, False) == find_mesh_problems(1, None, 7, True) == []
    problems = find_mesh_problems(3, 2, 128, True)
    for text, problem in zip(("pass 126 or 129", "wanted one of 1, 3", "is not projected"), problems, strict=True):
        assert text in problem
    assert find_mesh_problems(1, 1, 128, False) == find_mesh_problems(64, 2, 128, False) == []
    assert ["is not projected" in problem for problem in find_mesh_problems(2, 1, 128, True)] == [True]
    for n_cards in (-1, 0, 65):
        assert find_mesh_problems(n_cards, 2, 128, False) == [f"--gpus is {n_cards}, wanted 1 to 64"]
