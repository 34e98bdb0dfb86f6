"""The command line made from a dataclass's fields: one --flag a field, typed, checked and explained by it."""

import dataclasses
import difflib
import sys
import types
import typing
from pathlib import Path

KERNELS = ("auto", "triton", "ref")
KERNELS_HELP = "auto: triton on CUDA, the torch references elsewhere; or insist on one of them"


def knob(default, help, choices=None, alias=None):
    """A field that is a flag. alias: the name that Stanford's train.py (and transformers) gives it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


def flag(name):
    return "--" + name.replace("_", "-")


def nearest(name, known):
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


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
