"""Says whether the results of kernels.simulate are known: no code has changed since they were written.

Compiling and executing are deterministic, so the same sources, Triton and torch give the same result. A run of all
cases writes a digest of these sources beside its records. Comments, docstrings and line numbers do not count.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from kernels.compiled.known import bare_syntax
from kernels.measure.simulated_cases import SimulatedCase
from kernels.measure.simulated_records import load_records

PACKAGE = Path(__file__).parents[1]
SOURCES = (  # of kernels/ and of what it is compiled from
    "compiled/*.py", "measure/*cases.py", "measure/documents.py", "measure/peers.py", "measure/quantised.py",
    "measure/simulated_records.py", "measure/truth.py", "native/cuda.py", "ops/*.py", "launch/*.json", "../csrc/ptx/*",
    "../csrc/cuda/*",
)  # fmt: skip


def digest_sources() -> str:
    """Return 16 hex digits that change with anything a record depends on, except Triton's version."""
    parts = [torch.__version__.partition("+")[0]]
    for pattern in SOURCES:
        for path in sorted(PACKAGE.glob(pattern)):
            text = path.read_text()
            parts += [path.name, bare_syntax(text) if path.suffix == ".py" else text]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def is_recorded(path: Path) -> bool:
    """Return whether a run of all cases under this Triton wrote the file from the sources as they are now."""
    return load_records(path)["versions"].get(triton.__version__, {}).get("sources") == digest_sources()


def choose_samples(cases: Sequence[SimulatedCase], chips: Sequence[str]) -> list[tuple[int, str]]:
    """Return (index, chip) of the first case of each op and dtype. The chips take turns, in the order of the cases.

    A case whose kernels are not compiled for all of the chips takes the first for which they are.
    """
    firsts: dict[tuple[str, torch.dtype], int] = {}
    for index, case in enumerate(cases):
        firsts.setdefault((case.case.op, case.dtype), index)
    turns = [(index, chips[turn % len(chips)]) for turn, index in enumerate(firsts.values())]
    return [(i, chip if chip in cases[i].chips else cases[i].chips[0]) for i, chip in turns]
