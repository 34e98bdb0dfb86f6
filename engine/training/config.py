"""Every setting of a fine-tuning run: a flat frozen dataclass whose fields are the flags of engine.finetune.

python -m engine.finetune --model /models/llama-7b --data alpaca_data.json --out out/alpaca
python -m engine.finetune --model smollm2-135m --data rows.jsonl --eval-fraction 0.05 --dry-run
torchrun --nproc-per-node=8 -m engine.finetune --model /models/llama-13b --data rows.jsonl --out out/rows
"""

from dataclasses import dataclass
from typing import ClassVar

from engine.base.flags import KERNELS, KERNELS_HELP, find_empty, flag, name_to_flag, suggest_nearest
from engine.model.adapter import ALL_LINEAR, adapter_from_settings
from engine.model.config import EMBEDDED_MODEL, MODELS
from engine.output.trackers import TRACKERS
from engine.text.templates import STYLES

ADAPTERS = ("none", "lora", "qlora")
LORA_FLAGS = (
    "adapter_dir", "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "lora_rank_pattern",
    "lora_alpha_pattern", "lora_save",
)  # fmt: skip
EVERY = "off, end, epoch, or a number of steps"
HINTS = {"batch_size": "global_batch_size", "num_epochs": "epochs", "max_seq_length": "max_length"}  # for unknown flags
# The groups of --help, in its order. A flag that stands in none comes under "other".
GROUPS = {
    "model": ("model", "random_init", "tokenizer", "dtype"),
    "data": (
        "data", "eval_data", "eval_fraction", "prompt_style", "train_on_prompt", "max_length", "skip_bad_rows",
        "token_cache", "shuffle", "seed",
    ),
    "recipe": (
        "epochs", "max_steps", "global_batch_size", "lr", "lr_schedule", "warmup_ratio", "weight_decay", "beta1",
        "beta2", "adam_eps", "grad_clip", "loss_norm", "max_skips", "spike_threshold", "spike_rollback",
    ),
    "memory and speed": (
        "micro_batch_tokens", "micro_batch_size", "packing", "share_prefix", "recompute", "master_weights",
        "optimizer_states", "offload_optimizer", "optimizer_in_backward", "device", "kernels", "deterministic",
    ),
    "adapters": ("adapter", *LORA_FLAGS),
    "several GPUs": ("replicas", "rank_timeout"),
    "saving": ("out", "save_every", "keep", "resume", "allow_changed", "max_shard_bytes"),
    "looking": (
        "dry_run", "eval_every", "score_answers", "sample_every", "sample_prompts", "sample_tokens", "log_every",
        "tracker", "profile", "debug",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a LLaMA on instruction data.

    With neither --model nor --data it teaches SmolLM2-135M to write customers' messages as orders, in minutes on a CPU.
    """

    GROUPS: ClassVar = GROUPS
    HINTS: ClassVar = HINTS
    model: str = flag(
        "", "folder (Hugging Face or Meta layout), .gguf file, or named model", alias="model_name_or_path"
    )
    random_init: bool = flag(False, "start from random weights; --model is then a named shape: " + ", ".join(MODELS))
    tokenizer: str = flag("", "folder or .gguf of the tokenizer, where the model has none of its own")
    data: tuple[str, ...] = flag(
        (),
        "files of rows (Alpaca, chats, text) as JSON, JSONL, CSV or parquet, also gzipped: docs/data.md",
        alias="data_path",
    )
    token_cache: str = flag(
        "auto", "folder that keeps tokenised data, or off; auto is cria/tokens in $XDG_CACHE_HOME or ~/.cache"
    )
    out: str = flag("out/finetune", "output folder", alias="output_dir")
    epochs: int = flag(3, "passes over the data", alias="num_train_epochs")
    max_steps: int | None = flag(None, "stop after this many optimizer steps (the schedule ends there too)")
    global_batch_size: int = flag(128, "examples an optimizer step, over all ranks")
    micro_batch_tokens: int | None = flag(None, "most tokens of one forward on one rank (auto: by device)")
    micro_batch_size: int | None = flag(None, "most examples of one forward")
    packing: bool = flag(True, "best-fit of a step's examples into micro-batches; off: in their order")
    share_prefix: bool = flag(True, "compute what examples of a micro-batch begin with in common, as a template, once")
    max_length: int = flag(512, "tokens an example is cut at", alias="model_max_length")
    lr: float = flag(2e-5, "peak learning rate", alias="learning_rate")
    lr_schedule: str = flag("cosine", "after warm-up", ("cosine", "linear", "constant"), alias="lr_scheduler_type")
    warmup_ratio: float = flag(0.03, "share of all steps in which the rate rises from 0")
    weight_decay: float = flag(0.0, "of matrices; norms and biases are never decayed")
    beta1: float = flag(0.9, "AdamW")
    beta2: float = flag(0.999, "AdamW")
    adam_eps: float = flag(1e-8, "AdamW")
    grad_clip: float = flag(1.0, "largest global gradient norm; 0 is no clipping")
    seed: int = flag(42, "of the order of rows, the held-out split, random weights, samples")
    shuffle: bool = flag(True, "a new order each epoch; off: the order of the files")
    replicas: int | None = flag(
        None,
        "of the model, over the ranks that torchrun starts: each is sharded over ranks / replicas (FSDP2); as many as "
        "ranks is plain data parallelism (auto: where a step is several micro-batches, as many as fit without more)",
    )
    rank_timeout: float = flag(600.0, "seconds after which a rank that is not heard of ends the run")
    device: str = flag("auto", "auto is cuda where there is one", ("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "of weights and activations; auto is bf16 on CUDA, fp32 on CPU", ("auto", "bf16", "fp32"))
    prompt_style: str = flag("alpaca", "the template; template is the checkpoint's own chat template", STYLES)
    train_on_prompt: bool = flag(False, "loss on the prompt too, not on the response alone")
    adapter: str = flag(
        "none",
        "what is trained: none, all weights; lora, low-rank updates beside frozen weights; qlora, such updates beside "
        "weights in 4 bits",
        ADAPTERS,
    )
    adapter_dir: str | None = flag(
        None,
        "folder of an adapter (ours or PEFT's) to go on from; its shape takes the place of the flags below, but "
        "for --lora-dropout",
    )
    lora_r: int = flag(16, "rank of the updates")
    lora_alpha: float = flag(32.0, "updates are scaled by alpha / r")
    lora_dropout: float = flag(0.0, "share of a map's inputs that its update does not see in a step")
    lora_targets: tuple[str, ...] = flag(
        ("all-linear",), "the maps with an update: " + ", ".join(ALL_LINEAR) + ", or ends of their paths"
    )
    rslora: bool = flag(False, "scale the updates by alpha / sqrt(r)")
    lora_rank_pattern: tuple[str, ...] = flag((), "ranks of some maps, as down_proj=8; the first that fits counts")
    lora_alpha_pattern: tuple[str, ...] = flag((), "alphas of some maps, as down_proj=16")
    lora_save: tuple[str, ...] = flag((), "what is trained whole beside the updates: embed_tokens, lm_head")
    loss_norm: str = flag(
        "token",
        "token: by the loss tokens of the global batch; micro-mean: as the 2023 trainer",
        ("token", "micro-mean"),
    )
    master_weights: str = flag(
        "split",
        "the fp32 number behind a bf16 weight: split, the weight and 16 bits more; fp32, a copy beside it; stochastic, "
        "none but the weight, rounded at random",
        ("split", "fp32", "stochastic"),
    )
    optimizer_states: str = flag(
        "auto",
        "AdamW's m and v; 8bit is blockwise, 2 bytes a parameter in all; auto is fp32 where they fit, else what is "
        "updated sooner of bf16 and 8bit that fit",
        ("auto", "fp32", "bf16", "8bit"),
    )
    offload_optimizer: bool = flag(
        False, "keep master and states in the host's memory, for small cards: the same numbers, slower updates"
    )
    optimizer_in_backward: bool = flag(
        False,
        "update each weight as soon as its gradient is known, and keep no gradients; wants --grad-clip 0, and steps of "
        "one micro-batch: others accumulate as always",
    )
    recompute: str = flag(
        "cheap",
        "what backward computes again instead of keeping: none; cheap, the outputs of norms and activations; block, "
        "all of a layer but its input; auto is none on a GPU where a step then has no more micro-batches, else cheap",
        ("auto", "none", "cheap", "block"),
    )
    eval_data: tuple[str, ...] = flag((), "files of held-out examples")
    eval_fraction: float = flag(0.0, "share of --data held out, chosen by the seed")
    eval_every: str = flag("epoch", f"held-out loss, where there is held-out data: {EVERY}")
    score_answers: int = flag(
        0, "held-out examples that are answered, and compared with the answers they have, where held-out loss is due"
    )
    sample_every: str = flag("off", f"answers to a few prompts, before, during and after: {EVERY}")
    sample_prompts: str = flag("", "file of prompts, one a line; without it three of our own")
    sample_tokens: int = flag(64, "longest sampled answer")
    save_every: str = flag("end", f"training state for resume: {EVERY}; end keeps none, but for a signal")
    keep: int = flag(2, "newest training states to keep", alias="save_total_limit")
    resume: str = flag(
        "auto", "auto: from the newest whole state in --out; never: start over there; or a checkpoint folder"
    )
    max_shard_bytes: int = flag(5_000_000_000, "largest safetensors file of the exported model")
    kernels: str = flag("auto", KERNELS_HELP, KERNELS)
    deterministic: bool = flag(False, "insist on deterministic algorithms")
    profile: bool = flag(False, "trace three steps with torch's profiler: profile.json.gz and a table, profile.txt")
    tracker: str = flag("off", "show the figures of metrics.jsonl there too, where it is installed", TRACKERS)
    dry_run: bool = flag(False, "check everything, print the plan, train nothing")
    skip_bad_rows: bool = flag(False, "drop and count rows that cannot be read, instead of stopping")
    allow_changed: bool = flag(False, "resume although settings or data changed")
    max_skips: int = flag(3, "consecutive steps with a non-finite loss or gradient before giving up")
    spike_threshold: float = flag(
        6.0, "robust standard deviations over the median of the last 64 losses that make a loss a spike, told; 0 is off"
    )
    spike_rollback: bool = flag(
        False,
        "at a spike go back to the newest state on disk and leave out the steps since; wants --save-every N",
    )
    log_every: int = flag(1, "steps a line where the output is not a terminal", alias="logging_steps")
    debug: bool = flag(False, "show tracebacks")

    def __post_init__(self):
        problems = [
            f"{name_to_flag(name)} is {getattr(self, name)}, wanted {least} or more"
            for name, least in [
                ("epochs", 1), ("max_steps", 1), ("global_batch_size", 1), ("micro_batch_tokens", 1),
                ("micro_batch_size", 1), ("max_length", 2), ("lr", 0), ("weight_decay", 0), ("grad_clip", 0),
                ("seed", 0), ("keep", 1), ("max_shard_bytes", 1), ("sample_tokens", 1), ("log_every", 1),
                ("max_skips", 0), ("score_answers", 0), ("replicas", 1), ("rank_timeout", 1), ("spike_threshold", 0),
            ]
            if getattr(self, name) is not None and not getattr(self, name) >= least
        ]  # fmt: skip
        for name, top in [("warmup_ratio", 1), ("eval_fraction", 1), ("beta1", 1), ("beta2", 1)]:
            if not 0 <= getattr(self, name) < top:
                problems.append(f"{name_to_flag(name)} is {getattr(self, name)}, wanted at least 0 and under {top}")
        if not self.adam_eps > 0:
            problems.append(f"--adam-eps is {self.adam_eps}, wanted more than 0")
        for name in ("eval_every", "sample_every", "save_every"):
            value = getattr(self, name)
            if value not in ("off", "end", "epoch") and not (value.isdecimal() and len(value) < 19 and int(value) > 0):
                problems.append(f"{name_to_flag(name)} is {value!r}, wanted {EVERY}")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < self.max_length:
            problems.append(
                f"--micro-batch-tokens {self.micro_batch_tokens} is under --max-length {self.max_length}; "
                "an example must fit one forward"
            )
        problems += self._find_adapter_problems()
        if self.optimizer_in_backward and self.grad_clip:
            problems.append("--optimizer-in-backward drops the gradients that --grad-clip needs; pass --grad-clip 0")
        if self.optimizer_in_backward and self.offload_optimizer:
            problems.append("--optimizer-in-backward and --offload-optimizer exclude each other")
        if self.spike_rollback and (self.save_every in ("off", "end") or not self.spike_threshold):
            problems.append(
                "--spike-rollback wants a --spike-threshold and states to go back to; pass --save-every 100"
            )
        if self.loss_norm == "micro-mean" and self.packing:
            object.__setattr__(self, "packing", False)  # its micro-batches hold the rows in their order
        if self.eval_data and self.eval_fraction:
            problems.append("--eval-data and --eval-fraction exclude each other")
        if self.random_init and self.model not in MODELS:
            problems.append(
                f"--random-init wants --model to be a named shape, got {self.model!r}"
                f"{suggest_nearest(self.model, MODELS)}"
            )
        if self.model in MODELS and self.model != EMBEDDED_MODEL and not self.random_init:
            problems.append(f"--model {self.model} is a shape without weights; give a folder, or add --random-init")
        if not self.out:
            problems.append("--out is empty, wanted a folder")
        problems += self._find_missing()
        if problems:
            raise ValueError("\n".join(problems))

    def _find_missing(self) -> list[str]:
        """Return which flags lack others, and what they may be."""
        wanted = {
            "model": f"a folder (Hugging Face or Meta layout), a .gguf file, or {EMBEDDED_MODEL}, which comes along; "
            "docs/models.md has a table of tested ones",
            "data": "files of rows (docs/data.md), or seed-tasks or orders, which come along",
        }
        found = [f"{name_to_flag(name)} is missing: {what}" for name, what in wanted.items() if not getattr(self, name)]
        if self.score_answers and not (self.eval_data or self.eval_fraction):
            found.append("--score-answers wants held-out rows; pass --eval-data FILE or --eval-fraction 0.05")
        if self.score_answers and self.train_on_prompt:
            found.append("--score-answers and --train-on-prompt exclude each other: the answer has no beginning")
        return found

    def _find_adapter_problems(self) -> list[str]:
        """Return what is wrong with the flags of adapters."""
        given = [name for name in LORA_FLAGS if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.adapter == "none":
            return [f"{name_to_flag(name)} is for --adapter lora or qlora; add one" for name in given]
        problems = find_empty(adapter_dir=self.adapter_dir)
        if self.random_init:
            problems.append("--random-init with --adapter: updates of weights that are not kept are of no use")
        if self.offload_optimizer:
            problems.append("--offload-optimizer with --adapter: the states of an adapter are small; leave it out")
        try:
            adapter_from_settings(vars(self))
        except ValueError as error:
            problems.append(f"--lora flags: {error}")
        return problems


EMBEDDED_DEFAULTS = dict(  # of the demo: a real model and real rows, minutes on two cores
    model=EMBEDDED_MODEL, data=("orders",), eval_data=("orders-held-out",), out="out/demo", epochs=1,
    global_batch_size=8, lr=1e-4, eval_every="end", score_answers=24,
)  # fmt: skip
