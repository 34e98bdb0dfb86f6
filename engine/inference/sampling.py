"""How the next token is drawn from logits: penalties, a grammar's mask, temperature, and the tokens that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True)
class Sampling:
    """The settings of one request, applied in the order given here.

    logits of tokens in prompt or answer: divided by repetition_penalty if positive, else multiplied (arXiv:1909.05858);
    of each token of the answer: less frequency_penalty times its count, less presence_penalty once; plus its bias.
    temperature 0 takes the likeliest token. Else logits are divided by it, and of their softmax p there stay: the top_k
    likeliest (0: all), the fewest whose p add up to top_p, and those of at least min_p times the largest p.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)  # {id: what is added to its logit}
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    n_logprobs: int | None = None  # likeliest tokens to tell the log probabilities of; None: not even the drawn one

    def is_greedy(self) -> bool:
        """Return whether the likeliest token of the logits as they are is taken, and nothing else is wanted."""
        plain = self.repetition_penalty == 1 and self.frequency_penalty == self.presence_penalty == 0 and not self.bias
        return plain and self.temperature == 0 and self.n_logprobs is None


@dataclass(frozen=True)
class Draw:
    """A drawn token. Log probabilities are natural, of the model's own distribution, before any setting."""

    id: int
    logprob: float | None = None
    likeliest: Sequence[tuple[int, float]] = ()  # (id, log probability), the likeliest first


class Grammar(Protocol):
    """What a structured answer may go on with."""

    def mask(self, logits: torch.Tensor) -> None:
        """Set the logits (V,) of tokens that may not come next to -inf."""

    def accept(self, id: int) -> None:
        """Take the drawn token."""

    def is_complete(self) -> bool:
        """Return whether nothing may follow any more."""


class Sampler:
    """Draws the tokens of one answer. Equal settings and logits give equal answers, whatever else is being answered."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], device: torch.device, grammar: Grammar | None = None):
        self.sampling, self.grammar, self.device = sampling, grammar, device
        self.generator = torch.Generator(device).manual_seed(sampling.seed)
        self.counts: dict[int, int] = {}  # of the answer's tokens
        self.prompt_ids = torch.tensor(sorted(set(prompt)), device=device) if sampling.repetition_penalty != 1 else None

    def is_greedy(self) -> bool:
        """Return whether draw() is the argmax of the logits."""
        return self.grammar is None and self.sampling.is_greedy()

    def draw(self, logits: torch.Tensor) -> Draw:
        """Return the next token of an answer behind these logits (V,)."""
        wanted = self.sampling.n_logprobs
        logits = logits.float()
        logprobs = None if wanted is None else logits.log_softmax(-1)
        id = self._draw_id(self._adjust(logits.clone()))
        self.counts[id] = self.counts.get(id, 0) + 1
        if self.grammar is not None:
            self.grammar.accept(id)
        if logprobs is None or wanted is None:
            return Draw(id)
        values, ids = logprobs.topk(min(wanted, len(logprobs)))
        return Draw(id, logprobs[id].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply penalties, biases and the grammar to logits (V,), in place."""
        s = self.sampling
        answered = torch.tensor(list(self.counts), dtype=torch.int64, device=self.device)
        if self.prompt_ids is not None:
            seen = torch.cat((self.prompt_ids, answered)).unique()
            x = logits[seen]
            logits[seen] = torch.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
        if (s.frequency_penalty or s.presence_penalty) and self.counts:
            counts = torch.tensor(list(self.counts.values()), dtype=torch.float32, device=self.device)
            logits[answered] -= s.frequency_penalty * counts + s.presence_penalty
        for id, bias in s.bias.items():
            logits[id] += bias
        if self.grammar is not None:
            self.grammar.mask(logits)
        return logits

    def _draw_id(self, logits: torch.Tensor) -> int:
        s = self.sampling
        if s.temperature == 0:
            return int(logits.argmax())
        probs = torch.softmax(logits / s.temperature, dim=-1)
        if s.top_k == 0 and s.top_p >= 1 and s.min_p == 0:
            return int(torch.multinomial(probs, 1, generator=self.generator))
        probs, ids = probs.sort(descending=True, stable=True)
        if s.top_k:
            probs[s.top_k :] = 0
        if s.top_p < 1:
            probs[probs.cumsum(0) / probs.sum() - probs / probs.sum() >= s.top_p] = 0  # the first one always stays
        probs[probs < s.min_p * probs[0]] = 0
        return int(ids[torch.multinomial(probs, 1, generator=self.generator)])
