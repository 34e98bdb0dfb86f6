"""Answers between steps, in groups whose caches take no more memory than a step does."""

from collections.abc import Container, Sequence

from engine.inference.generation import generate
from engine.model.config import ModelConfig
from engine.model.llama import Transformer


def most_at_once(c: ModelConfig, max_tokens: int, n_positions: int) -> int:
    """Return how many answers fit beside micro-batches of max_tokens, prompt and answer n_positions long, at least 1.

    A position of a cache takes 2 K Dh numbers a layer. A micro-batch of T tokens keeps D a token and layer at least,
    with --recompute block, so T D / (2 K Dh) positions take what is free between steps.
    """
    return max(1, max_tokens * c.dim // (2 * c.n_kv_heads * c.head_dim) // n_positions)


def answer(
    model: Transformer, max_tokens: int, prompts: Sequence[Sequence[int]], stop_ids: Container[int], n: int
) -> list[list[int]]:
    """Return the ids of greedy answers of at most n tokens, as generate() does, in groups of about one size.

    max_tokens: of a micro-batch, as large as the run's are now.
    """
    if not prompts:
        return []
    n_groups = -(-len(prompts) // most_at_once(model.config, max_tokens, max(map(len, prompts)) + n))
    size = -(-len(prompts) // n_groups)
    groups = (prompts[first : first + size] for first in range(0, len(prompts), size))
    return [ids for group in groups for ids in generate(model, group, stop_ids, n)]
