"""Convert a model from one layout to another, or a training state to a model.

python -m engine.export --model out/demo --out out/demo-meta --layout meta
python -m engine.export --model out/demo/checkpoint-40 --out out/demo-40
python -m engine.export --model out/demo --out demo.gguf --layout gguf --gguf-type q8_0
python -m engine.export --model out/lora --merge --out out/merged
python -m engine.export --model out/lora --out lora.gguf --layout gguf
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.base.device import DTYPES
from engine.base.errors import UsageError, run_main
from engine.base.flags import ADAPTER_HELP, find_empty, flag, parse_flags
from engine.base.terminal import watch_parameters
from engine.formats.adapters import MergedSource
from engine.formats.save import save_hf, save_meta
from engine.formats.save_gguf import save_gguf, save_gguf_adapter
from engine.model.llama import new_model
from engine.output.folder import require_disk_space
from engine.output.state_as_model import TrainingState
from engine.serving.models import Weights, find_tokenizer_of, open_weights
from engine.text.chat_templates import adopt_style, pin_date, settle_template
from engine.text.gguf_vocabulary import make_vocabulary
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a complete Hugging Face folder, in Meta's layout, or as a GGUF file for llama.cpp."""

    model: str = flag(
        "smollm2-135m",
        "folder (Hugging Face or Meta layout), .gguf file, training state (checkpoint-N), or the embedded smollm2-135m",
    )
    tokenizer: str = flag("", "folder or .gguf of the tokenizer, where the model or the state's run has none at hand")
    adapter_dir: str | None = flag(None, ADAPTER_HELP)
    merge: bool = flag(False, "write an adapter's base with the updates added to its weights, rounded once")
    out: str = flag("", "folder to write, new or empty; with --layout gguf a new file that ends in .gguf")
    layout: str = flag("hf", "of what is written", ("hf", "meta", "gguf"))
    dtype: str = flag("auto", "of the weights written; auto keeps what the model has", ("auto", "bf16", "fp16", "fp32"))
    gguf_type: str = flag(
        "auto", "of the matrices in a GGUF file; auto keeps what the model has", ("auto", "f32", "f16", "bf16", "q8_0")
    )
    max_shard_bytes: int = flag(5_000_000_000, "largest safetensors file (hf)")
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self) -> None:
        if problems := find_empty(adapter_dir=self.adapter_dir):
            raise ValueError(problems[0])
        if not self.out:
            raise ValueError("--out is missing")
        if (self.layout == "gguf") != self.out.endswith(".gguf"):
            raise ValueError(f"--out {self.out} and --layout {self.layout}: a GGUF is a file whose name ends in .gguf")
        if self.gguf_type != "auto" and self.layout != "gguf":
            raise ValueError("--gguf-type is for --layout gguf; --dtype is that of the other layouts")
        if self.dtype != "auto" and self.layout == "gguf":
            raise ValueError("--dtype is for folders; --gguf-type is that of --layout gguf")
        if self.max_shard_bytes < 1:
            raise ValueError(f"--max-shard-bytes is {self.max_shard_bytes}, wanted 1 or more")


def main(argv: list[str]) -> None:
    """Export the model that the command line asks for."""
    config, _ = parse_flags(ExportConfig, argv)
    out = Path(config.out)
    if out.exists() and (config.layout == "gguf" or not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists and is not empty; choose another name")
    source = open_weights(config.model, config.adapter_dir or "")
    if holds_adapter(source) and not config.merge:
        write_adapter(out, source, config)
        return
    if config.merge and not holds_adapter(source):
        raise UsageError(f"--merge: {config.model} is no adapter; name one by --adapter-dir, or leave out --merge")
    tokenizer, style = find_tokenizer_of(source, config.tokenizer)
    if style is None:
        tokenizer = settle_template(tokenizer)
    else:
        tokenizer = adopt_style(pin_date(tokenizer) if style == "template" else tokenizer, style)
    for warning in tokenizer.warnings:
        print(f"warning: {warning}")
    if config.layout == "gguf":
        write_file(out, source, tokenizer, config.gguf_type)
    else:
        write_folder(out, source, tokenizer, config)


def holds_adapter(source: Weights) -> bool:
    """Return whether an opened model is a base with an adapter, or the training state of an adapter."""
    return isinstance(source, MergedSource) or (isinstance(source, TrainingState) and source.adapter is not None)


def write_adapter(out: Path, source: Weights, config: ExportConfig) -> None:
    """Write an adapter alone, as a GGUF file. Raise UsageError for another layout."""
    if config.layout != "gguf":
        raise UsageError(
            f"{config.adapter_dir or config.model} is an adapter: --merge writes its base with the updates in the "
            "weights, --layout gguf without it the updates alone, for llama.cpp"
        )
    if isinstance(source, MergedSource):
        adapter, factors = source.adapter.config, source.adapter.read_factors(source.config)
    else:
        assert isinstance(source, TrainingState) and source.adapter is not None
        adapter, factors = source.adapter, source.read_factors()
    kinds = {torch.float16: "f16", torch.bfloat16: "bf16"}
    of_factors = next(iter(factors.values())).dtype
    kind = kinds.get(of_factors, "f32") if config.gguf_type == "auto" else config.gguf_type
    out.parent.mkdir(parents=True, exist_ok=True)
    save_gguf_adapter(out, source.config, adapter, factors, kind)
    n = sum(t.numel() for t in factors.values())
    print(f"wrote {out}: an adapter of {n / 1e6:.2f}M parameters, {kind}")


def write_file(out: Path, source: Weights, tokenizer: Tokenizer, kind: str) -> None:
    """Write a GGUF file. kind: one of save_gguf's, or auto for what the model has."""
    kinds = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    kind = kinds[source.dtype] if kind == "auto" else kind
    vocabulary = make_vocabulary(tokenizer, source.config.vocab_size)
    size = source.config.n_parameters * {"f32": 4, "q8_0": 34 / 32}.get(kind, 2)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_disk_space(out.parent, int(size), "free some, or choose another folder")
    model = new_model(source.config, "cpu", source.dtype)
    source.read_into(model, watch=watch_parameters)
    save_gguf(out, model, vocabulary, kind, watch_parameters)
    print(f"wrote {out}: {source.config.n_parameters / 1e6:.1f}M parameters, {kind}")


def write_folder(out: Path, source: Weights, tokenizer: Tokenizer, config: ExportConfig) -> None:
    """Write a folder in Hugging Face's or Meta's layout."""
    dtype = source.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    out.mkdir(parents=True, exist_ok=True)
    require_disk_space(
        out, source.config.n_parameters * torch.finfo(dtype).bits // 8, "free some, or choose another folder"
    )
    model = new_model(source.config, "cpu", dtype)
    source.read_into(model, watch=watch_parameters)
    if config.layout == "meta":
        save_meta(out, model, watch=watch_parameters)
    else:
        save_hf(
            out, model, max_shard_bytes=config.max_shard_bytes, bos_id=tokenizer.bos_id,
            eos_ids=sorted(tokenizer.stop_ids), generation_config=source.generation_config,
            watch=watch_parameters,
        )  # fmt: skip
    tokenizer.save(out)
    print(f"wrote {out}: {source.config.n_parameters / 1e6:.1f}M parameters, {str(dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    sys.exit(run_main(main))
