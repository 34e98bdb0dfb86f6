"""Convert a model from one layout to another, or a training state to a model.

python -m engine.export --model out/demo --out out/demo-meta --layout meta
python -m engine.export --model out/demo/checkpoint-40 --out out/demo-40
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.device import DTYPES
from engine.base.errors import CriaError, DataError, UsageError, run_main
from engine.base.flags import flag, parse_flags
from engine.formats.find import detect_kind, find_model
from engine.formats.save import save_hf, save_meta
from engine.formats.source import Source, open_source
from engine.model.llama import new_model
from engine.output.folder import RUN, read_prompt_style, require_disk_space
from engine.output.state_as_model import TrainingState, open_training_state
from engine.text.chat_templates import adopt_style, pin_date, settle_template
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import find_tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a complete Hugging Face folder, or in Meta's layout."""

    model: str = flag(
        "smollm2-135m",
        "folder (Hugging Face or Meta layout), .gguf file, training state (checkpoint-N), or the embedded smollm2-135m",
    )
    tokenizer: str = flag("", "folder or .gguf of the tokenizer, where the model or the state's run has none at hand")
    out: str = flag("", "folder to write; it must be new or empty")
    layout: str = flag("hf", "of the folder written", ("hf", "meta"))
    dtype: str = flag("auto", "of the weights written; auto keeps what the model has", ("auto", "bf16", "fp16", "fp32"))
    max_shard_bytes: int = flag(5_000_000_000, "largest safetensors file (hf)")
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("--out is missing")
        if self.max_shard_bytes < 1:
            raise ValueError(f"--max-shard-bytes is {self.max_shard_bytes}, wanted 1 or more")


def find_tokenizer_of_state(state: TrainingState, name: str) -> Tokenizer:
    """Return the tokenizer called `name`, or, if that is "", the one of the run that wrote the state.

    Raises UsageError where the run's tokenizer cannot be found.
    """
    own = Path(state.tokenizer) if state.tokenizer else state.base
    if name:
        return find_tokenizer(state.config, name, own)
    try:
        if state.tokenizer is None:
            raise DataError(f"no {RUN} beside the state names it")
        return find_tokenizer(state.config, state.tokenizer, None if state.tokenizer else own)
    except CriaError as error:
        raise UsageError(
            f"{state.checkpoint.folder}: its run's tokenizer is not at hand ({error}); pass --tokenizer"
        ) from None


def main(argv: list[str]) -> None:
    """Export the model that the command line asks for."""
    config, _ = parse_flags(ExportConfig, argv)
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is not empty; choose another folder")
    path = find_model(config.model)
    source: TrainingState | Source
    if detect_kind(path) == "state":
        source = open_training_state(path)
        tokenizer = find_tokenizer_of_state(source, config.tokenizer)
        style = source.prompt_style
    else:
        source = open_source(path)
        tokenizer = find_tokenizer(source.config, config.tokenizer, path)
        style = read_prompt_style(path)
    if style is None:
        tokenizer = settle_template(tokenizer)
    else:
        tokenizer = adopt_style(pin_date(tokenizer) if style == "template" else tokenizer, style)
    for warning in tokenizer.warnings:
        print(f"warning: {warning}")
    dtype = source.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    out.mkdir(parents=True, exist_ok=True)
    require_disk_space(
        out, source.config.n_parameters * torch.finfo(dtype).bits // 8, "free some, or choose another folder"
    )
    model = new_model(source.config, "cpu", dtype)
    source.read_into(model)
    if config.layout == "meta":
        save_meta(out, model)
    else:
        save_hf(
            out, model, max_shard_bytes=config.max_shard_bytes, bos_id=tokenizer.bos_id,
            eos_ids=sorted(tokenizer.stop_ids), generation_config=source.generation_config,
        )  # fmt: skip
    tokenizer.save(out)
    print(f"wrote {out}: {source.config.n_parameters / 1e6:.1f}M parameters, {str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    sys.exit(run_main(main))
