"""The commands that a run tells its user: itself again, and what can be done with its model."""

import os
import shlex
import shutil
import sys

from engine.data.prompts import ask_for
from engine.data.rows import read_rows, resolve_data_paths
from engine.training.config import FinetuneConfig

MOST_BYTES = 4_000_000  # of held-out data that is read for a question


def name_python() -> str:
    """Return what a shell in this folder calls this Python: "python", or its path where that is another one or none."""
    if os.path.abspath(shutil.which("python") or "") == os.path.abspath(sys.executable):
        return "python"
    return shlex.quote(min(sys.executable, os.path.relpath(sys.executable), key=len))


def format_command(n_ranks: int) -> str:
    """Return the command of this run as a shell takes it."""
    start = f"torchrun --nproc-per-node={n_ranks}" if n_ranks > 1 else name_python()
    return f"{start} -m engine.finetune {shlex.join(sys.argv[1:])}".rstrip()


def describe_use(config: FinetuneConfig) -> dict[str, str]:
    """Return {what one can do with the model of a run: the command}."""
    python, out = name_python(), shlex.quote(config.out)
    return {
        "ask it": f"{python} -m engine.generate --model {out} {find_question(config)}",
        "talk to it": f"{python} -m engine.serve --model {out}",
    }


def find_question(config: FinetuneConfig) -> str:
    """Return the flags of engine.generate that ask the first held-out row, or one of our own without small files."""
    paths = resolve_data_paths(config.eval_data[:1])
    if not paths or paths[0].stat().st_size > MOST_BYTES:
        return '--prompt "Name three uses for a paper clip."'
    row = read_rows(paths, skip_bad_rows=True, with_tools=config.prompt_style == "template")[0][0]
    if row.input and not row.messages:
        return f"--prompt {shlex.quote(row.instruction)} --input {shlex.quote(row.input)}"
    return f"--prompt {shlex.quote(ask_for(row))}"
