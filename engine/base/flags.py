"""A command line made from a dataclass: each field is one --flag, with its type, its choices and its help."""

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from kernels.base.help_text import render_help, split_examples

T = TypeVar("T")

KERNELS = ("auto", "triton", "native", "ref")
ADAPTER_HELP = "folder of an adapter of this model, ours or PEFT's, that is added to its weights"
MODEL_HELP = (
    "folder (Hugging Face or Meta layout), .gguf file, training state (checkpoint-N), or the embedded smollm2-135m"
)
KERNELS_HELP = "auto: triton on CUDA, native (C++) on a CPU where it is built, else the torch references (ref)"

# (raw flags {name: [words]}, problems) -> notes. Its attribute `flags` names the foreign flags that it accepts.
Translate = Callable[[dict[str, list[str]], list[str]], list[str]]


def flag(default: Any, help: str, choices: Sequence[str] | None = None, alias: str | None = None) -> Any:
    """Return a dataclass field that is a flag. alias: the flag's name in Stanford's train.py and in transformers."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "alias": alias})


def find_empty(**folders: str | None) -> list[str]:
    """Return a problem for each flag, by its field, that was given as an empty text, as "$UNSET" is in a shell."""
    return [f"{name_to_flag(name)} is empty, wanted a folder" for name, folder in folders.items() if folder == ""]


def name_to_flag(name: str) -> str:
    """Return the --flag of a field."""
    return "--" + name.replace("_", "-")


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name most like this one, or "" when none is like it.

    Of several that begin with it, all are named.
    """
    bare, name = {other.lstrip("-"): other for other in known}, name.lstrip("-")
    longer = [other for other in bare if other.lower().startswith(name.lower() + "-")]
    if len(longer) > 1:
        return f"; which one, {' or '.join(bare[other] for other in longer)}?"
    close = longer or difflib.get_close_matches(name, bare, n=1, cutoff=0.7)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def parse_flags(
    cls: type[T], argv: Sequence[str], translate: Translate | None = None, embedded: dict[str, Any] | None = None
) -> tuple[T, list[str]]:
    """Return (a cls whose fields are set by the --flags of argv, notes for the user).

    Exit with 2 after printing every problem, and with 0 after --help. A flag is written with dashes or underscores, as
    "--flag value" or "--flag=value"; a bool as --flag, --no-flag or "--flag True". translate turns foreign flags among
    {name: [words]} into ours, adds problems and returns notes. embedded: values of flags for a command line that names
    neither --model nor --data, which then uses the embedded model and data.
    """
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    names = {name: name for name in fields}
    names |= {field.metadata["alias"]: name for name, field in fields.items() if field.metadata["alias"]}
    names |= {name: name for name in getattr(translate, "flags", ())}
    if "-h" in argv or "--help" in argv:
        print(format_help(cls, translate, embedded))
        raise SystemExit(0)
    problems: list[str] = []
    raw = split_flags(argv, names, fields, problems, getattr(cls, "HINTS", {}))
    notes = translate(raw, problems) if translate else []
    values = {name: convert_words(fields[name], words, problems) for name, words in raw.items()}
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
)  # a value that did not convert; the field keeps its default, so that the other fields are still checked
MOST = {int: 1e18, float: 1e38}  # of any flag: whole numbers fit 64 bits, and products of flags stay numbers
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def split_flags(
    argv: Sequence[str], names: dict[str, str], fields: dict[str, Any], problems: list[str], hints: dict[str, str]
) -> dict[str, list[str]]:
    """Return {field: [words]} of a command line. Unknown flags and stray words become problems.

    Of a flag given twice the last counts, which is said on stderr. hints: {unknown flag: the one that does that}.
    """
    raw: dict[str, list[str]] = {}
    name: str | None = None
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
            nearest = suggest_nearest(name_to_flag(head), map(name_to_flag, names))
            meant = f"; {name_to_flag(hints[head])} does that" if head in hints else nearest
            problems.append(f"unknown flag {word.partition('=')[0]}{meant}")
            name = "unknown " + head
        elif name in raw:
            other = "" if name == head else f" (as {name_to_flag(head)})"
            print(f"warning: {name_to_flag(name)} is given twice{other}; the last one counts", file=sys.stderr)
        raw[name] = [value] if equals else []
    return {name: words for name, words in raw.items() if not name.startswith("unknown ")}


def shorten_word(word: str) -> str:
    """Return a word of the command line as a message shows it: a very long one without its end."""
    return repr(word if len(word) <= 80 else f"{word[:80]}...")


def convert_words(field: Any, words: list[str], problems: list[str]) -> Any:
    """Return the value of a field from its words, or INVALID after adding a problem."""
    kind, name = field.type, name_to_flag(field.name)
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
        problems.append(f"{name} is {word!r}, wanted one of {', '.join(choices)}{suggest_nearest(word, choices)}")
        return INVALID
    if isinstance(kind, types.UnionType):  # int | None
        kind = typing.get_args(kind)[0]
    limit = ""
    try:
        if kind is int and not word.lstrip("+-").isdecimal():  # 3.0 and 5e9 are whole numbers too
            value = int(float(word))
            if value != float(word):
                raise ValueError
        else:
            value = kind(word)
        if kind in MOST and not abs(value) <= MOST[kind]:  # also nan, and 1e999, which is inf
            limit = f" of at most {MOST[kind]:g}" if value < float("inf") else ""
            raise ValueError
        return value
    except (ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a finite number"
        problems.append(f"{name} is {shorten_word(word)}, wanted {wanted}{limit}")
        return INVALID


def format_help(cls: Any, translate: Translate | None = None, embedded: dict[str, Any] | None = None) -> str:
    """Return the text of --help: every flag with its default and meaning, in the groups that cls.GROUPS names.

    The examples are those of the docstring of the module that cls is from.
    """
    module = ".".join(Path(sys.argv[0]).with_suffix("").parts[-2:])
    flags = {field.name: describe_flag(field) for field in dataclasses.fields(cls)}
    groups: dict[str, Sequence[str]] = dict(getattr(cls, "GROUPS", {}))
    rest = [name for name in flags if not any(name in names for names in groups.values())]
    groups["other" if groups else "flags"] = rest
    shown = {title: [flags[name] for name in names if name in flags] for title, names in groups.items()}
    sections = [(title, texts) for title, texts in shown.items() if texts]
    sections[-1][1].append(("--help", "this text"))
    description = inspect.cleandoc(cls.__doc__)
    if embedded:
        words = (f"{name_to_flag(k)} {' '.join(v) if isinstance(v, tuple) else v}" for k, v in embedded.items())
        description += "\n\nWith neither --model nor --data, these stand in: " + " ".join(words)
    notes = inspect.cleandoc(str(translate.__doc__)) if translate else ""
    examples = split_examples(sys.modules[cls.__module__].__doc__)[1]
    return render_help(module, "", description, sections, examples, notes)


def describe_flag(field: Any) -> tuple[str, str]:
    """Return (a flag as its line of --help begins, what it does with its default)."""
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif default in (None, ""):
        default = "auto" if "auto" in field.metadata["help"] else "none"
    name = name_to_flag(field.name) + (f" / {name_to_flag('no_' + field.name)}" if field.default is True else "")
    choices = field.metadata["choices"]
    also = f"; also {name_to_flag(field.metadata['alias'])}" if field.metadata["alias"] else ""
    values = f" {{{','.join(choices)}}}" if choices else ""
    return f"{name}{values}", f"{field.metadata['help']} (default: {default}{also})"
