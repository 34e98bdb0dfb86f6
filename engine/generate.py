"""Text from a model: greedy or sampled, several prompts at once, streamed.

python -m engine.generate --model out/demo --prompt "Name three uses for a paper clip."
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
from engine.base.errors import DataError, UsageError, exit_code_of
from engine.base.flags import from_cli
from engine.data.dataset import CHAT_STYLES, encode_prompt
from engine.data.rows import Row, read_rows
from engine.formats.find import choose_device, choose_dtype, choose_kernels, load_model
from engine.model.config import KERNELS, KERNELS_HELP, ModelConfig, knob
from engine.model.llama import Transformer
from engine.output.folder import RUN, read_json


class KVCache:
    """Keys and values of B sequences, each with its own length. The first forward takes the prompts, packed as
    documents; each later one takes one token a sequence."""

    def __init__(self, config: ModelConfig, batch: int, max_len: int, device, dtype, impl="auto"):
        self.impl = impl
        shape = (config.n_layers, batch, max_len, config.n_kv_heads, config.head_dim)
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)

    def start(self, lengths, documents):
        """Before the prompts: lengths (B,) of each; documents (B, 4) on the CPU."""
        self.documents, self.lengths = documents, lengths

    def step(self):
        """Before one more token a sequence; returns their positions (B,)."""
        self.documents, self.lengths = None, self.lengths + 1
        return self.lengths - 1

    def layer(self, i, cos, sin):
        """What the model's layer i does with its qkv (T, H + 2K, Dh): rotate, remember, attend."""

        def attend(qkv):
            n_kv_heads = self.k.shape[3]
            q, k, v = qkv.split((qkv.shape[1] - 2 * n_kv_heads, n_kv_heads, n_kv_heads), dim=1)
            q, k = kernels.rope(q, k, cos, sin, self.impl)
            return self.decode(i, q, k, v) if self.documents is None else self.prefill(i, q, k, v)

        return attend

    def prefill(self, i, q, k, v):
        for row, (start, end, *_) in enumerate(self.documents.tolist()):
            self.k[i, row, : end - start], self.v[i, row, : end - start] = k[start:end], v[start:end]
        return kernels.attention(q, k, v, self.documents, self.impl)

    def decode(self, i, q, k, v):
        """q: (B, H, Dh). k, v: (B, K, Dh). Each attends to its own sequence's past and itself."""
        self.k[i, self.rows, self.lengths - 1], self.v[i, self.rows, self.lengths - 1] = k, v
        longest, group = int(self.lengths.max()), q.shape[1] // k.shape[1]
        past = [t[i, :, :longest].transpose(1, 2) for t in (self.k, self.v)]  # (B, K, S, Dh)
        seen = torch.arange(longest, device=q.device) < self.lengths[:, None]  # (B, S)
        q = q.unflatten(1, (-1, group))  # (B, K, H/K, Dh): the queries of one key head side by side
        return F.scaled_dot_product_attention(q, *past, attn_mask=seen[:, None, None]).flatten(1, 2)


def sample(logits, temperature, top_p, generator):
    """One id from logits (V,). temperature 0: the likeliest. top_p: from the fewest ids that hold that probability."""
    if temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        probs, ids = probs.sort(descending=True, stable=True)
        probs[probs.cumsum(0) - probs >= top_p] = 0  # the first id always stays
        return int(ids[torch.multinomial(probs, 1, generator=generator)])
    return int(torch.multinomial(probs, 1, generator=generator))


@torch.no_grad()  # not inference_mode: what FSDP2 gathers within is of no use to training
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    stop_ids,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The ids that follow each prompt, up to and without a stop id.

    Each prompt draws from a generator of its own, so its answer does not depend on its neighbours' draws.
    on_token(prompt, id) is told each id as it comes and may raise to stop. Raises ValueError when a prompt is empty.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("generate: an empty prompt has no next token; begin with the tokenizer's bos_id")
    device, dtype = model.norm.device, model.norm.dtype
    lengths = torch.tensor([len(p) for p in prompts])
    ends = lengths.cumsum(0)
    documents = torch.zeros(len(prompts), 4, dtype=torch.int32)
    documents[:, 0], documents[:, 1] = ends - lengths, ends
    lengths = lengths.to(device)
    cache = KVCache(model.config, len(prompts), int(lengths.max()) + max_new_tokens, device, dtype, model.impl)
    cache.start(lengths, documents)
    tokens = torch.tensor([i for p in prompts for i in p], device=device)
    positions = torch.cat([torch.arange(len(p), device=device) for p in prompts])
    x = model(tokens, positions, cache=cache)[ends - 1]
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    answers, open_ = [[] for _ in prompts], set(range(len(prompts)))
    while True:
        logits = model.logits(x)
        new = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        for i in sorted(open_):
            token = sample(logits[i], temperature, top_p, generators[i])
            if token in stop_ids:
                open_.discard(i)
                continue
            answers[i].append(token)
            if on_token:
                on_token(i, token)
            if len(answers[i]) == max_new_tokens:
                open_.discard(i)
            new[i] = token
        if not open_:
            return answers
        x = model(new, cache.step(), cache=cache)


