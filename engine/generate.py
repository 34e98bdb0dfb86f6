"""Generate text, greedy or sampled. One prompt is streamed; the prompts of a file are answered in batches.

python -m engine.generate --model out/demo --prompt "Name three uses for a paper clip."
python -m engine.generate --model out/alpaca/checkpoint-200 --prompt -   # of standard input
python -m engine.generate --model smollm2-135m --prompts questions.txt > answers.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from engine.base.device import choose_device, choose_dtype, choose_kernels
from engine.base.errors import UsageError, run_main
from engine.base.flags import ADAPTER_HELP, KERNELS, KERNELS_HELP, MODEL_HELP, find_empty, flag, parse_flags
from engine.data.prompts import ask_for, read_prompts
from engine.inference.generation import generate
from engine.serving.models import load_model
from engine.serving.prompts import choose_style
from engine.text.templates import STYLES, Row, encode_prompt, find_stop_ids


@dataclass(frozen=True)
class GenerateConfig:
    """Answer prompts with a model. One --prompt is streamed to the terminal; a file's answers are printed in turn."""

    model: str = flag("smollm2-135m", MODEL_HELP)
    adapter_dir: str | None = flag(None, ADAPTER_HELP)
    prompt: str = flag("", "an instruction; - reads it from standard input")
    input: str = flag("", "the input that goes with --prompt, in the alpaca template")
    prompts: str = flag("", "a file: one instruction a line, or rows as engine.finetune --data takes them")
    prompt_style: str = flag(
        "auto",
        "the template; auto is the one the model was fine-tuned with here, else its own chat template, else alpaca",
        ("auto", *STYLES),
    )
    raw: bool = flag(False, "continue the prompt as it is, under no template")
    max_new_tokens: int = flag(256, "longest answer")
    temperature: float = flag(0.0, "0 is greedy; 1 samples the model's own distribution")
    top_p: float = flag(1.0, "sample from the fewest tokens that hold this probability")
    seed: int = flag(0, "of sampling")
    batch_size: int = flag(8, "prompts of a file answered at once")
    device: str = flag("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "of the weights; auto is bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    kernels: str = flag("auto", KERNELS_HELP, KERNELS)
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self) -> None:
        problems = find_empty(adapter_dir=self.adapter_dir)
        if bool(self.prompt) == bool(self.prompts):
            problems.append("give one of --prompt and --prompts")
        if self.max_new_tokens < 1 or self.batch_size < 1:
            problems.append("--max-new-tokens and --batch-size want 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            problems.append("--temperature wants 0 or more, --top-p more than 0 and at most 1")
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: list[str]) -> None:
    """Generate and print the answers that the command line asks for."""
    config, _ = parse_flags(GenerateConfig, argv)
    prompt = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
    if config.prompt and not prompt:
        raise UsageError("--prompt -: standard input is empty; pipe an instruction in")
    rows = [Row("--prompt", None, prompt, config.input)]
    if config.prompts:
        rows = read_prompts(Path(config.prompts))
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    kernels = choose_kernels(config.kernels, device, dtype)
    model, tokenizer, trained = load_model(config.model, device, dtype, kernels, config.adapter_dir or "")
    for warning in tokenizer.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    style = choose_style(config.prompt_style, trained, tokenizer)
    stops = find_stop_ids(tokenizer, style)

    def encode(row: Row) -> list[int]:
        if not config.raw:
            return encode_prompt(row, tokenizer, style)
        begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return begin + tokenizer.encode(row.instruction)

    prompts = [encode(row) for row in rows]
    longest = max(map(len, prompts)) + config.max_new_tokens
    if longest > (most := model.config.max_positions):
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
            print(f"### {ask_for(row)}\n{tokenizer.decode(answer).strip()}\n", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
