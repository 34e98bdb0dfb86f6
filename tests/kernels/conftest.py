"""Tests that run compiled kernels on the PTX machine are skipped where nothing can compile the machine."""

import shutil

import pytest

from kernels.native.library import path_of

ON_THE_MACHINE = (
    "test_async_order", "test_on_machine", "test_planted_faults", "test_ptx", "test_ptx_arithmetic",
    "test_ptx_async", "test_ptx_atomics", "test_ptx_bulk", "test_ptx_control", "test_ptx_cuda", "test_ptx_exchange",
    "test_ptx_floats", "test_ptx_instructions", "test_ptx_matrix", "test_ptx_memory", "test_ptx_reading",
    "test_simulate", "test_simulation",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    if path_of("ptx_machine").exists() or shutil.which("g++"):
        return
    for item in items:
        if item.module.__name__.rpartition(".")[2] in ON_THE_MACHINE:
            item.add_marker(pytest.mark.skip(reason="the PTX machine is compiled by g++, which is missing"))
