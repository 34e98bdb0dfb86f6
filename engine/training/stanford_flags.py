"""The flags of Stanford Alpaca's train.py and of transformers' trainer, translated into those of engine.finetune."""

import os

from engine.base.flags import NO, YES, name_to_flag
from engine.base.terminal import plural

UNNEEDED = {
    "fsdp": "--replicas says how ranks hold the model",
    "fsdp_transformer_layer_cls_to_wrap": "every layer is a group of its own",
    "per_device_eval_batch_size": "evaluation fills its forwards by tokens",
    "tf32": "bf16 matrices run on the tensor cores already",
    "run_name": "--out names the run",
    "logging_dir": "metrics.jsonl and report.html lie in --out",
    "do_train": "this command does nothing else",
    "dataloader_num_workers": "a thread packs the next step",
}
TORCHS_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf")
ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
DEFAULT_MICRO_BATCH, DEFAULT_ACCUMULATION, DEFAULT_STEPS = 8, 1, 500  # what transformers takes for an absent flag

Raw = dict[str, list[str]]  # {flag: its words}, as the command line has them


def translate_stanford_flags(raw: Raw, problems: list[str]) -> list[str]:
    """Let Stanford Alpaca's own training command work unchanged. Its flags that have no twin here are translated:
    --bf16, --per_device_train_batch_size, --gradient_accumulation_steps, --evaluation_strategy, --eval_steps,
    --save_strategy, --save_steps. So are transformers' --gradient_checkpointing, --optim (AdamW's names), --report_to,
    --warmup_steps 0 and --lr_scheduler_kwargs {}. Accepted and not needed: --fsdp, --tf32, --run_name, --logging_dir,
    --fsdp_transformer_layer_cls_to_wrap, --per_device_eval_batch_size, --do_train, --dataloader_num_workers."""
    notes = [
        f"{name_to_flag(name)} is accepted and not needed: {why}"
        for name, why in UNNEEDED.items()
        if raw.pop(name, None) is not None
    ]
    translate_bf16(raw, problems)
    notes += translate_batch_size(raw, problems)
    older, newer = pop_word(raw, "evaluation_strategy", problems), pop_word(raw, "eval_strategy", problems)
    if older and newer and older != newer:
        problems.append(f"--evaluation-strategy {older} contradicts --eval-strategy {newer}; give one")
    translate_strategy(raw, "eval_every", older or newer, "off", problems)
    translate_strategy(raw, "save_every", pop_word(raw, "save_strategy", problems), "end", problems)
    translate_checkpointing(raw, problems)
    notes += translate_trainer_words(raw, problems)
    return notes


translate_stanford_flags.flags = (  # type: ignore[attr-defined]
    *UNNEEDED, "bf16", "per_device_train_batch_size", "gradient_accumulation_steps", "evaluation_strategy",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps", "gradient_checkpointing", "optim", "report_to",
    "warmup_steps", "lr_scheduler_kwargs",
)  # fmt: skip


MAX_DIGITS = 18  # of a whole number; Python refuses those of more than 4,300


def pop_word(raw: Raw, name: str, problems: list[str]) -> str | None:
    """Take a flag of one word out of raw. Return the word, or None where the flag is absent or has not one word."""
    words = raw.pop(name, None)
    if words is not None and len(words) != 1:
        problems.append(f"{name_to_flag(name)} wants one value, got {len(words)}")
        return None
    return words[0] if words else None


def pop_number(raw: Raw, name: str, problems: list[str]) -> int | None:
    """Take a flag whose word is a whole number from 1 out of raw. Return it, or None if it is absent or wrong."""
    word = pop_word(raw, name, problems)
    if word is None:
        return None
    if not (word.isdecimal() and len(word) <= MAX_DIGITS and int(word) > 0):
        problems.append(f"{name_to_flag(name)} is {word[:80]!r}, wanted a whole number from 1")
        return None
    return int(word)


def translate_bf16(raw: Raw, problems: list[str]) -> None:
    """Turn --bf16 True into --dtype bf16, and --bf16 False into fp32 where --dtype does not say more."""
    bf16 = pop_word(raw, "bf16", problems)
    if bf16 is None:
        return
    if bf16.lower() in YES:
        if raw.setdefault("dtype", ["bf16"]) != ["bf16"]:
            problems.append(f"--bf16 {bf16} contradicts --dtype {' '.join(raw['dtype'])}")
    elif bf16.lower() in NO:
        raw.setdefault("dtype", ["fp32"])
    else:
        problems.append(f"--bf16 is {bf16!r}, wanted True or False")


