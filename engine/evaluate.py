"""Measure models: the loss on rows they have not seen, and answers to prompts, for a judge.

python -m engine.evaluate --model out/alpaca smollm2-135m --data held_out.json --prompts prompts.jsonl --out out/eval
python -m engine.evaluate --model out/alpaca --data held_out.json
python -m engine.evaluate --model smollm2-135m --adapter-dir out/lora --data held_out.json
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from engine.base.device import choose_device, choose_dtype, choose_kernels
from engine.base.errors import NotFiniteError, UsageError, run_main
from engine.base.files import write_atomically
from engine.base.flags import ADAPTER_HELP, KERNELS, KERNELS_HELP, find_empty, flag, parse_flags
from engine.data.dataset import encode_rows
from engine.data.packing import Packing, make_micro_batches
from engine.data.prompts import ask_for, read_prompts
from engine.data.rows import read_rows, resolve_data_paths
from engine.inference.answers import answer_prompts
from engine.inference.sampling import Sampling
from engine.model.llama import Transformer
from engine.serving.models import load_model
from engine.serving.prompts import choose_style
from engine.text.templates import STYLES, Row, encode_prompt, find_stop_ids
from engine.text.tokenizer import Tokenizer

CHUNK_EXAMPLES = 256  # that are packed together


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure the loss of models on held-out rows, and write their answers to prompts for data_gen.judge."""

    model: tuple[str, ...] = flag(("smollm2-135m",), "one or more, each as engine.generate takes it")
    adapter_dir: str | None = flag(None, ADAPTER_HELP + "; it is measured beside the model")
    data: tuple[str, ...] = flag((), "rows with answers, as engine.finetune takes them: the loss of the answers")
    prompts: str = flag("", "a file: one instruction a line, or rows: answers to them are written")
    out: str = flag("out/evaluate", "folder for results.json and one NAME.json of answers a model")
    prompt_style: str = flag(
        "auto",
        "the template; auto is the one each model was fine-tuned with here, else its own chat template, else alpaca",
        ("auto", *STYLES),
    )
    max_length: int = flag(512, "tokens a row is cut at")
    micro_batch_tokens: int = flag(4096, "most tokens of one forward")
    max_new_tokens: int = flag(512, "longest answer")
    temperature: float = flag(0.0, "0 is greedy; 1 samples the model's own distribution")
    top_p: float = flag(1.0, "sample from the fewest tokens that hold this probability")
    seed: int = flag(0, "of sampling: prompt number i draws with seed + i")
    batch_size: int = flag(8, "answers written at once")
    device: str = flag("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "of the weights; auto is bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    kernels: str = flag("auto", KERNELS_HELP, KERNELS)
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self) -> None:
        problems = find_empty(adapter_dir=self.adapter_dir)
        if not self.data and not self.prompts:
            problems.append("give --data, --prompts or both: what is to be measured")
        for name in ("max_length", "micro_batch_tokens", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"--{name.replace('_', '-')} wants 1 or more")
        if self.micro_batch_tokens < self.max_length:
            problems.append("--micro-batch-tokens wants at least --max-length")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            problems.append("--temperature wants 0 or more, --top-p more than 0 and at most 1")
        if self.adapter_dir and len(self.model) > 1:
            problems.append("--adapter-dir goes with one --model; adapters' folders may stand in --model themselves")
        names = [name_model(model) for model in (*self.model, *filter(None, [self.adapter_dir]))]
        if len(set(names)) < len(names):
            problems.append(f"--model: two are called {max(names, key=names.count)}; their answers want other names")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Result:
    """What was measured of one model; None where it was not asked for.

    loss: mean over the answers' tokens, in nats. bits_per_byte: of the answers' text, which compares models of
    different tokenizers.
    """

    model: str
    prompt_style: str
    loss: float | None = None
    perplexity: float | None = None
    loss_tokens: int | None = None
    bits_per_byte: float | None = None
    truncated_rows: int | None = None
    answers: int | None = None
    cut_answers: int | None = None  # by --max-new-tokens
    mean_characters: float | None = None
    tokens_per_second: float | None = None


def name_model(model: str) -> str:
    """Return the name under which a model's answers are written."""
    return Path(model).name.removesuffix(".gguf") or model


