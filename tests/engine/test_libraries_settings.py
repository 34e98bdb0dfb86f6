"""What importing engine asks of the libraries below it: by environment variables, which the user's own go before."""

import os
import runpy
import subprocess
import sys

import pytest

import engine

SET = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "GOMP_SPINCOUNT": "10000"}
OWN = {  # a variable of the user's -> what is then not set
    "PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF",
    "GOMP_SPINCOUNT": "GOMP_SPINCOUNT", "OMP_WAIT_POLICY": "GOMP_SPINCOUNT",
}  # fmt: skip


def settings_after_import(monkeypatch, own):
    environment = dict(own)
    monkeypatch.setattr(os, "environ", environment)
    runpy.run_path(engine.__file__)
    return environment


def test_the_allocator_and_openmp_are_set(monkeypatch):
    assert settings_after_import(monkeypatch, {}) == SET


@pytest.mark.parametrize(("own", "not_set"), OWN.items())
def test_what_the_user_has_set_is_kept(own, not_set, monkeypatch):
    rest = {name: value for name, value in SET.items() if name != not_set}
    assert settings_after_import(monkeypatch, {own: "mine"}) == rest | {own: "mine"}


def test_a_command_sets_them_before_torch_is_there():
    """A library reads its variables when it is loaded, and a command imports torch with its first line."""
    code = "import sys, engine; sys.exit(sum(name in sys.modules for name in ('torch', 'numpy', 'kernels')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
