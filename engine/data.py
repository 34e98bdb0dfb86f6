"""Rows -> prompt -> masked tokens, and the order in which a run takes them.

A dataset is three flat arrays: tokens, which of them are targets, where each example starts. The order of examples is
a function of (seed, epoch) alone, so a run resumes at any step without any saved state of a sampler.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import DataError
from engine.rows import Row
from engine.tokenizer import Tokenizer

# ---- templates ------------------------------------------------------------------------------------------------------

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Text:
    """Tokenised as one string; the tokens of the prompt alone carry no loss, those of the rest do."""

    prompt: str
    response: str = ""


@dataclass(frozen=True)
class Special:
    """One token of the tokenizer by name ("bos", "eos" or its text), which no text can spell."""

    name: str
    loss: bool = False


def chatml(messages, answer_next):
    """<|im_start|>role\\ncontent<|im_end|>\\n"""
    for role, content in messages:
        ours = role == "assistant"
        yield Special("<|im_start|>")
        yield Text(f"{role}\n", content) if ours else Text(f"{role}\n{content}")
        yield from (Special("<|im_end|>", loss=ours), Text("\n"))
    if answer_next:
        yield from (Special("<|im_start|>"), Text("assistant\n"))


def llama3(messages, answer_next):
    """<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>, content stripped, as Meta's ChatFormat."""
    yield Special("bos")
    for role, content in messages:
        ours = role == "assistant"
        yield from (Special("<|start_header_id|>"), Text(role), Special("<|end_header_id|>"))
        yield Text("\n\n", content.strip()) if ours else Text("\n\n" + content.strip())
        yield Special("<|eot_id|>", loss=ours)
    if answer_next:
        yield from (Special("<|start_header_id|>"), Text("assistant"), Special("<|end_header_id|>"), Text("\n\n"))


def llama2(messages, answer_next):
    """BOS [INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\nuser [/INST] answer EOS; a turn is one string, as in Meta's code."""
    system = ""
    for role, content in messages:
        content = content.strip()
        if role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            prompt, system = f"[INST] {system}{content} [/INST]", ""
        else:
            yield from (Special("bos"), Text(prompt, f" {content} "), Special("eos", loss=True))
    if answer_next:
        yield from (Special("bos"), Text(prompt))


CHAT_STYLES = {"chatml": chatml, "llama2": llama2, "llama3": llama3}


