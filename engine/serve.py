"""Serve a model: OpenAI's HTTP API, a page to talk to it, and a page to compare it blindly with another.

python -m engine.serve --model out/demo                              then open http://127.0.0.1:8000
python -m engine.serve --model out/demo --compare-with smollm2-135m  then open http://127.0.0.1:8000/compare
python -m engine.serve --compare-with davinci.json out/alpaca.json   two files of answers, and no model
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.base.device import choose_device, choose_dtype, choose_kernels
from engine.base.errors import CriaError, UsageError, run_main
from engine.base.flags import KERNELS, KERNELS_HELP, find_empty, flag, parse_flags
from engine.serving.models import load_adapted, load_model
from engine.serving.prompts import choose_style
from engine.text.templates import STYLES

if TYPE_CHECKING:  # they need starlette
    from engine.comparing.endpoints import Comparison
    from engine.serving.guard import Access
    from engine.serving.model_service import ModelService

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # also engine.serving.guard's, which needs starlette


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model over HTTP, as OpenAI's API and as a page."""

    model: str = flag(
        "",
        "folder (Hugging Face or Meta layout), .gguf file, training state (checkpoint-N), or the embedded "
        "smollm2-135m; auto is that one, and none where --compare-with has two files",
    )
    adapter_dir: tuple[str, ...] = flag(
        (),
        "folders of adapters of this model, ours or PEFT's. One is merged into the weights; of several, each is a "
        "model named by its folder, beside the base, whose weights are in memory once",
    )
    compare_with: tuple[str, ...] = flag(
        (),
        "what people compare blindly at /compare: a second model, as --model; or two files of answers, the baseline "
        "first, as data_gen.judge reads them",
    )
    votes: str = flag("votes.jsonl", "file that the votes of /compare are appended to; data_gen.judge --votes reads it")
    prompts: str = flag("", "file of questions for /compare, as engine.evaluate reads it; people may ask their own too")
    host: str = flag("127.0.0.1", "address to listen on; others than this machine's own want --api-key-env")
    port: int = flag(8000, "port to listen on; 0 takes a free one")
    api_key_env: str = flag("", "name of the environment variable that holds the key which clients must send")
    prompt_style: str = flag(
        "auto",
        "the template; auto is the one the model was fine-tuned with here, else its own chat template, else alpaca",
        ("auto", *STYLES),
    )
    max_concurrency: int = flag(8, "answers written at once; each has a KV cache of --max-length tokens")
    max_queue: int = flag(64, "answers that may wait; beyond, clients get 503 and Retry-After")
    max_length: int = flag(2048, "tokens of a prompt and its answer, at most what the model takes")
    max_body_bytes: int = flag(1 << 20, "bytes of a request")
    timeout: float = flag(30.0, "seconds within which a request's body must arrive")
    device: str = flag("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "of the weights; auto is bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    kernels: str = flag("auto", KERNELS_HELP, KERNELS)
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self) -> None:
        problems = find_empty(adapter_dir="" if "" in self.adapter_dir else None)
        if not 0 <= self.port < 65536:
            problems.append("--port wants 0 to 65535")
        for name in ("max_concurrency", "max_length", "max_body_bytes", "timeout"):
            if getattr(self, name) <= 0:
                problems.append(f"--{name.replace('_', '-')} wants more than 0")
        if self.max_queue < 0:
            problems.append("--max-queue wants 0 or more")
        if self.host not in LOOPBACK and not self.api_key_env:
            problems.append(f"--host {self.host} lets other machines in; name a key by --api-key-env")
        if len(self.adapter_dir) > 1 and self.compare_with:
            problems.append("--compare-with compares two models; name an adapter's folder there, or one --adapter-dir")
        if len(self.compare_with) > 2:
            problems.append(f"--compare-with wants a model or two files of answers, got {len(self.compare_with)} names")
        if len(self.compare_with) == 1 and self.compare_with[0].endswith((".json", ".jsonl")):
            problems.append(f"--compare-with {self.compare_with[0]} is a file of answers; give two, or a model")
        if self.prompts and len(self.compare_with) != 1:
            problems.append("--prompts goes with --compare-with MODEL; two files of answers have their own questions")
        if problems:
            raise ValueError("\n".join(problems))


