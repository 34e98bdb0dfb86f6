"""The flags of Stanford Alpaca's train.py, translated into those of engine.finetune."""

import os

from engine.base.flags import NO, YES, flag

UNNEEDED = {
    "fsdp": "--replicas says how ranks hold the model",
    "fsdp_transformer_layer_cls_to_wrap": "every layer is a group of its own",
    "per_device_eval_batch_size": "evaluation fills its forwards by tokens",
    "tf32": "bf16 matrices run on the tensor cores already",
}


def stanford(raw, problems):
    """Stanford Alpaca's own training command works unchanged. Its flags that have no twin here are translated:
    --bf16, --per_device_train_batch_size, --gradient_accumulation_steps, --evaluation_strategy, --eval_steps,
    --save_strategy, --save_steps. Accepted and not needed: --fsdp, --fsdp_transformer_layer_cls_to_wrap, --tf32,
    --per_device_eval_batch_size."""
    notes = [f"{flag(name)} is accepted and not needed: {why}" for name, why in UNNEEDED.items() if raw.pop(name, None)]

    def take(name):
        words = raw.pop(name, None)
        if words is not None and len(words) != 1:
            problems.append(f"{flag(name)} wants one value, got {len(words)}")
            return None
        return words and words[0]

    def number(name):
        word = take(name)
        if word is not None and not (word.isdecimal() and int(word) > 0):
            problems.append(f"{flag(name)} is {word!r}, wanted a whole number from 1")
            return None
        return word and int(word)

    bf16 = take("bf16")
    if bf16 is not None and bf16.lower() in YES:
        if raw.setdefault("dtype", ["bf16"]) != ["bf16"]:
            problems.append(f"--bf16 {bf16} contradicts --dtype {' '.join(raw['dtype'])}")
    elif bf16 is not None and bf16.lower() in NO:
        raw.setdefault("dtype", ["fp32"])
    elif bf16 is not None:
        problems.append(f"--bf16 is {bf16!r}, wanted True or False")

    micro, accumulation = number("per_device_train_batch_size"), number("gradient_accumulation_steps")
    if micro or accumulation:  # absent, transformers takes 8 and 1
        ranks = os.environ.get("WORLD_SIZE", "")  # torchrun's; one that is no number is told of when ranks start
        ranks, micro, accumulation = int(ranks) if ranks.isdecimal() else 1, micro or 8, accumulation or 1
        ours = {"micro_batch_size": micro, "global_batch_size": ranks * micro * accumulation}
        for name, value in ours.items():
            if name in raw:
                problems.append(
                    f"{flag(name)} and --per-device-train-batch-size with --gradient-accumulation-steps "
                    "say the same thing; give one"
                )
            raw.setdefault(name, [str(value)])
        notes.append(
            f"--global-batch-size {ours['global_batch_size']}: {micro} examples x {accumulation} accumulated"
            + f" x {ranks} ranks" * (ranks > 1)
        )
    old, new = take("evaluation_strategy"), take("eval_strategy")
    for ours, strategy, steps in (
        ("eval_every", old or new, number("eval_steps")),
        ("save_every", take("save_strategy"), number("save_steps")),
    ):
        if strategy is None and steps is None:
            continue
        values = {
            "no": "off" if ours == "eval_every" else "end",
            "epoch": "epoch",
            "steps": str(steps or 500),
            None: str(steps),
        }
        if ours in raw:
            problems.append(f"{flag(ours)} and {flag(ours.replace('every', 'strategy'))} say the same thing; give one")
        elif strategy not in values:
            problems.append(f"{flag(ours.replace('every', 'strategy'))} is {strategy!r}, wanted no, steps or epoch")
        else:
            raw[ours] = [values[strategy]]
    return notes


stanford.flags = (
    *UNNEEDED, "bf16", "per_device_train_batch_size", "gradient_accumulation_steps", "evaluation_strategy",
    "eval_strategy", "eval_steps", "save_strategy", "save_steps",
)  # fmt: skip