def pieces(row: Row, style: str, add_bos: bool, answer_next: bool = False) -> list[Text | Special]:
    """A row under a template. answer_next leaves the last answer out and ends where the model writes it."""
    if style == "alpaca":
        if row.messages is not None:
            raise DataError(
                f"{row.source}: the row holds chat messages, which the alpaca style cannot say; "
                "pass --prompt-style chatml, llama2 or llama3"
            )
        template = ALPACA_INPUT if row.input else ALPACA_NO_INPUT
        prompt = template.format(instruction=row.instruction, input=row.input)
        body = [Text(prompt)] if answer_next else [Text(prompt, row.output), Special("eos", loss=True)]
        return [Special("bos"), *body] if add_bos else body
    messages = row.messages
    if messages is None:
        question = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
        messages = (("user", question), ("assistant", row.output))
    if answer_next and messages[-1][0] == "assistant":
        messages = messages[:-1]
    return list(CHAT_STYLES[style](messages, answer_next))


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Tokenised examples, flat."""

    tokens: np.ndarray  # (total,) int32
    is_target: np.ndarray  # (total,) bool: this token is predicted, and carries loss
    starts: np.ndarray  # (N + 1,) int64: example i is tokens[starts[i]:starts[i + 1]]
    sources: tuple[str, ...]  # (N,) "file:row" of each, for messages
    counts: dict  # rows, examples, truncated, dropped, tokens, loss_tokens

    def __len__(self):
        return len(self.sources)

    def lengths(self):
        """(N,) tokens of each example."""
        return np.diff(self.starts)

    def tokens_of(self, example: int) -> np.ndarray:
        """(n,) int32."""
        return self.tokens[self.starts[example] : self.starts[example + 1]]

    def is_target_of(self, example: int) -> np.ndarray:
        """(n,) bool."""
        return self.is_target[self.starts[example] : self.starts[example + 1]]


def special_id(tokenizer, name, style):
    token = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}.get(name, tokenizer.special_ids.get(name))
    if token is None:
        known = ", ".join(sorted(tokenizer.special_ids)[:8])
        raise DataError(
            f"prompt style {style} needs the token {name}, and this tokenizer has none (it has {known}); "
            "choose another --prompt-style"
        )
    return token


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, style: str) -> Iterator[tuple[list[int], list[bool]]]:
    """For each row its ids and which of them are targets. Each distinct prompt is tokenised once."""
    parts = [pieces(row, style, tokenizer.add_bos) for row in rows]
    texts = [part for row in parts for part in row if isinstance(part, Text)]
    prompts = list(dict.fromkeys(text.prompt for text in texts))
    n_prompt = {prompt: len(ids) for prompt, ids in zip(prompts, tokenizer.encode_batch(prompts), strict=True)}
    encoded = iter(tokenizer.encode_batch([text.prompt + text.response for text in texts]))
    for row in parts:
        ids, targets = [], []
        for part in row:
            if isinstance(part, Special):
                ids.append(special_id(tokenizer, part.name, style))
                targets.append(part.loss)
            else:
                new = next(encoded)
                masked = min(n_prompt[part.prompt], len(new))
                ids += new
                targets += [False] * masked + [True] * (len(new) - masked)
        yield ids, targets


def tokenize(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    style: str = "alpaca",
    max_length: int = 512,
    train_on_prompt: bool = False,
    watch: Callable[[range], Iterator[int]] = iter,
) -> Dataset:
    """The rows as a Dataset: cut at max_length tokens, dropped where no loss token is left, both counted.

    watch: wraps the loop over blocks of rows, to show progress.
    Raises DataError when nothing is left, or the tokenizer lacks a token of the style.
    """
    tokens, targets, lengths, sources = [], [], [], []
    counts = {"rows": len(rows), "examples": 0, "truncated": 0, "dropped": 0, "tokens": 0, "loss_tokens": 0}
    for first in watch(range(0, len(rows), 1024)):
        block = rows[first : first + 1024]
        for row, (ids, is_target) in zip(block, encode_rows(block, tokenizer, style), strict=True):
            if train_on_prompt:
                is_target = [True] * len(ids)
            is_target[0] = False  # nothing comes before it to predict it from
            counts["truncated"] += len(ids) > max_length
            ids, is_target = ids[:max_length], is_target[:max_length]
            if not any(is_target):
                counts["dropped"] += 1
                continue
            tokens.append(np.array(ids, np.int32))
            targets.append(np.array(is_target, bool))
            lengths.append(len(ids))
            sources.append(row.source)
    if not sources:
        raise DataError(
            f"no example is left of {len(rows)} rows: {counts['dropped']} had no response token within "
            f"--max-length {max_length}; give rows with an output, or a larger --max-length"
        )
    starts = np.concatenate(([0], np.cumsum(lengths)))
    dataset = Dataset(np.concatenate(tokens), np.concatenate(targets), starts, tuple(sources), counts)
    counts |= {
        "examples": len(sources),
        "tokens": len(dataset.tokens),
        "loss_tokens": int(dataset.is_target.sum()),
    }
    return dataset


def encode_prompt(row: Row, tokenizer: Tokenizer, style: str = "alpaca") -> list[int]:
    """The ids after which the model answers: a row without its output, under the template."""
    ids = []
    for part in pieces(row, style, tokenizer.add_bos, answer_next=True):
        ids += (
            [special_id(tokenizer, part.name, style)]
            if isinstance(part, Special)
            else tokenizer.encode(part.prompt + part.response)
        )
    return ids


# ---- order ----------------------------------------------------------------------------------------------------------


def order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of n examples in an epoch (from 0): a permutation that depends on nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """The last step of an epoch may hold fewer examples; none is left out and none is taken twice."""
    return -(-n // global_batch_size)


def examples_of_step(step: int, n: int, global_batch_size: int, seed: int, shuffle: bool) -> np.ndarray:
    """The examples of optimizer step `step` (from 1)."""
    epoch, index = divmod(step - 1, steps_per_epoch(n, global_batch_size))
    return order(n, seed, epoch, shuffle)[index * global_batch_size : (index + 1) * global_batch_size]


def hold_out(rows: list, fraction: float, seed: int) -> tuple[list, list]:
    """(kept, held out): round(fraction n), at least one, of the rows, chosen by the seed; both in file order."""
    n_held = max(1, round(fraction * len(rows)))
    held = set(np.random.default_rng((seed, 2**32)).permutation(len(rows))[:n_held].tolist())
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
