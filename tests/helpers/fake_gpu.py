"""Packed training steps whose kernels go through Triton's own binder, while compiling and launching are noted only.

    python -m tests.helpers.fake_gpu WIDTH STEPS SHARING STATES

WIDTH: "small", or a model's name for two layers of its width. SHARING: 1 to share prefixes, else 0. STATES: AdamW's.
Prints a JSON object: "compiled", for each step the kernels that a GPU would have compiled in it; "missing", the kernels
among them that the static gate does not compile. It does not run under TRITON_INTERPRET=1, which has neither binder nor
compiler.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import sys

import numpy as np
import torch
import triton.compiler
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.cache import get_cache_key

from engine.model.config import MODELS
from engine.model.llama import Transformer
from kernels.compiled.launch_cases import all_cases
from kernels.compiled.launches import record_launches
from kernels.ops import common
from scripts.base.rows import random_alpaca_rows
from scripts.step import bench
from scripts.step.rows import ROWS, alpaca_lengths

CHIP = "sm_90"
SMALL = dataclasses.replace(
    MODELS["llama-7b"], dim=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=512
)
FRESH_BYTES = 1 << 26  # glibc maps every allocation over 32 MB anew, and the system clears what it maps
OPS = ("adamw", "adamw_many", "attention", "grad_norm", "linear_cross_entropy", "rms_norm", "rope", "swiglu")


class FakeDriver:
    """Triton's driver of a GPU that is not there."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    is_active = staticmethod(lambda: True)


class FakeKernel:
    """A compiled kernel whose launch does nothing."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        return None


class SkipProducts(TorchDispatchMode):
    """Returns zeros for matrix products: no test here looks at numbers, and they are nearly all of a step on a CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Return the call's result, without computing it if it is a product."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in ("mm", "addmm", "addmm_"):
            return func(*args, **kwargs)
        if name == "addmm_" or "out" in kwargs:
            return kwargs.get("out", args[0])
        a, b = args[-2:]
        return a.new_zeros(len(a), b.shape[1])


def skip_products(launch):
    """Return a launch function that computes no products: inside an operator, the mode around it is off."""

    @functools.wraps(launch)
    def run(*args, **kwargs):
        with SkipProducts():
            return launch(*args, **kwargs)

    return run


def zeroed(allocate):
    """Return an allocating function whose tensors are zero, without writing large ones: their memory is fresh."""

    @functools.wraps(allocate)
    def run(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor if tensor.nbytes >= FRESH_BYTES else tensor.zero_()

    return run


def cache_key(source: ASTSource, target: GPUTarget, options: dict) -> str:
    """Return the name of the folder in Triton's cache that triton.compile reads or makes."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options, **source.parse_options()))
    return hashlib.sha256(
        get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars()).encode()
    ).hexdigest()


def gate_keys() -> set[str]:
    """Return the keys of everything that the static gate compiles for the chip."""
    launches = [launch for case in all_cases() for launch in record_launches(case, CHIP)]
    sources = [(ASTSource(x.function, x.signature, x.constants, x.attributes), vars(x.options)) for x in launches]
    return {cache_key(source, FakeDriver.get_current_target(), options) for source, options in sources}


def install(compiled: list[tuple[str, str]]) -> None:
    """Let kernels run on CPU tensors as on a GPU, appending (kernel, cache key) for each compilation."""

    def compile_nothing(source, target, options):
        module = source.fn.fn.__module__.rpartition(".")[2]
        compiled.append((f"{module}.{source.name}", cache_key(source, target, options)))
        return FakeKernel()

    triton.compiler.compile = compile_nothing  # which a kernel's binder looks up at the first launch
    driver.set_active(FakeDriver())
    common.chip_override, common.INTERPRETED = CHIP, True  # so that impl="triton" is accepted on CPU tensors
    for name in OPS:
        for op in vars(importlib.import_module(f"kernels.ops.{name}")).values():
            if isinstance(op, torch.library.CustomOpDef):
                op.register_kernel("cpu")(skip_products(op.launch))
    # What no kernel writes must be a number: a loss that is not finite calls the update off.
    torch.empty_like = torch.zeros_like = zeroed(torch.empty_like)
    torch.Tensor.new_empty = torch.Tensor.new_zeros = zeroed(torch.Tensor.new_empty)


def take_steps(width: str, n_steps: int, sharing: bool, states: str) -> dict[str, list]:
    """Return the kernels that each step compiled, those that the gate does not compile, and micro-batches a step."""
    config = SMALL if width == "small" else dataclasses.replace(MODELS[width], n_layers=2)
    known = set() if width == "small" else gate_keys()
    alpaca, generator = alpaca_lengths(), np.random.default_rng(0)
    stems = [generator.integers(3, config.vocab_size, n) for n in alpaca.shared_prefix]
    rows = random_alpaca_rows(np.arange(n_steps * ROWS), config.vocab_size, 512, generator, stems)
    bench.GPU, bench.DTYPE = True, torch.bfloat16
    bench.model_shape, bench.alpaca_rows = lambda *_: config, lambda *_: rows
    Transformer.init_weights = lambda *_: None
    compiled: list[tuple[str, str]] = []
    install(compiled)
    by_step = []
    variant = bench.Variant(sharing=sharing, impl="triton", states=states)
    steps = bench.Steps(variant, variant.tokens, n_steps, False)
    with SkipProducts():
        for step in range(1, n_steps + 1):
            first = len(compiled)
            steps.run(step)
            by_step.append([name for name, _ in compiled[first:]])
        steps.read_figures()
    steps.close()
    assert np.isfinite(steps.losses + steps.norms).all() and len(steps.losses) == n_steps
    missing = [name for name, key in compiled if key not in known]
    return {"compiled": by_step, "missing": missing, "micro_batches": steps.n_batches}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(take_steps(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4])))