def translate_checkpointing(raw: Raw, problems: list[str]) -> None:
    """Turn --gradient_checkpointing True into --recompute block, and False into nothing."""
    words = raw.pop("gradient_checkpointing", None)
    if words is None:
        return
    word = words[0] if len(words) == 1 else "true" if not words else ""
    if word.lower() in YES:
        set_ours(raw, "recompute", "block", "--gradient-checkpointing", problems)
    elif word.lower() not in NO:
        problems.append(f"--gradient-checkpointing is {' '.join(words)!r}, wanted True or False")


def set_ours(raw: Raw, name: str, value: str, theirs: str, problems: list[str]) -> None:
    """Set a flag of ours that a foreign one stands for. A flag of ours that says another thing becomes a problem."""
    if raw.setdefault(name, [value]) != [value]:
        problems.append(f"{theirs} contradicts {name_to_flag(name)} {' '.join(raw[name])}; give one")


def translate_trainer_words(raw: Raw, problems: list[str]) -> list[str]:
    """Translate --optim, --report_to, --warmup_steps and --lr_scheduler_kwargs, or say what does that here."""
    notes: list[str] = []
    optim = pop_word(raw, "optim", problems)
    if optim in ADAMW_8BIT:
        set_ours(raw, "optimizer_states", "8bit", f"--optim {optim}", problems)
    elif optim in TORCHS_ADAMW:
        notes.append(f"--optim {optim} is accepted and not needed: AdamW is the optimizer")
    elif optim is not None:
        problems.append(f"--optim is {optim[:80]!r}, wanted one of {', '.join((*TORCHS_ADAMW, *ADAMW_8BIT))}")
    report = pop_word(raw, "report_to", problems)
    if report is not None and report not in ("none", "off"):
        set_ours(raw, "tracker", report, f"--report-to {report}", problems)
    warmup = pop_word(raw, "warmup_steps", problems)
    if warmup == "0":
        set_ours(raw, "warmup_ratio", "0", "--warmup-steps 0", problems)
    elif warmup is not None:
        problems.append(f"--warmup-steps {warmup[:80]}: pass --warmup-ratio, the share of all steps")
    settings = pop_word(raw, "lr_scheduler_kwargs", problems)
    if settings is not None and settings.replace(" ", "") not in ("{}", ""):
        problems.append(f"--lr-scheduler-kwargs {settings[:80]}: the schedules here have no settings; leave it out")
    return notes


def translate_batch_size(raw: Raw, problems: list[str]) -> list[str]:
    """Turn a batch size per device and a number of accumulated batches into the global batch size. Return a note."""
    micro = pop_number(raw, "per_device_train_batch_size", problems)
    accumulation = pop_number(raw, "gradient_accumulation_steps", problems)
    if not micro and not accumulation:
        return []
    micro, accumulation = micro or DEFAULT_MICRO_BATCH, accumulation or DEFAULT_ACCUMULATION
    world_size = os.environ.get("WORLD_SIZE", "")  # torchrun's; one that is no number is refused when ranks start
    ranks = int(world_size) if world_size.isdecimal() else 1
    ours = {"micro_batch_size": micro, "global_batch_size": ranks * micro * accumulation}
    for name, value in ours.items():
        if name in raw:
            problems.append(
                f"{name_to_flag(name)} and --per-device-train-batch-size with --gradient-accumulation-steps "
                "say the same thing; give one"
            )
        raw.setdefault(name, [str(value)])
    times_ranks = f" x {plural(ranks, 'rank')}" if ranks > 1 else ""
    return [
        f"--global-batch-size {ours['global_batch_size']}: {micro} examples x {accumulation} accumulated{times_ranks}"
    ]


def translate_strategy(raw: Raw, ours: str, strategy: str | None, never: str, problems: list[str]) -> None:
    """Turn a strategy and its steps into --eval-every or --save-every.

    ours: the flag's name here. strategy: "no", "steps", "epoch" or None. never: what "no" is here.
    """
    steps = pop_number(raw, ours.replace("every", "steps"), problems)
    if strategy is None and steps is None:
        return
    theirs = name_to_flag(ours.replace("every", "strategy"))
    values = {"no": never, "epoch": "epoch", "steps": str(steps or DEFAULT_STEPS), None: str(steps)}
    if ours in raw:
        problems.append(f"{name_to_flag(ours)} and {theirs} say the same thing; give one")
    elif strategy not in values:
        problems.append(f"{theirs} is {strategy!r}, wanted no, steps or epoch")
    else:
        raw[ours] = [values[strategy]]
