"""Continuous batching: requests join and leave between the tokens of the others.

A request waits until a sequence of the KV cache is free. All that begin together are one packed forward, in which what
a prompt begins with in common with another one, or with what some sequence still holds, is not computed again: the
template of an instruction, or the earlier turns of a chat. Then each step is one forward of one token a request.
"""

import threading
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch

from engine.inference.decoder import MAX_ROWS, find_decoder
from engine.inference.kv_cache import KVCache, Prefill, Prompt
from engine.inference.sampling import Draw, Grammar, Sampler, Sampling
from engine.model.llama import Transformer

LEAST_KEPT = 8  # tokens in common that are worth looking for
WAVE_TOKENS = 4096  # of the prompts that one forward takes: the others' next tokens wait for it

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # why an answer ended


@dataclass(eq=False)
class Request:
    """A prompt to be answered.

    on_token(draw) is called for each token as it comes, without a stop id; it returns whether to go on. on_end(reason,
    error) is called once: reason is STOP, LENGTH or CANCELLED; an exception of the forward or of on_token comes as
    error. Both are called in the scheduler's thread.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Container[int]
    sampling: Sampling
    on_token: Callable[[Draw], bool]
    on_end: Callable[[str, Exception | None], None]
    grammar: Grammar | None = None
    cancelled: bool = False  # set by anyone at any time; the answer ends before its next token


@dataclass(eq=False)
class _Running:
    request: Request
    sampler: Sampler
    sequence: int
    n_drawn: int = 0


@dataclass(frozen=True)
class Load:
    """What a scheduler is doing, and has done since it began."""

    running: int
    waiting: int
    prompt_tokens: int  # of all prompts so far
    kept_tokens: int  # of those, the ones that were not computed again
    answer_tokens: int


class Scheduler:
    """Answers requests with one model. step() does the work; submit() may be called by any thread."""

    def __init__(self, model: Transformer, n_sequences: int, max_length: int, keep_prefixes: bool = True):
        device, dtype = model.norm.device, model.norm.dtype
        self.model, self.device, self.max_length = model, device, max_length
        self.cache = KVCache(model.config, n_sequences, max_length, device, dtype, model.impl)
        scaling = model.config.rope_scaling  # dynamic RoPE turns the keys of a longer text by other angles
        self.keep_prefixes = keep_prefixes and (scaling is None or scaling.kind != "dynamic")
        self.held: list[list[int]] = [[] for _ in range(n_sequences)]  # ids whose keys each sequence holds
        self.last_used = [0] * n_sequences
        self.running: list[_Running] = []
        self.waiting: deque[Request] = deque()
        self.wakes = threading.Condition()
        self.clock = self.prompt_tokens = self.kept_tokens = self.answer_tokens = 0
        with torch.no_grad():
            self.decoder = find_decoder(model, self.cache)

    # ---- for any thread -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError for an empty prompt and for one that leaves no room for an answer."""
        if not request.prompt:
            raise ValueError("scheduler: an empty prompt has no next token; begin with the tokenizer's bos_id")
        if len(request.prompt) >= self.max_length:
            raise ValueError(f"scheduler: the prompt has {len(request.prompt)} tokens, wanted under {self.max_length}")
        with self.wakes:
            self.waiting.append(request)
            self.wakes.notify()

    def load(self) -> Load:
        """Return what is being done and has been done."""
        return Load(len(self.running), len(self.waiting), self.prompt_tokens, self.kept_tokens, self.answer_tokens)

    # ---- for the thread that works ------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        """Wait until a request comes, at most so long."""
        with self.wakes:
            if not self.waiting and not self.running:
                self.wakes.wait(seconds)

    @torch.no_grad()
    def step(self) -> bool:
        """Let waiting requests join, or take one more token of each that runs. Return whether there is more to do."""
        for running in [r for r in self.running if r.request.cancelled]:
            self._end(running, CANCELLED)
        wave = self._next_wave()
        if wave:
            self._guarded(wave, lambda: self._prefill(wave))
        elif self.running:
            going_on = list(self.running)
            self._guarded(going_on, lambda: self._decode(going_on))
        return bool(wave or self.running or self.waiting)

    def stop(self) -> None:
        """End every request as cancelled."""
        with self.wakes:
            waiting, self.waiting = list(self.waiting), deque()
        for request in waiting:
            request.on_end(CANCELLED, None)
        for running in list(self.running):
            self._end(running, CANCELLED)

    def _guarded(self, members: Sequence[_Running], work: Callable[[], None]) -> None:
        """Do the work of some requests; if it fails, all that are still running end with the error."""
        try:
            work()
        except Exception as error:
            for running in members:
                if running in self.running:
                    self._end(running, CANCELLED, error)

    def _next_wave(self) -> list[_Running]:
        """Return the waiting requests that begin now, as many as sequences are free and a forward should take."""
        free = set(range(len(self.held))) - {r.sequence for r in self.running}
        wave: list[_Running] = []
        tokens = 0
        while free:
            with self.wakes:
                if not self.waiting or (wave and tokens + len(self.waiting[0].prompt) > WAVE_TOKENS):
                    break
                request = self.waiting.popleft()
            if request.cancelled:
                request.on_end(CANCELLED, None)
                continue
            sequence = self._choose_sequence(request.prompt, free)
            free.remove(sequence)
            tokens += len(request.prompt)
            sampler = Sampler(request.sampling, request.prompt, self.device, request.grammar)
            wave.append(_Running(request, sampler, sequence))
        self.running += wave
        return wave

    def _choose_sequence(self, prompt: Sequence[int], free: set[int]) -> int:
        """Return the free sequence that holds most of the prompt's beginning, or the one not used for longest."""
        most = {i: count_common(prompt, self.held[i]) if self.keep_prefixes else 0 for i in free}
        return max(free, key=lambda i: (most[i] if most[i] >= LEAST_KEPT else 0, -self.last_used[i]))

    def _prefill(self, wave: Sequence[_Running]) -> None:
        prefill, ids, positions = self._plan_prefill(wave)
        for running in wave:
            self.held[running.sequence] = []  # until the forward has ended
        self.cache.begin_prefill(prefill)
        x = self.model(ids.to(self.device), positions.to(self.device), cache=self.cache)
        ends = torch.tensor([p.end - p.row for p in prefill.prompts]).cumsum(0) - 1
        for running in wave:
            self.held[running.sequence] = list(running.request.prompt)
        self._draw(wave, self.model.logits(x[ends.to(self.device)]))

    def _plan_prefill(self, wave: Sequence[_Running]) -> tuple[Prefill, torch.Tensor, torch.Tensor]:
        """Return the prefill of a wave, and the ids and positions (T,) that are computed."""
        rows = 0
        copies, documents = [], []
        prompts: list[Prompt] = []
        new_rows: list[int] = []
        ids: list[int] = []
        positions: list[int] = []
        for i, running in enumerate(wave):
            prompt = running.request.prompt
            kept, from_wave, source = self._find_kept(prompt, wave[:i], prompts)
            kept_row = rows
            if from_wave:
                kept_row = prompts[source].kept_row
            elif kept:
                copies.append((source, kept, rows))
                rows += kept
            n = len(prompt) - kept
            prompts.append(Prompt(running.sequence, kept_row, kept, rows, rows + n))
            documents.append((rows, rows + n, kept_row if kept else 0, kept_row + kept if kept else 0))
            new_rows += range(rows, rows + n)
            ids += prompt[kept:]
            positions += range(kept, len(prompt))
            rows += n
            self.prompt_tokens += len(prompt)
            self.kept_tokens += kept
        prefill = Prefill(rows, copies, torch.tensor(new_rows), torch.tensor(documents, dtype=torch.int32), prompts)
        return prefill, torch.tensor(ids), torch.tensor(positions)

    def _find_kept(
        self, prompt: Sequence[int], earlier: Sequence[_Running], places: Sequence[Prompt]
    ) -> tuple[int, bool, int]:
        """Return how many tokens need not be computed, whether an earlier prompt of the wave has them, and which one.

        Else they are those of a sequence of the cache. The last token of a prompt is always computed: its logits are
        wanted. Of the wave, only prompts whose rows lie in one piece are of use: whose kept rows were not another's.
        """
        if not self.keep_prefixes:
            return 0, False, 0
        unfinished = {r.sequence for r in self.running if r.n_drawn}  # the last id of such a sequence has no keys yet
        held = [ids[:-1] if i in unfinished and ids else ids for i, ids in enumerate(self.held)]
        found = [(count_common(prompt, ids), False, i) for i, ids in enumerate(held)]
        for i, (running, place) in enumerate(zip(earlier, places, strict=True)):
            if place.kept_row + place.kept == place.row:
                found.append((count_common(prompt, running.request.prompt), True, i))
        kept, from_wave, source = max(found, key=lambda f: (f[0], not f[1]))
        return (kept, from_wave, source) if kept >= LEAST_KEPT else (0, False, 0)

    def _decode(self, going_on: Sequence[_Running]) -> None:
        sequences = [r.sequence for r in going_on]
        tokens = [self.held[s].pop() for s in sequences]  # their keys are all there when the forward has ended
        if self.decoder is not None and len(sequences) <= MAX_ROWS:
            logits = self.decoder.next_logits(tokens, sequences)
        else:
            positions = self.cache.begin_token(torch.tensor(sequences, device=self.device))
            x = self.model(torch.tensor(tokens, device=self.device), positions, cache=self.cache)
            logits = self.model.logits(x)
        for sequence, token in zip(sequences, tokens, strict=True):
            self.held[sequence].append(token)
        self._draw(going_on, logits)

    def _draw(self, members: Sequence[_Running], logits: torch.Tensor) -> None:
        """Draw the next token of each request behind its row of logits (n, V), and end those that are done."""
        likeliest = logits.argmax(-1).tolist()
        self.clock += 1
        for running, row, best in zip(members, logits, likeliest, strict=True):
            request, error = running.request, None
            draw = Draw(best) if running.sampler.is_greedy() else running.sampler.draw(row)
            if draw.id in request.stop_ids:
                self._end(running, STOP)
                continue
            running.n_drawn += 1
            self.answer_tokens += 1
            self.last_used[running.sequence] = self.clock
            try:
                goes_on = request.on_token(draw)
            except Exception as caught:
                goes_on, error = False, caught
            held = self.held[running.sequence]
            is_full = len(held) + 1 >= self.max_length or running.n_drawn >= request.max_new_tokens
            is_complete = request.grammar is not None and request.grammar.is_complete()
            if not goes_on or is_full or is_complete:
                self._end(running, STOP if not goes_on or is_complete else LENGTH, error)
            else:
                held.append(draw.id)

    def _end(self, running: _Running, reason: str, error: Exception | None = None) -> None:
        self.running.remove(running)
        # The last token that was drawn has no keys yet.
        held = self.held[running.sequence]
        self.held[running.sequence] = held[: int(self.cache.lengths[running.sequence])]
        running.request.on_end(reason, error)


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts begin with in common, not counting the last one of a."""
    n = min(len(a) - 1, len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)
