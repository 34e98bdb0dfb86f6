"""Serve a model: OpenAI's HTTP API, and a page to talk to it.

python -m engine.serve --model out/demo          then open http://127.0.0.1:8000
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.base.device import choose_device, choose_dtype, choose_kernels
from engine.base.errors import CriaError, UsageError, run_main
from engine.base.flags import KERNELS, KERNELS_HELP, flag, parse_flags
from engine.inference.model_loader import load_model
from engine.serving.prompts import choose_style
from engine.text.templates import STYLES

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # also engine.serving.guard's, which needs starlette


@dataclass(frozen=True)
class ServeConfig:
    """Serve a model over HTTP, as OpenAI's API and as a page."""

    model: str = flag("smollm2-135m", "folder (Hugging Face or Meta layout), .gguf file, or the embedded smollm2-135m")
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
        problems = []
        if not 0 <= self.port < 65536:
            problems.append("--port wants 0 to 65535")
        for name in ("max_concurrency", "max_length", "max_body_bytes", "timeout"):
            if getattr(self, name) <= 0:
                problems.append(f"--{name.replace('_', '-')} wants more than 0")
        if self.max_queue < 0:
            problems.append("--max-queue wants 0 or more")
        if self.host not in LOOPBACK and not self.api_key_env:
            problems.append(f"--host {self.host} lets other machines in; name a key by --api-key-env")
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
    """Load the model and serve it until a signal ends the process."""
    config, _ = parse_flags(ServeConfig, argv)
    key = read_key(config.api_key_env)
    try:
        from engine.serving.app import Server
        from engine.serving.guard import LOOPBACK as NAMES
        from engine.serving.guard import Access
        from engine.serving.listen import listen
        from engine.serving.model_service import Limits, ModelService
    except ImportError as error:
        raise UsageError(f"engine.serve needs {error.name}; pip install 'cria-engine[serve]'") from None
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model, tokenizer, source = load_model(config.model, device, dtype, choose_kernels(config.kernels, device, dtype))
    for warning in tokenizer.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    style = choose_style(config.prompt_style, source.path, tokenizer)
    longest = min(config.max_length, model.config.max_positions)
    limits = Limits(config.max_concurrency, config.max_queue, longest)
    name = Path(config.model).name or config.model
    service = ModelService(name, model, tokenizer, style, limits)
    hosts = NAMES if config.host in NAMES else ()
    server = Server([service], Access(hosts, key, config.max_body_bytes, config.timeout))
    try:
        listen(server, config.host, config.port)
    except OSError as error:
        raise CriaError(f"--port {config.port}: cannot be listened on ({error.strerror}); choose another") from None


if __name__ == "__main__":
    sys.exit(run_main(main))
