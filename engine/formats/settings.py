"""The settings in a file of another program, read with a check of their type, and errors that list every fault."""

from typing import Any

from engine.model.config import ModelConfig

REQUIRED = object()  # the default of a key that must be there
MAX_PROBLEMS = 1000  # lines of one error


class Settings:
    """The settings in another program's file, read with a check of their type.

    Every fault is added to problems, with the name of the file. So one error can list them all.
    """

    def __init__(self, raw: dict[str, Any], file: str, problems: list[str]):
        self.raw, self.file, self.problems = raw, file, problems

    def add_problem(self, text: str) -> None:
        """Add a fault of these settings to the problems."""
        self.problems.append(f"{self.file}: {text}")

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Return the value of a key: a positive int or float, a bool or a dict.

        When it is missing and has no default, or is not of this kind, add a problem and return None.
        """
        value = self.raw.get(key)
        if value is None:
            if default is REQUIRED:
                self.add_problem(f"{key} is missing")
                return None
            return default
        number = type(value) in (int, float) and 0 < value < 2**63  # so neither NaN nor infinite
        if kind is float and number:
            return float(value)
        if kind is int and number and value == int(value):
            return int(value)
        if kind in (bool, dict) and type(value) is kind:
            return value
        wanted = {int: "a positive whole number", float: "a positive number", bool: "true or false", dict: "an object"}
        self.add_problem(f"{key} is {str(value)[:80]!r}, wanted {wanted[kind]}")
        return None

    def refuse(self, key: str, *harmless: Any, why: str = "") -> None:
        """Add a problem unless the key is absent, None or one of the harmless values."""
        value = self.raw.get(key)
        if value is not None and value not in harmless:
            self.add_problem(f"{key} is {str(value)[:80]}, which is not supported{why}")

    def make_config(self, n_problems_before: int, **fields: Any) -> ModelConfig | None:
        """Return the ModelConfig of these fields, or None when problems were found since n_problems_before."""
        if len(self.problems) > n_problems_before:
            return None
        try:
            return ModelConfig(**fields)
        except ValueError as error:
            self.add_problem(str(error))
            return None


def join_problems(problems: list[str]) -> str:
    """Return the text of an error that names every problem, each on a line of its own when there are several."""
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n  ".join([f"{len(problems)} problems", *problems[:MAX_PROBLEMS], *more])