def stop_ids(tokenizer, style):
    """The ids that end an answer: the checkpoint's own, and the one that ends a turn of the template."""
    end = tokenizer.special_ids.get({"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(style))
    return tokenizer.stop_ids if end is None else tokenizer.stop_ids | {end}


# ---- command line ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerateConfig:
    """Answer prompts with a model. One --prompt is streamed to the terminal; a file's answers are printed in turn."""

    model: str = knob("smollm2-135m", "folder (Hugging Face or Meta layout), .gguf file, or the embedded smollm2-135m")
    prompt: str = knob("", "an instruction")
    input: str = knob("", "the input that goes with --prompt, in the alpaca template")
    prompts: str = knob("", "a file: one instruction a line, or Alpaca/chat JSON or JSONL rows")
    prompt_style: str = knob(
        "auto", "the template; auto is the one the model was fine-tuned with here, else alpaca",
        ("auto", "alpaca", *CHAT_STYLES),
    )  # fmt: skip
    raw: bool = knob(False, "continue the prompt as it is, under no template")
    max_new_tokens: int = knob(256, "longest answer")
    temperature: float = knob(0.0, "0 is greedy; 1 samples the model's own distribution")
    top_p: float = knob(1.0, "sample from the fewest tokens that hold this probability")
    seed: int = knob(0, "of sampling")
    batch_size: int = knob(8, "prompts of a file answered at once")
    device: str = knob("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = knob("auto", "of the weights; auto is bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    kernels: str = knob("auto", KERNELS_HELP, KERNELS)
    debug: bool = knob(False, "show tracebacks")

    def __post_init__(self):
        problems = []
        if bool(self.prompt) == bool(self.prompts):
            problems.append("give one of --prompt and --prompts")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            problems.append("--max-new-tokens and --batch-size want 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            problems.append("--temperature wants 0 or more, --top-p more than 0 and at most 1")
        if problems:
            raise ValueError("\n".join(problems))


def rows_of(config: GenerateConfig) -> list[Row]:
    """What is asked: the prompt, or the rows of the file; a file that is no JSON holds one instruction a line."""
    if config.prompt:
        return [Row("--prompt", None, config.prompt, config.input)]
    path = Path(config.prompts)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: cannot be read ({error}); give a UTF-8 text, JSON or JSONL file") from None
    if text.lstrip()[:1] in ("[", "{"):
        return read_rows([path], answers=False)[0]
    rows = [Row(f"{path.name}:{n}", None, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise DataError(f"--prompts {path}: holds no prompt; write one a line")
    return rows


def main(argv):
    config, _ = from_cli(GenerateConfig, argv)
    rows = rows_of(config)
    device = choose_device(config.device)
    impl = choose_kernels(config.kernels, device)
    model, tokenizer, source = load_model(config.model, device, choose_dtype(config.dtype, device), impl)
    style = config.prompt_style
    if style == "auto":
        style = read_json(source.path / RUN).get("config", {}).get("prompt_style", "alpaca")
    stops = stop_ids(tokenizer, style)

    def encode(row):
        if not config.raw:
            return encode_prompt(row, tokenizer, style)
        return ([tokenizer.bos_id] if tokenizer.add_bos else []) + tokenizer.encode(row.instruction)

    prompts = [encode(row) for row in rows]
    longest = max(map(len, prompts)) + config.max_new_tokens
    if longest > (most := model.config.max_seq_len):
        raise UsageError(f"prompt and answer may take {longest} tokens, the model has {most}; lower --max-new-tokens")
    settings = config.max_new_tokens, config.temperature, config.top_p, config.seed
    if config.prompt:
        stream = tokenizer.stream()
        generate(model, prompts, stops, *settings, on_token=lambda _, i: print(stream.push(i), end="", flush=True))
        print(stream.flush())
        return
    for first in range(0, len(rows), config.batch_size):
        answers = generate(model, prompts[first : first + config.batch_size], stops, *settings)
        for row, answer in zip(rows[first:], answers, strict=False):
            question = [text for role, text in row.messages if role == "user"][-1] if row.messages else row.instruction
            print(f"### {question}\n{tokenizer.decode(answer).strip()}\n", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
