"""A run made ready: data read, plan made, resume found. Everything that can be refused is refused here, before any
weight is loaded."""

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from engine.base.device import choose_device, choose_dtype, choose_kernels, cpu_multiplies_bf16
from engine.base.errors import DataError, UsageError
from engine.base.files import read_json
from engine.base.signals import Signals
from engine.base.terminal import Progress, phase
from engine.data import dataset as data
from engine.data import token_cache
from engine.data.batches import Order, count_steps_per_epoch
from engine.data.rows import mapped, read_rows
from engine.distributed.world import World
from engine.formats.find import find_model, list_checkpoints
from engine.formats.source import Source, open_source
from engine.model.config import MODELS, ModelConfig
from engine.output import checkpoint
from engine.output.folder import RUN
from engine.output.metrics import Metrics, NoMetrics
from engine.planning.fitting import shards_that_fit
from engine.planning.memory import state_bytes
from engine.planning.setting import describe_mesh
from engine.planning.workload import SEED_TASKS
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import find_tokenizer
from engine.training.config import FinetuneConfig
from engine.training.loss_spikes import Spikes
from engine.training.micro_batch_size import ALIGN, auto_layout
from engine.training.planning_input import setting_from_config

SHOWN_BYTES = 4_000_000  # read in a tenth of a second
SAMPLE_PROMPTS = (
    "Name three things you can do with an old glass jar.",
    "Rewrite the sentence so that it sounds polite: Send me the report now.",
    "Write a two-line poem about rain.",
)
# What may differ when a run goes on: it changes where things go or how often, not what is computed. Data is compared by
# the hash of its tokens, which depends on the tokenizer too, not by the names of its files.
FREE = {
    "tokenizer", "data", "eval_data", "token_cache", "out", "device", "micro_batch_tokens", "micro_batch_size",
    "packing", "share_prefix", "recompute", "offload_optimizer", "optimizer_in_backward",
    "eval_every", "sample_every", "sample_prompts", "sample_tokens", "save_every", "keep", "resume", "max_shard_bytes",
    "kernels", "deterministic", "replicas", "rank_timeout", "dry_run", "skip_bad_rows", "allow_changed", "max_skips",
    "spike_threshold", "spike_rollback", "log_every", "debug",
}  # fmt: skip


@dataclass
class Job:
    """Everything that the loop needs, ready."""

    config: FinetuneConfig
    out: Path
    device: torch.device
    dtype: torch.dtype
    kernels: str  # "triton" or "ref"
    model_config: ModelConfig
    source: Source | None  # None: random weights
    tokenizer: Tokenizer
    train: data.Dataset
    held_out: data.Dataset | None
    total_steps: int
    max_tokens: int  # of a micro-batch
    align: int  # its tokens are a multiple of
    facts: dict  # what a checkpoint records and resume compares
    prompts: list[str]  # of the samples
    replicas: int  # of the model, over the ranks
    signals: Signals
    progress: Progress | None = None
    metrics: Metrics | NoMetrics = dataclasses.field(default_factory=NoMetrics)
    saved: int | None = None  # the step whose state this process wrote or began from
    world: World = dataclasses.field(default_factory=World)  # this process among the ranks
    saver: checkpoint.Saver | None = None
    saving: int | None = None  # the step whose state was last given to it
    n_signals: int = 0  # ranks that a signal had reached in the last step that was told
    n_skipped: int = 0  # steps in a row without a finite loss
    spikes: Spikes = dataclasses.field(default_factory=lambda: Spikes(0))
    n_spiked: int = 0  # steps in a row that the run went back from
    halved: bool = False  # max_tokens, for want of memory
    told: frozenset = frozenset()  # (event, step) that metrics.jsonl held when the run was resumed

    def due(self, every: str, step: int) -> bool:
        """Whether what happens every so often happens after this step; it does after step 0 and after the last."""
        if every == "off" or step in (0, self.total_steps):
            return every != "off"
        epoch = count_steps_per_epoch(len(self.train), self.config.global_batch_size)
        return every != "end" and step % (epoch if every == "epoch" else int(every)) == 0

    def examples_of(self, step: int) -> np.ndarray:
        """The examples of an optimizer step."""
        config = self.config
        return Order(len(self.train), config.global_batch_size, config.seed, config.shuffle).examples_of(step)

    def pauses_after(self, step: int) -> bool:
        """Whether anything is due after this step that must know how it went."""
        config = self.config
        held = self.held_out is not None and self.due(config.eval_every, step)
        saves = self.keeps_states and self.due(config.save_every, step)
        return held or saves or self.due(config.sample_every, step) or step == self.total_steps

    def asked_to_stop(self) -> bool:
        """Whether a signal asks the run to end; ranks agree, since each asks what the last step told all of them."""
        return self.signals.pending() if self.world.size == 1 else self.n_signals > 0

    @property
    def runs_ahead(self) -> bool:
        """Whether the host gives the device its next step before it has heard of this one, which may be undone."""
        return self.device.type == "cuda" and not self.config.spike_rollback

    @property
    def keeps_states(self) -> bool:
        """Whether training states are kept on the way, not only when a signal asks."""
        return self.config.save_every not in ("off", "end")


