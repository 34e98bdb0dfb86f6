"""Text from a model: greedy or sampled, several prompts at once."""

from collections.abc import Callable, Container, Sequence

import torch

from engine.inference.decoder import MAX_ROWS, find_decoder
from engine.inference.kv_cache import KVCache, pack_prompts
from engine.model.llama import Transformer


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Return an id drawn from logits (V,).

    At temperature 0 it is the likeliest. Else it is one of the fewest ids whose probabilities add up to top_p.
    """
    if temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        probs, ids = probs.sort(descending=True, stable=True)
        probs[probs.cumsum(0) - probs >= top_p] = 0  # the first id always stays
        return int(ids[torch.multinomial(probs, 1, generator=generator)])
    return int(torch.multinomial(probs, 1, generator=generator))


@torch.no_grad()  # not inference_mode: training could not use the tensors that FSDP2 gathers in it
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    stop_ids: Container[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the ids that follow each prompt, up to and without a stop id.

    Each prompt draws from a generator of its own, so its answer does not depend on its neighbours' draws.
    on_token(prompt, id) is called for each id as it comes and may raise to stop. Raises ValueError for an empty prompt.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("generate: an empty prompt has no next token; begin with the tokenizer's bos_id")
    device, dtype = model.norm.device, model.norm.dtype
    prefill = pack_prompts([len(p) for p in prompts])
    ends = torch.tensor([p.end for p in prefill.prompts], device=device)
    longest = max(map(len, prompts)) + max_new_tokens
    cache = KVCache(model.config, len(prompts), longest, device, dtype, model.impl)
    cache.begin_prefill(prefill)
    tokens = torch.tensor([i for p in prompts for i in p], device=device)
    positions = torch.cat([torch.arange(len(p), device=device) for p in prompts])
    logits = model.logits(model(tokens, positions, cache=cache)[ends - 1])
    decoder = find_decoder(model, cache)
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = list(range(len(prompts)))  # prompts whose answers go on; a row of logits for each
    while True:
        drawn = {}
        for row, i in enumerate(unfinished):
            token = sample(logits[row], temperature, top_p, generators[i])
            if token in stop_ids:
                continue
            answers[i].append(token)
            if on_token:
                on_token(i, token)
            if len(answers[i]) < max_new_tokens:
                drawn[i] = token
        if not drawn:
            return answers
        unfinished = list(drawn)
        if decoder and len(unfinished) <= MAX_ROWS:
            logits = decoder.next_logits(list(drawn.values()), unfinished)
        else:
            positions = cache.begin_token(torch.tensor(unfinished, device=device))
            x = model(torch.tensor(list(drawn.values()), device=device), positions, cache=cache)
            logits = model.logits(x)
