"""The launches, bytes and instructions of one training step by kind, counted without a GPU.

    python -m scripts.step.launches [--variant NAME] [--tokens N] [--instructions] [--json FILE --label WORDS]

A step of scripts.step.bench (a model's shape, rows of Alpaca's lengths, loss, backward, gradient norm and AdamW) runs
on tensors without storage. Every operator of torch for which a GPU would launch a kernel counts as one launch. Within
our own operators every kernel that their launch functions launch for the chip counts.

Bytes are the least that a launch can move: what it reads counts once, and what it writes counts once. Reads that a
cache serves are not seen, and parts of a tensor that a launch leaves alone count. torch's addmm of a matrix that is not
its output copies the matrix first; the copy counts as a launch of its own.

--instructions executes the first programs of our kernels on the PTX machine, or all programs where a list made on the
host gives each its work, and counts the instructions of their warps. torch's kernels are not executed.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from engine.data.batches import Batches, Order
from engine.data.packing import Packing
from engine.model.batch import DeviceMicroBatch, MicroBatch
from engine.model.llama import Transformer, new_model
from engine.training.micro_batch_size import TOKENS_MULTIPLE
from engine.training.optimizer import AdamW
from kernels.base.commands import run_command
from kernels.compiled.launches import patched
from kernels.compiled.ptx import Options
from kernels.compiled.simulation import run_launch
from kernels.ops import common, eight_bit
from kernels.ops.adamw_kernels import update_kernel
from scripts.base.results import new_parser, write_json
from scripts.step.bench import CLIP, LR, VARIANTS, Variant
from scripts.step.breakdown import KINDS, kind_of
from scripts.step.rows import alpaca_rows, model_shape, rows_a_step

NO_LAUNCH = re.compile(r"empty|new_empty|detach|lift|_unsafe_view|resize_|is_|set_")
GATHERS = ("embedding", "index", "index_select")  # read as much as they write
FILLS = ("zero_", "fill_", "zeros", "new_zeros", "zeros_like", "ones_like", "full")
SAMPLED_PROGRAMS = 8  # of a kernel whose programs all do the same work


@dataclass
class Count:
    """Launches of one kind, and what they do."""

    launches: int = 0
    bytes: int = 0
    instructions: int = 0  # of warps


@dataclass
class Call:
    """A launch of ours, and how often a step has it."""

    function: JITFunction
    arguments: tuple
    options: dict[str, Any]
    grid: tuple[int, ...]
    kind: str
    times: int = 0


@dataclass
class StepCounts:
    """The launches of a step."""

    kinds: dict[str, Count] = field(default_factory=lambda: {kind: Count() for kind in (*KINDS, "other")})
    names: Counter[str] = field(default_factory=Counter)  # operator: kernel -> launches
    calls: dict[tuple, Call] = field(default_factory=dict)

    def add(self, name: str, operators: list[str], n_bytes: int) -> str:
        """Count a launch within these operators, the innermost last, and return its kind."""
        kind = kind_of(name, operators)
        self.kinds[kind].launches += 1
        self.kinds[kind].bytes += n_bytes
        self.names[f"{operators[0]}: {name}"] += 1
        return kind

    def total(self) -> Count:
        """Return the sums over all kinds."""
        counts = self.kinds.values()
        return Count(*(sum(getattr(c, name) for c in counts) for name in ("launches", "bytes", "instructions")))


class Watch(TorchDispatchMode):
    """Counts what a GPU would launch for the operators that run within the context, on tensors without storage."""

    def __init__(self, counts: StepCounts) -> None:
        super().__init__()
        self.counts = counts
        self.within: list[str] = []  # the operator of ours whose launch function runs
        self.written: set[int] = set()  # the storages that it writes, of its arguments

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "cria":
            out = func(*args, **kwargs)
            self.count_torch(func, args, kwargs, out)
            return out
        self.within.append(func._schema.name)
        written = [arg for arg, of in zip(args, func._schema.arguments, strict=False) if of.is_write]
        self.written = {storage_of(t) for t in tree_leaves(written) if isinstance(t, torch.Tensor)}
        with self:
            out = OPDEFS[func._schema.name].launch(*args, **kwargs)
        self.within.pop()
        return out

    def count_torch(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count the launches of an operator of torch's."""
        name, returns = func.overloadpacket.__name__, func._schema.returns
        if NO_LAUNCH.match(name) or any(r.alias_info and not r.alias_info.is_write for r in returns):
            return
        n_written, n_read = (
            sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, torch.Tensor)) for tree in (out, (args, kwargs))
        )
        n_read = n_written if name in GATHERS else 0 if name in FILLS else n_read
        operators = [*self.within, f"aten::{name}"]
        if name == "addmm" and func._overloadname == "default" and args[0].shape == out.shape:
            self.counts.add("Memcpy DtoD", operators, 2 * n_written)
        self.counts.add(name, operators, n_read + n_written)

    def count_triton(self, function: JITFunction, *args: Any, grid: tuple, warmup: bool, **options: Any) -> None:
        """Count a launch of ours. A tensor counts once if it is loaded from, and once more if it is stored to.

        Of a launch over many tensors all count that its table reaches, see kernels.ops.tensor_table: twice, if they are
        arguments that the operator writes.
        """
        given = dict(zip(function.arg_names, args, strict=False)) | options
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        reached = [t for table in tensors.values() for t in getattr(table, "reached", ())]
        n_bytes = sum((1 + (storage_of(t) in self.written)) * t.nbytes for t in reached)
        for name, t in tensors.items():
            if any(t.data_ptr() == one.data_ptr() and storage_of(t) == storage_of(one) for one in reached):
                continue
            uses = sum(bool(re.search(rf"tl\.{use}\(\s*{name}\b", function.src)) for use in ("load", "store"))
            if function is update_kernel:  # which hands its pointers on
                uses = 1 + (storage_of(t) in self.written)
            n_bytes += max(1, uses) * t.nbytes
        kind = self.counts.add(function.fn.__name__, self.within, n_bytes)
        key = (function.fn.__module__, function.fn.__name__, grid, str(options), *map(describe_argument, args))
        self.counts.calls.setdefault(key, Call(function, args, options, grid, kind)).times += 1