@torch.no_grad()
def measure_loss(
    model: Transformer, tokenizer: Tokenizer, style: str, rows: list[Row], config: EvaluateConfig
) -> dict[str, float | int]:
    """Return the loss of the rows' answers, as fields of Result."""
    table = encode_rows(rows, tokenizer, style, config.max_length)
    dataset, packing = table.select(), Packing(config.micro_batch_tokens)
    chunks = np.split(np.arange(len(dataset)), range(CHUNK_EXAMPLES, len(dataset), CHUNK_EXAMPLES))
    total = 0.0
    for chunk in track(chunks, "loss", console=Console(stderr=True), transient=True):
        for batch in make_micro_batches(dataset.get_examples(chunk), packing):
            total += float(model.loss(batch))
    n_tokens = int(dataset.loss_tokens().sum())
    n_bytes = 0
    for i in range(len(dataset)):
        tokens, is_target = dataset.tokens_of(i), dataset.is_target_of(i)
        n_bytes += sum(len(tokenizer.piece(int(id))) for id in tokens[is_target])
    loss = total / n_tokens
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss of the rows is {loss}: the weights, or an adapter's alpha, are too large")
    return {
        "loss": loss, "perplexity": math.exp(loss), "loss_tokens": n_tokens,
        "bits_per_byte": total / math.log(2) / max(1, n_bytes), "truncated_rows": int(dataset.counts["truncated"]),
    }  # fmt: skip


def write_answers(
    model: Transformer, tokenizer: Tokenizer, style: str, rows: list[Row], config: EvaluateConfig, name: str
) -> dict[str, float | int]:
    """Answer the prompts, write them in AlpacaEval's form to --out, and return fields of Result."""
    prompts = [encode_prompt(row, tokenizer, style) for row in rows]
    longest = max(map(len, prompts)) + config.max_new_tokens
    if longest > (most := model.config.max_positions):
        raise UsageError(f"prompt and answer may take {longest} tokens, the model has {most}; lower --max-new-tokens")
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
    began = time.monotonic()
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("answers", total=len(rows))
        answers = answer_prompts(
            model, prompts, find_stop_ids(tokenizer, style), config.max_new_tokens, sampling, config.batch_size,
            lambda number: progress.advance(task),
        )  # fmt: skip
    seconds = time.monotonic() - began
    texts = [tokenizer.decode(answer.ids).strip() for answer in answers]
    outputs = [
        {"instruction": ask_for(row), "output": text, "generator": name, "dataset": Path(config.prompts).stem}
        for row, text in zip(rows, texts, strict=True)
    ]
    content = json.dumps(outputs, ensure_ascii=False, indent=1) + "\n"
    write_atomically(Path(config.out) / f"{name}.json", content.encode())
    return {
        "answers": len(texts), "cut_answers": sum(answer.reason == "length" for answer in answers),
        "mean_characters": sum(map(len, texts)) / len(texts),
        "tokens_per_second": sum(len(answer.ids) for answer in answers) / seconds,
    }  # fmt: skip


def measure_model(name: str, adapter_dir: str, rows: list[Row], prompts: list[Row], config: EvaluateConfig) -> Result:
    """Load one model, with the adapter of a folder if one is named, and measure it under its or that folder's name."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    kernels = choose_kernels(config.kernels, device, dtype)
    model, tokenizer, trained = load_model(name, device, dtype, kernels, adapter_dir)
    name = adapter_dir or name
    for warning in tokenizer.warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr)
    style = choose_style(config.prompt_style, trained, tokenizer)
    found: dict = measure_loss(model, tokenizer, style, rows, config) if rows else {}
    if prompts:
        found |= write_answers(model, tokenizer, style, prompts, config, name_model(name))
    return Result(name_model(name), style, **found)


def make_table(results: list[Result]) -> Table:
    """Return the results as a table: a row a model, a column a measure."""
    shown = {
        "model": "model", "prompt_style": "template", "loss": "loss", "perplexity": "perplexity",
        "bits_per_byte": "bits/byte", "loss_tokens": "tokens", "truncated_rows": "cut rows", "answers": "answers",
        "cut_answers": "cut", "mean_characters": "characters", "tokens_per_second": "tokens/s",
    }  # fmt: skip
    rows = [asdict(result) for result in results]
    table = Table()
    for key, title in shown.items():
        if any(row[key] is not None for row in rows):
            table.add_column(title, justify="left" if key in ("model", "prompt_style") else "right")
    for row in rows:
        kept = [row[key] for key in shown if any(other[key] is not None for other in rows)]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in kept))
    return table


def main(argv: list[str]) -> None:
    """Measure the models in turn, print the table and write it to --out."""
    config, _ = parse_flags(EvaluateConfig, argv)
    rows = read_rows(resolve_data_paths(config.data), None)[0] if config.data else []
    prompts = read_prompts(Path(config.prompts)) if config.prompts else []
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    results = [measure_model(name, "", rows, prompts, config) for name in config.model]
    if config.adapter_dir:
        results.append(measure_model(config.model[0], config.adapter_dir, rows, prompts, config))
    content = {"config": asdict(config), "results": [asdict(result) for result in results]}
    write_atomically(out / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    Console(width=None if sys.stdout.isatty() else 200).print(make_table(results))
    if len({result.prompt_style for result in results}) > 1:
        print("the models were asked under different templates; --prompt-style asks all under one")
    print(f"results are in {out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
