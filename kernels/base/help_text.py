"""The text of --help, laid out alike in every command: at most 100 columns, flags in groups, examples at the end.

data_gen/base/help_text.py is a copy of this file, because data_gen imports nothing of kernels; a test holds them equal.
"""

import argparse
import re
import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100  # columns
EXAMPLE = re.compile(r"\s*(\w+=\S+ )?(python -m|torchrun) ")

Section = tuple[str, list[tuple[str, str]]]  # (title, [(flag with its choices, what it does)])


def render_help(
    name: str, positionals: str, description: str, sections: Iterable[Section], examples: str, notes: str = ""
) -> str:
    """Return the text of --help of `python -m name`. sections: those without a flag are left out."""
    lines = wrap_line(f"usage: python -m {name} {positionals}[--flag value ...]", "", "    ")
    lines += ["", wrap_paragraphs(description)]
    for title, flags in sections:
        if flags:
            lines += ["", f"{title}:"]
        for flag, text in flags:
            lines += [*wrap_line(flag, "  ", "      "), *wrap_line(text, "      ", "      ")]
    lines += ["", wrap_paragraphs(notes)] if notes else []
    if examples:
        lines += ["", "examples:", *map(wrap_example, examples.split("\n"))]
    return "\n".join(lines)


def wrap_line(text: str, first: str, later: str) -> list[str]:
    """Return the lines of one paragraph, wrapped between words, each with its indentation."""
    text = " ".join(text.split())
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False, break_long_words=False
    )


def wrap_paragraphs(text: str) -> str:
    """Return a text of paragraphs, wrapped between words. Indented lines stay as they are."""
    return "\n\n".join(
        part if part.startswith(" ") else "\n".join(wrap_line(part, "", "")) for part in text.strip("\n").split("\n\n")
    )


def wrap_example(command: str) -> str:
    """Return an example's lines, which a shell reads as one command."""
    if len(command) + 2 <= WIDTH:
        return f"  {command}"
    lines = textwrap.wrap(command, WIDTH - 6, break_on_hyphens=False, break_long_words=False)
    return "  " + " \\\n      ".join(lines)


def split_examples(doc: str | None) -> tuple[str, str]:
    """Return (description, examples) of a docstring. Paragraphs of lines that call `python -m` are the examples."""
    parts = textwrap.dedent("\n" + (doc or "").strip("\n")).strip("\n").split("\n\n")
    examples = [textwrap.dedent(part) for part in parts if EXAMPLE.match(part)]
    return "\n\n".join(part for part in parts if not EXAMPLE.match(part)), "\n".join(examples)


class HelpParser(argparse.ArgumentParser):
    """An argument parser of `python -m NAME` whose --help is laid out as render_help() does it.

    doc: the command's docstring, with its examples. Flags are shown with their defaults.
    """

    def __init__(self, name: str, doc: str | None):
        description, self.examples = split_examples(doc)
        super().__init__(
            prog=f"python -m {name}",
            description=description,
            allow_abbrev=False,
            usage=f"python -m {name} [--flag value ...]",
        )
        self.module = name

    def format_help(self) -> str:
        """Return the text of --help."""
        positionals: list[str] = []
        sections: list[Section] = []
        for group in self._action_groups:
            flags = []
            for action in group._group_actions:
                if action.option_strings:
                    flags.append((name_option(action), describe_option(action)))
                else:
                    name = str(action.metavar or action.dest)
                    positionals.append(f"{name} ..." if action.nargs == "+" else name)
                    flags.append((name, describe_option(action)))
            title = {"positional arguments": "files", "options": "flags"}.get(str(group.title), str(group.title))
            sections.append((title, flags))
        before = "".join(f"{name} " for name in positionals)
        return render_help(self.module, before, str(self.description), sections, self.examples) + "\n"


def name_option(action: argparse.Action) -> str:
    """Return a flag as its line of --help begins: its names, then its choices or what its value is."""
    names = ", ".join(name for name in action.option_strings if name.startswith("--"))
    value = action.metavar
    if value is None and action.choices:
        value = f"{{{','.join(map(str, action.choices))}}}"
    return f"{names} {value}" if value and action.nargs != 0 else names


def describe_option(action: argparse.Action) -> str:
    """Return what a flag does, with its default."""
    text = "this text" if action.dest == "help" else str(action.help or "")
    if action.default is argparse.SUPPRESS or action.required or not action.option_strings:
        return text
    default = action.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif default is None or default in ("", [], {}):
        default = "none"
    elif isinstance(default, Sequence) and not isinstance(default, str):
        default = (
            "all"
            if default == action.choices or list(default) == list(action.choices or ())
            else " ".join(map(str, default))
        )
    return f"{text.replace('%%', '%')} (default: {default})".strip()