def storage_of(t: torch.Tensor) -> int:
    """Return what tensors of one storage have in common."""
    return t.untyped_storage()._cdata


def describe_argument(argument: Any) -> Any:
    """Return what two launches that execute as many instructions share of an argument."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape, argument.stride()
    return type(argument)


def put_on_meta(model: Transformer, batch: MicroBatch) -> DeviceMicroBatch:
    """Return a micro-batch without storage. Its attention plans, which grids depend on, are real."""
    rows, row_of_target = batch.loss_rows.unique_consecutive(return_inverse=True)
    plans = model.plan_attention(batch.documents, len(batch.tokens), torch.device("cpu"), rows)
    several = None if len(rows) == len(row_of_target) else row_of_target
    tensors = batch.tokens, batch.positions, batch.targets, batch.weights, rows, several
    tokens, positions, targets, weights, rows, several = (None if t is None else t.to("meta") for t in tensors)
    return DeviceMicroBatch(tokens, positions, targets, weights, rows, several, plans)


def count_step(variant: Variant, chip: str, smoke: bool = False) -> StepCounts:
    """Return the counts of the first step of a variant, its update included."""
    config, rows = model_shape(variant.model, smoke), alpaca_rows(1, smoke)
    packing = Packing(variant.tokens, share_prefix=variant.sharing, multiple=TOKENS_MULTIPLE)
    batch = Batches(rows, Order(len(rows), rows_a_step(smoke), seed=0, shuffle=False), packing).make_step(1)
    watch = Watch(StepCounts())

    def run(function, *args, **kwargs):
        watch.count_triton(function, *args, **kwargs)

    eight_bit.tables(torch.device("meta"))  # made once in a process
    with patched(common, chip_override=chip, INTERPRETED=True), patched(JITFunction, run=run):
        model = new_model(config, "meta", torch.bfloat16, "triton", variant.recompute, accumulate=True)
        optimizer = AdamW(
            model, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, master=variant.master, states=variant.states,
            impl="triton",
        )  # fmt: skip
        micro_batches = [put_on_meta(model, one) for one in batch.micro_batches]
        with watch:
            total = torch.zeros((), device="meta")
            for one in micro_batches:
                loss = model.loss(one)
                loss.backward()
                total += loss.detach()
            norm = optimizer.grad_norm()
            optimizer.step(LR, norm, CLIP, apply=torch.isfinite(total + norm))
    return watch.counts


def count_instructions(counts: StepCounts, chip: str) -> None:
    """Execute our kernels on the PTX machine, and add the instructions of their warps to the counts."""
    for call in counts.calls.values():
        on_host = [t for t in call.arguments if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        has_lists = any(not hasattr(t, "reached") for t in on_host)
        grid = call.grid if has_lists else (min(call.grid[0], SAMPLED_PROGRAMS), *call.grid[1:])
        # Memory that nothing has written is zero and takes no place: a weight of 7B's size can be had for its address.
        arguments = tuple(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, torch.Tensor) and t.is_meta else t
            for t in call.arguments
        )
        with patched(common, chip_override=chip, INTERPRETED=True):
            launch = call.function, arguments, call.options
            result = run_launch(launch, grid, chip, None, Options(check=False))
        if result.findings:
            raise RuntimeError(f"{result.kernel}: {result.findings[0]}")
        share = call.grid[0] / grid[0]
        counts.kinds[call.kind].instructions += round(call.times * share * result.counters["instructions"])


def describe_counts(variant: Variant, chip: str, counts: StepCounts) -> dict:
    """Return a record of a step's counts."""
    kinds = {kind: asdict(count) for kind, count in counts.kinds.items() if count.launches}
    return {"variant": asdict(variant), "chip": chip, "all": asdict(counts.total()), "kinds": kinds}


