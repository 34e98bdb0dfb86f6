"""The command line made from a dataclass's fields: one --flag a field, typed, checked and explained by it."""

import dataclasses
import os
import sys
import types
import typing
from pathlib import Path

from engine.model.config import flag, nearest


def from_cli(cls, argv, translate=None, embedded=None):
    """A cls from --flags, one a field. Exits with 2 and every problem at once, with 0 after --help.

    Dashes and underscores are the same; "--flag value" and "--flag=value" too. A bool is --flag, --no-flag or
    "--flag True". translate(raw, problems): turns foreign flags among {name: [values]} into ours and returns notes.
    embedded: the defaults of a command line that names neither --model nor --data. Returns the config and the notes.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = {name: name for name in fields}
    names |= {field.metadata["alias"]: name for name, field in fields.items() if field.metadata["alias"]}
    names |= {name: name for name in getattr(translate, "flags", ())}
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, translate, embedded))
        raise SystemExit(0)
    problems = []
    raw = split_flags(argv, names, fields, problems)
    notes = translate(raw, problems) if translate else []
    values = {name: convert(fields[name], words, problems) for name, words in raw.items()}
    if embedded and not {"model", "data"} & set(values):
        values = embedded | values
    try:
        config = cls(**{name: value for name, value in values.items() if value is not INVALID})
    except ValueError as error:
        problems += str(error).split("\n")
    if problems:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2)
    return config, notes


INVALID = (
    object()
)  # a value that did not convert: its problem is told, and the field's default stands in for the checks
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def split_flags(argv, names, fields, problems):
    """{name: [words]} of a command line; unknown flags and stray words become problems."""
    raw, name = {}, None
    for word in argv:
        if not word.startswith("--"):
            if name is None:
                problems.append(f"{word!r} is no flag; flags begin with --")
            else:
                raw[name].append(word)
            continue
        head, equals, value = word[2:].partition("=")
        head = head.replace("-", "_")
        name = names.get(head)
        negated = fields.get(head.removeprefix("no_")) if name is None and not equals else None
        if negated is not None and negated.type is bool:
            raw[negated.name] = ["no"]
            continue
        if name is None:
            problems.append(f"unknown flag {word.partition('=')[0]}{nearest(flag(head), [flag(n) for n in names])}")
            name = "unknown " + head
        elif name in raw:
            problems.append(f"{flag(name)} is given twice{'' if name == head else f' (as {flag(head)})'}")
        raw[name] = [value] if equals else []
    return {name: words for name, words in raw.items() if not name.startswith("unknown ")}


def convert(field, words, problems):
    """The value of a field from its words, or INVALID with a problem told."""
    kind, name = field.type, flag(field.name)
    if typing.get_origin(kind) is tuple:
        if not words:
            problems.append(f"{name} wants one value or more")
        return tuple(words) if words else INVALID
    if kind is bool and not words:
        return True
    if len(words) != 1:
        problems.append(f"{name} wants one value, got {len(words)}{': ' + ' '.join(words) if words else ''}")
        return INVALID
    word, choices = words[0], field.metadata["choices"]
    if kind is bool:
        if word.lower() not in YES + NO:
            problems.append(f"{name} is {word!r}, wanted true or false")
            return INVALID
        return word.lower() in YES
    if choices and word not in choices:
        problems.append(f"{name} is {word!r}, wanted one of {', '.join(choices)}{nearest(word, choices)}")
        return INVALID
    if isinstance(kind, types.UnionType):  # int | None
        kind = typing.get_args(kind)[0]
    try:
        if kind is int and not word.lstrip("+-").isdecimal():  # 3.0 and 5e9 are whole numbers too
            value = int(float(word))
            if value != float(word):
                raise ValueError
            return value
        return kind(word)
    except (ValueError, OverflowError):
        problems.append(f"{name} is {word!r}, wanted {'a whole number' if kind is int else 'a number'}")
        return INVALID


def help_text(cls, translate=None, embedded=None):
    module = ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])
    lines = [f"usage: python -m {module} [--flag value ...]", "", cls.__doc__.strip(), ""]
    for field in dataclasses.fields(cls):
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        choices = field.metadata["choices"]
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif default in (None, ""):
            default = "auto" if "auto" in field.metadata["help"] else "none"
        name = flag(field.name) + (f" / {flag('no_' + field.name)}" if field.default is True else "")
        values = f" {{{','.join(choices)}}}" if choices else ""
        also = f"; also {flag(field.metadata['alias'])}" if field.metadata["alias"] else ""
        lines.append(f"  {name}{values}\n        {field.metadata['help']} (default: {default}{also})")
    lines.append("  --help\n        this text")
    if embedded:
        flags = (f"{flag(k)} {' '.join(v) if isinstance(v, tuple) else v}" for k, v in embedded.items())
        lines += ["", "With neither --model nor --data, these stand in: " + " ".join(flags)]
    if translate:
        lines += ["", translate.__doc__.strip()]
    return "\n".join(lines)


# ---- Stanford's command ---------------------------------------------------------------------------------------------

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
