"""Finds launches whose machine code is known: nothing that it depends on has changed since its record was written.

A record holds a digest of the kernel's source and constants, of the launch's types, constexprs, divisibility and
options, and of the code that reads and judges machine code. Comments, docstrings and line numbers do not count.
Compiling is deterministic, so with the same Triton an equal digest means equal machine code.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from kernels.compiled.launches import Launch
from kernels.compiled.machine_code import CHIPS

LAUNCH_FIELDS = ("op", "kernel", "case", "chip", "triton", "tile", "num_warps", "num_stages", "from")


def bare_syntax(source: str) -> str:
    """Return the syntax tree as text, without line numbers, comments and docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _describe_function(function: JITFunction, described: dict[str, str]) -> None:
    """Add to `described` the syntax of a kernel, of the functions it calls, and its global constants, by name."""
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in described:
        return
    described[name] = bare_syntax(inspect.getsource(function.fn))
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function.fn)))):
        value = function.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(value, JITFunction):
            if value.fn.__module__.startswith("triton."):  # its version stands for it
                continue
            _describe_function(value, described)
        elif isinstance(value, (tl.constexpr, int, float, str, tuple)) and isinstance(node, ast.Name):
            described[f"{name}.{node.id}"] = repr(getattr(value, "value", value))


@cache
def _digest_of_function(function: JITFunction) -> str:
    described: dict[str, str] = {}
    _describe_function(function, described)
    return hashlib.sha256(repr(sorted(described.items())).encode()).hexdigest()


@cache
def _digest_of_reader() -> str:
    """Return a digest of the code that turns launches into facts and judges them."""
    files = [
        Path(__file__).with_name(name) for name in ("launches.py", "machine_code.py", "async_order.py", "rules.py")
    ]
    sources = [bare_syntax(file.read_text()) for file in files]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def digest_launch(launch: Launch) -> str:
    """Return 16 hex digits that change with anything the launch's facts depend on, except Triton's version."""
    options = {name: value for name, value in vars(launch.options).items() if name != "extern_libs"}  # holds a path
    parts: tuple[Any, ...] = (
        _digest_of_function(launch.function), _digest_of_reader(), launch.chip, launch.signature, launch.constants,
        launch.attributes, sorted(options.items(), key=str),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find_known(launches: Iterable[Launch], described: Iterable[dict], records: Iterable[dict]) -> dict[int, dict]:
    """Return the index of each known launch and its record.

    described: for each launch a dict of LAUNCH_FIELDS. records: the records of a file. The first launch of each kernel
    and type of its first tensor counts as unknown on one chip, so that a run over all chips compiles every kernel. The
    chips take turns: the nth such pair is compiled for the nth chip, counted round.
    """
    old: dict[str, list[dict]] = {}  # by digest; cases may launch a kernel alike, and each has a record
    for r in records:
        if "inputs" in r and r["triton"] == triton.__version__:
            old.setdefault(r["inputs"], []).append(r)
    known: dict[int, dict] = {}
    samples: dict[str, list[tuple[str, str, str]]] = {chip: [] for chip in CHIPS}  # by chip, in order
    for i, (launch, fields) in enumerate(zip(launches, described, strict=True)):
        sample, seen = (launch.case.op, launch.name, next(iter(launch.signature.values()))), samples[launch.chip]
        is_first = sample not in seen
        if is_first:
            seen.append(sample)
        must_compile = is_first and list(CHIPS)[(len(seen) - 1) % len(CHIPS)] == launch.chip
        if must_compile:
            continue
        for record in old.get(digest_launch(launch), ()):
            if all(record[name] == fields[name] for name in LAUNCH_FIELDS):
                known[i] = record
                break
    return known