def save_record(path: Path, label: str, record: dict) -> None:
    """Write a record under its label, and keep those of other labels."""
    records = json.loads(path.read_text())["records"] if path.exists() else {}
    write_json(path, {"what": "scripts.step.launches", "records": records | {label: record}})


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__, "python -m scripts.step.launches")
    parser.add_argument("--variant", choices=VARIANTS, default="llama-7b", metavar="NAME", help="of scripts.step.bench")
    parser.add_argument("--tokens", type=int, help="of a micro-batch, at most (the variant's)")
    parser.add_argument("--chip", choices=("sm_80", "sm_90"), default="sm_90")
    parser.add_argument("--instructions", action="store_true", help="execute our kernels too; takes minutes")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record there, beside those of other labels"
    )
    parser.add_argument("--label", default="now", help="of the record (now)")
    parser.add_argument("--smoke", action="store_true", help="a toy model")
    args = parser.parse_args(argv)
    variant = replace(VARIANTS[args.variant], **{"tokens": args.tokens} if args.tokens else {})
    counts = count_step(variant, args.chip, args.smoke)
    if args.instructions:
        count_instructions(counts, args.chip)
    print(f"{'kind':<20}{'launches':>9}{'GB':>9}{'G instructions':>16}")
    for kind, c in [*sorted(counts.kinds.items(), key=lambda item: -item[1].bytes), ("all", counts.total())]:
        print(f"{kind:<20}{c.launches:>9}{c.bytes / 1e9:>9.2f}{c.instructions / 1e9:>16.3f}")
    print(*(f"  {name} {times}" for name, times in counts.names.most_common()), sep="\n")
    if args.json:
        save_record(args.json, args.label, describe_counts(variant, args.chip, counts))


if __name__ == "__main__":
    run_command(main)