def prepare(config: FinetuneConfig, out: Path, signals: Signals, say, world: World | None = None) -> Job:
    """Checks and reads everything but the weights. Raises UsageError or DataError."""
    world = world or World()
    device = choose_device(config.device)
    dtype, kernels = choose_dtype(config.dtype, device), choose_kernels(config.kernels, device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
        torch.use_deterministic_algorithms(True)
    source = None if config.random_init else open_source(find_model(config.model))
    model_config = MODELS[config.model] if source is None else source.config
    tokenizer = find_tokenizer(model_config, config.tokenizer, None if source is None else source.path)
    if config.max_length > model_config.max_seq_len:
        raise UsageError(f"--max-length {config.max_length} is over the model's {model_config.max_seq_len} positions")

    check_ranks(config, model_config, world)
    read = partial(read_tables, config, tokenizer, say, world.is_main)
    (table, skipped), *evals, cached = read() if config.token_cache == "off" else world.on_main_first(read)
    held_out = evals[0][0].select() if evals else None
    if config.eval_fraction:
        kept, held = data.hold_out(range(len(table)), config.eval_fraction, config.seed)
        if not kept:
            raise DataError(f"--eval-fraction {config.eval_fraction} of {len(held)} rows leaves none to train on")
        train, held_out = table.select(kept), table.select(held)
    else:
        train = table.select()
    train.counts["skipped"] = len(skipped)
    for bad in skipped[:5]:
        say(f"skipped {bad.source}: {bad.reason}")
    say(
        f"data{' (cached)' * cached}: "
        f"{train.counts['rows']} rows, {train.counts['examples']} examples, {train.counts['tokens']} tokens, "
        f"{train.counts['loss_tokens']} with loss; {train.counts['truncated']} truncated at {config.max_length}, "
        f"{train.counts['dropped']} dropped without a response token, {len(skipped)} bad rows skipped"
        + (f"; held out: {len(held_out)} examples" if held_out else "")
    )
    total_steps = config.epochs * count_steps_per_epoch(len(train), config.global_batch_size)
    total_steps = min(total_steps, config.max_steps or total_steps)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    settings["model"] = config.model if source is None else str(source.path.resolve())
    if config.loss_norm == "micro-mean":  # how a batch is cut is then part of the maths
        settings["micro_batch_size"] = config.micro_batch_size
    if config.spike_rollback:  # so is which steps are left out
        settings["spike_rollback"] = config.spike_threshold
    facts = {
        "settings": settings,
        "dtype": str(dtype).removeprefix("torch."),
        "model": dataclasses.asdict(model_config),
        "data_sha256": train.sha256(),
        "world_size": world.size,
        "random_state": "none: order and samples are functions of seed, epoch and step",
    }
    align = ALIGN if device.type == "cuda" else 1
    replicas, max_tokens = auto_layout(model_config, config, train, device, dtype, world.size)
    max_tokens = -(-(config.micro_batch_tokens or max_tokens) // align) * align
    return Job(
        config, out, device, dtype, kernels, model_config, source, tokenizer, train, held_out, total_steps, max_tokens,
        align, facts | {"max_tokens": max_tokens}, read_prompts(config.sample_prompts), replicas, signals, world=world,
    )  # fmt: skip


def check_ranks(config, model_config, world):
    """Raises UsageError for what several ranks cannot do."""
    if world.size > 1 and config.optimizer_in_backward:
        raise UsageError(f"--optimizer-in-backward with {world.size} ranks: gradients are summed first; leave it out")
    if config.global_batch_size < world.size:
        raise UsageError(
            f"--global-batch-size {config.global_batch_size} is under the {world.size} ranks; pass as many"
        )
    if config.replicas and world.size % config.replicas:
        counts = [r for r in range(1, world.size + 1) if world.size % r == 0]
        raise UsageError(f"--replicas {config.replicas} of {world.size} ranks; wanted one of {listed(counts)}")
    shards = world.size // (config.replicas or 1)
    if config.replicas and shards not in (counts := shards_that_fit(model_config, config.optimizer_states, world.size)):
        raise UsageError(
            f"--optimizer-states 8bit on {shards} shards would cut a block of 256 elements; wanted one of "
            f"{listed(counts[:8])} ranks a replica, or other states"
        )


def listed(numbers):
    return ", ".join(map(str, numbers))


def read_prompts(name):
    if not name:
        return list(SAMPLE_PROMPTS)
    try:
        prompts = [line for line in Path(name).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--sample-prompts {name}: cannot be read ({error}); give a UTF-8 text file") from None
    if not prompts:
        raise DataError(f"--sample-prompts {name}: holds no prompt; write one a line")
    return prompts


def watch(blocks):
    return phase("tokenising", blocks) if len(blocks) > 1 else blocks


def unwatched(blocks):
    return blocks


def read_tables(config, tokenizer, say, shown=True):
    """(table, bad rows skipped) of --data, the same of --eval-data where there is any, and whether no row had to be
    tokenised. Every file is checked before the long work begins."""
    cache = token_cache.folder(config.token_cache)
    settings = config.prompt_style, config.max_length, config.train_on_prompt

    def key_of(paths):
        return cache and token_cache.key(paths, tokenizer, *settings, config.skip_bad_rows)

    opened = []
    for names in filter(None, (config.data, config.eval_data)):
        paths = [SEED_TASKS if name == "seed-tasks" else Path(name) for name in names]
        key = key_of(paths)
        entry = cache and token_cache.load(cache, key, paths, config.max_length, say)
        opened.append((paths, key, entry, None if entry else read_data(paths, config.skip_bad_rows, shown)))
    tables = []
    for paths, key, entry, read in opened:
        if not entry:
            rows, skipped = read
            entry = data.encode(rows, tokenizer, *settings, watch if shown else unwatched), skipped
            if cache and entry[0].rows["n_loss"].any() and key == key_of(paths):  # not rewritten while it was read
                token_cache.save(cache, key, *entry, paths, say)
        tables.append(entry)
    return *tables, all(read is None for *_, read in opened)


def read_data(paths, skip_bad_rows, shown=True):
    """read_rows, under a bar where it takes more than a moment."""
    if not shown or sum(len(mapped(path)) for path in paths) < SHOWN_BYTES:
        return read_rows(paths, skip_bad_rows)
    with Progress(None, unit="reading MB") as bar:

        def progress(done_bytes, total_bytes):
            bar.total = total_bytes // 10**6
            bar.advance(done_bytes // 10**6 - bar.done)

        return read_rows(paths, skip_bad_rows, progress)


def changes(old: dict, new: dict) -> list[str]:
    """How the facts of a saved run differ from this one's."""
    found = []
    if new["settings"]["loss_norm"] == "micro-mean" and old.get("max_tokens") != new["max_tokens"]:
        found.append(f"micro_batch_tokens, which micro-mean depends on: {old.get('max_tokens')} -> {new['max_tokens']}")
    for part in ("settings", "model"):
        a, b = old.get(part, {}), new[part]
        found += [f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    found += [f"dtype: {old.get('dtype')} -> {new['dtype']}"] if old.get("dtype") != new["dtype"] else []
    if old.get("data_sha256") != new["data_sha256"]:
        found.append("the data: its tokens have another sha256")
    return found


def same_cuts(job: Job, recorded: dict) -> None:
    """Micro-batches as the saved run had them, where none are asked for: the same cuts, the same sums."""
    if job.config.micro_batch_tokens is None and "max_tokens" in recorded:
        job.max_tokens = job.facts["max_tokens"] = recorded["max_tokens"]


def find_resume(job: Job, say) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to go on from, or None to start. Raises UsageError when the run changed."""
    config, out = job.config, job.out
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = checkpoint.find_newest(out, say)
    else:
        found = checkpoint.open_checkpoint(Path(config.resume))
        if found.folder.resolve().parent != out.resolve() and list_checkpoints(out):
            raise UsageError(
                f"--resume {found.folder}: not a state of --out {out}, which has states of its own that it would replace; "
                "choose a new --out"
            )
    if found is None:
        return None
    same_cuts(job, found.manifest)
    changed = changes(found.manifest, job.facts)
    if changed and not config.allow_changed:
        raise UsageError(
            f"{found.folder}: saved by a run with other settings ({'; '.join(changed)}); "
            "pass --allow-changed to go on all the same, or --resume never to start over"
        )
    return found


def finished(job: Job) -> bool:
    """Whether --out holds this very run, done and not to be rewound. Raises UsageError when it holds another one."""
    run = read_json(job.out / RUN)
    if job.config.resume == "never" or run.get("status") != "done":
        return False
    same_cuts(job, run.get("facts", {}))
    changed = changes(run.get("facts", {}), job.facts)
    if changed and not (job.config.allow_changed and list_checkpoints(job.out)):
        raise UsageError(
            f"--out {job.out}: holds a finished run with other settings ({'; '.join(changed)}); "
            "choose another folder, or pass --resume never to replace it"
        )
    return not changed and job.config.resume == "auto"


def plan(job: Job) -> str:
    """What is about to happen, in two lines."""
    c, config = job.model_config, job.config
    held = state_bytes(c, setting_from_config(config, job.dtype))
    state = 2 * held.weights + held.master + held.states
    world, ranks = job.world, ""
    if world.size > 1:
        ranks = f", on {world.size} ranks: {describe_mesh(world.n_shards, world.replicas)}"
    emulated = job.device.type == "cpu" and job.dtype == torch.bfloat16 and not cpu_multiplies_bf16()
    slow = " (this CPU has no bf16 instructions: --dtype fp32 is faster)" if emulated else ""
    return (
        f"model: {config.model}, {c.n_parameters / 1e6:.1f}M parameters, {job.facts['dtype']} on {job.device}, "
        f"kernels: {job.kernels}{slow}; weights, gradients and optimizer {state / 1e9:.2f} GB{ranks}\n"
        f"plan: {job.total_steps} steps of {config.global_batch_size} examples in micro-batches of at most "
        f"{job.max_tokens} tokens{f' and {most} examples' if (most := config.micro_batch_size) else ''}; "
        f"{len(job.train)} examples, {config.epochs} epoch{'s' * (config.epochs > 1)}"
        f"{' at most' if config.max_steps else ''}"
    )
