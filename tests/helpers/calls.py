"""Stand-ins that note what they are called with, a line a call, in the order of the calls."""

import contextlib
import re
import tempfile
from pathlib import Path

import numpy as np
import torch

FOLDER = re.escape(tempfile.gettempdir()) + r"/\w+"  # one of tempfile, whose name is another each time


def show(value):
    """Return a text of an argument that is the same on every machine."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(show, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(key)}: {show(inner)}" for key, inner in value.items()) + "}"
    if hasattr(value, "label"):
        return value.label
    text = repr(value)
    if isinstance(value, str | Path) or (len(text) < 300 and " at 0x" not in text):
        return text
    return type(value).__name__ + (f" of {len(value)}" if hasattr(value, "__len__") else "")


class Calls:
    """The calls of all stand-ins that were made of it."""

    def __init__(self):
        self.lines = []

    def stand_in(self, name, result=None):
        """Return a function that notes its calls, and returns `result`, or what that returns of the same arguments."""

        def call(*args, **named):
            given = [*map(show, args), *(f"{key}={show(value)}" for key, value in named.items())]
            self.lines.append(f"{name}({', '.join(given)})")
            return result(*args, **named) if callable(result) else result

        return call

    def thing(self, label, **results):
        """Return an object that is shown as its label, and whose methods are stand-ins."""
        return Thing(label, {name: self.stand_in(f"{label}.{name}", result) for name, result in results.items()})

    def folder(self, **_):
        """Return a context of a folder that is called the same everywhere, in place of a temporary one."""
        return contextlib.nullcontext("TEMPORARY")

    @staticmethod
    def folder_of(path):
        """Return a context of a folder that stays."""
        return contextlib.nullcontext(str(path))

    def text(self):
        return "\n".join(self.lines)


class Thing:
    """An object of Calls.thing."""

    def __init__(self, label, methods):
        self.label = label
        self.__dict__.update(methods)