def read_key(name: str) -> str | None:
    """Return the key in an environment variable, None for no name. Raise UsageError if it is not there."""
    if not name:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(f"--api-key-env {name}: this environment variable is not set; export a key in it")
    return key


def main(argv: list[str]) -> None:
    """Load the models, or read the answers, and serve them until a signal ends the process."""
    config, _ = parse_flags(ServeConfig, argv)
    key = read_key(config.api_key_env)
    try:
        from engine.serving.app import Server
        from engine.serving.guard import LOOPBACK as NAMES
        from engine.serving.guard import Access
        from engine.serving.listen import listen
    except ImportError as error:
        raise UsageError(f"engine.serve needs {error.name}; pip install 'cria-engine[serve]'") from None
    access = Access(NAMES if config.host in NAMES else (), key, config.max_body_bytes, config.timeout)
    prepared = prepare_comparison(config) if config.compare_with else None
    services = load_services(config)
    comparison = prepared(services, access).routes() if prepared else []
    try:
        listen(Server(services, access, comparison), config.host, config.port)
    except OSError as error:
        raise CriaError(f"--port {config.port}: cannot be listened on ({error.strerror}); choose another") from None


def name_models(models: list[str]) -> list[str]:
    """Return a name for each model: its folder's or file's, or the whole path where two have one name."""
    short = [Path(model).name or model for model in models]
    names = [str(Path(model)) if short.count(name) > 1 else name for model, name in zip(models, short, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} is named twice; name another model or adapter")
    return names


def load_services(config: ServeConfig) -> "list[ModelService]":
    """Return the models that the settings name, ready to answer."""
    from engine.serving.model_service import Limits, ModelService

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    kernels = choose_kernels(config.kernels, device, dtype)
    others = list(config.compare_with) if len(config.compare_with) == 1 else []
    model, adapters = config.model or "smollm2-135m", config.adapter_dir
    if not config.model and not adapters and len(config.compare_with) == 2:
        names, loaded = [], []
    elif len(adapters) > 1:
        names = name_models([model, *adapters])
        loaded = load_adapted(model, adapters, device, dtype, kernels)
    else:
        own = adapters[0] if adapters else ""
        names = name_models([own or model, *others])
        loaded = [load_model(model, device, dtype, kernels, own)]
        loaded += [load_model(other, device, dtype, kernels) for other in others]
    services = []
    for name, (transformer, tokenizer, trained) in zip(names, loaded, strict=True):
        for warning in tokenizer.warnings:
            print(f"warning: {name}: {warning}", file=sys.stderr)
        style = choose_style(config.prompt_style, trained, tokenizer)
        longest = min(config.max_length, transformer.config.max_positions)
        limits = Limits(config.max_concurrency, config.max_queue, longest)
        services.append(ModelService(name, transformer, tokenizer, style, limits))
    return services


def prepare_comparison(config: ServeConfig) -> "Callable[[Sequence[ModelService], Access], Comparison]":
    """Read all files of a comparison, before a model is loaded. Return what makes it of the models."""
    from engine.comparing.endpoints import Comparison
    from engine.comparing.questions import ModelContestant, read_contestants, read_questions
    from engine.comparing.vote_file import VoteFile

    if len(config.compare_with) == 2:
        files, questions = read_contestants(config.compare_with)
        votes = VoteFile(Path(config.votes))
        return lambda services, access: Comparison(
            files, votes, access, questions, has_fixed_questions=True, can_talk=bool(services)
        )
    asked = read_questions(Path(config.prompts)) if config.prompts else []
    votes = VoteFile(Path(config.votes))

    def compare(services: "Sequence[ModelService]", access: "Access") -> Comparison:
        first, second = (ModelContestant(service, service.name) for service in services)
        longest = min(service.limits.max_length for service in services)
        return Comparison((first, second), votes, access, asked, longest=longest, can_talk=True)

    return compare


if __name__ == "__main__":
    sys.exit(run_main(main))
