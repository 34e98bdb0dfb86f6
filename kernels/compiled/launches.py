"""Records what the launch functions launch, without a GPU, and compiles it for chips that are not here.

A launch function runs on tensors without storage, while Triton's launch is replaced by one that records its arguments.
Triton's own binder derives types and divisibility from them, as it would on a GPU.
"""

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import triton
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels.compiled.launch_cases import Case, Make
from kernels.compiled.machine_code import CHIPS, Facts, read_facts
from kernels.ops import common

EntryPath = tuple[str, str, str, str]  # op, kernel, chip, size: the keys of one launch configuration


@dataclass
class Launch:
    """One recorded launch, with what Triton's JIT derives from its arguments."""

    case: Case
    chip: str
    function: JITFunction
    signature: dict[str, str]  # name of a parameter -> its type
    constants: dict[tuple[int], Any]  # (position,) -> value
    attributes: dict[tuple[int], Any]  # (position,) -> divisibility
    options: Any  # the backend's, parsed
    arguments: dict[str, Any]  # name of a parameter -> the argument as it was given
    entry: EntryPath | None = None  # the launch configuration in use

    @property
    def name(self) -> str:
        """Return the kernel's name."""
        return self.function.fn.__name__

    def constexprs(self) -> dict[str, Any]:
        """Return the values of the constexpr parameters by name."""
        return {name: self.constants[i,] for i, name in enumerate(self.signature) if (i,) in self.constants}

    def key(self) -> tuple[str, ...]:
        """Return a key that two launches share exactly when one compilation serves both."""
        compiled = (self.signature, self.constants, self.attributes, self.options)
        return (self.function.fn.__module__, self.function.fn.__qualname__, self.chip, *map(str, compiled))


# ---- recording ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of an object or module for as long as the context lasts."""
    old = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)


class NotingTable(dict):
    """A launch table that calls note(path of keys, entry) whenever one of its entries is read."""

    def __init__(self, data: dict, note: Callable[[EntryPath, dict], None], path: tuple[str, ...]) -> None:
        is_inner = len(path) < 3  # the levels are op, kernel, chip and size
        super().__init__({k: NotingTable(v, note, (*path, k)) if is_inner else v for k, v in data.items()})
        self.note, self.path = note, path

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key, and note the entry if it is one."""
        value = super().__getitem__(key)
        if len(self.path) == 3:
            op, kernel, chip = self.path
            self.note((op, kernel, chip, key), value)
        return value


def call_case(call: Sequence) -> Any:
    """Call call[0] with the arguments after it. For an operator, call its launch function directly."""
    op, *args = call
    return getattr(op, "launch", op)(*args)


def bind_arguments(function: JITFunction, args: tuple, kwargs: dict, chip: str) -> tuple[Any, dict, dict, dict, dict]:
    """Return (options, signature, constants, attributes, arguments by name), as Triton's JIT derives them."""
    backend = make_backend(GPUTarget("cuda", CHIPS[chip], 32))
    kwargs = {"debug": False, **kwargs}
    binder = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    return *function._pack_args(backend, kwargs, bound, specialization, options), bound


def record_launches(case: Case, chip: str, table: Callable[[str], dict] = common.launch_table) -> list[Launch]:
    """Return the launches of one case on one chip. Of launches that compile alike, keep the one with most elements.

    table: returns an op's launch table by the op's name.
    """
    launches: list[Launch] = []
    read: list[tuple[EntryPath, dict]] = []

    def record(function, *args, grid, warmup, **kwargs):
        options, signature, constants, attributes, bound = bind_arguments(function, args, kwargs, chip)
        launch = Launch(case, chip, function, signature, constants, attributes, options, bound)
        launch.entry = _entry_of(launch, read)
        launches.append(launch)

    def noting_table(op):
        return NotingTable(table(op), lambda path, values: read.append((path, values)), (op,))

    with patched(common, chip_override=chip, launch_table=noting_table), patched(JITFunction, run=record):
        call_case(case.build(Make()))  # built here, because attention's plan depends on the table's tiles
    launches.sort(key=lambda launch: sum(t.numel() for t in launch.arguments.values() if torch.is_tensor(t)))
    return list({launch.key(): launch for launch in launches}.values())


def _agreement(values, launch):
    """Return how many of an entry's values this launch used, or -1 if one differs.

    Values that are neither options nor constexprs of the launch are for its launch function and do not count.
    """
    given = vars(launch.options) | launch.constexprs()
    known = [name for name in values if name in given and name != "from"]
    return len(known) if all(given[name] == values[name] for name in known) else -1


def _entry_of(launch, read):
    """Return the path of the entry a launch uses: of the entries read so far, the last that agrees in most values."""
    agreed = [(_agreement(values, launch), i) for i, (_, values) in enumerate(read)]
    most, i = max(agreed, default=(-1, 0))
    return read[i][0] if most > 0 else None


# ---- compiling ------------------------------------------------------------------------------------------------------


def compile_source(
    module: str, name: str, chip: str, signature: dict, constants: dict, attributes: dict, options: dict
) -> Facts:
    """Compile the kernel `name` of a module for a chip and return the facts of its machine code."""
    source = ASTSource(getattr(import_module(module), name), signature, constants, attributes)
    return read_facts(triton.compile(source, target=GPUTarget("cuda", CHIPS[chip], 32), options=options))


def _source_of(launch):
    """Return the arguments of compile_source for a launch, which a process that was not forked can take too."""
    function = launch.function.fn
    compiled = launch.signature, launch.constants, launch.attributes, vars(launch.options)
    return function.__module__, function.__qualname__, launch.chip, *compiled


def _compile_one(source):
    try:
        return compile_source(*source)
    except Exception as error:  # a compiler's complaint is a finding about one kernel, not the gate's end
        return f"{type(error).__name__}: {error}".strip()


def compile_all(launches: Sequence[Launch], workers: int = 2) -> list[Facts | str]:
    """Return the facts of each launch, or the compiler's error message. Launches that compile alike share one run."""
    unique = {launch.key(): _source_of(launch) for launch in launches}
    # CUDA's threads and locks do not survive a fork; a server that has never used CUDA forks the workers instead.
    method = "forkserver" if torch.cuda.is_initialized() else "fork"
    with multiprocessing.get_context(method).Pool(workers) as pool:
        done = pool.imap(_compile_one, unique.values())
        facts = dict(zip(unique, track(done, "compiling", len(unique), disable=not sys.stderr.isatty()), strict=True))
    return [facts[launch.key()] for launch in launches]
