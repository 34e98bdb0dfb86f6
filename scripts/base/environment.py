"""Environments of other people's packages, made for one measurement in a temporary folder."""

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path


def make_environment(folder: Path, packages: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """Install packages into a new environment; return its folder of commands, and the versions by package.

    Needs a network, or an index of packages. Raises subprocess.CalledProcessError where one cannot be installed.
    """
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *packages], check=True)
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    return folder / "bin", {package["name"]: package["version"] for package in json.loads(listed)}
