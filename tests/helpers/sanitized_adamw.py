"""Calls cria_adamw of the library named by the first argument over a fuzz of sizes, modes and addresses.

Imports no torch: tests/helpers/native.py runs this file under sanitizers. Every array is a block of memory of its own,
so that an access before or past it is seen; most begin at odd multiples of their element's size.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np

path = Path(__file__).parents[2] / "kernels" / "native" / "arguments.py"
spec = importlib.util.spec_from_file_location("arguments", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

OK, BAD_SIZE, BAD_ALIGNMENT, BAD_MODE = range(4)
STATE_BYTES, DRAW = (4, 2, 1), np.random.default_rng(0)
# Of either sign: entries, and nine pieces of a straight line to the codes.
MAPS = np.concatenate([np.linspace(-1, 1, 256), np.linspace(0, 0.9, 9), np.full(9, 100), np.full(9, 60)] * 2)
MAPS = MAPS.astype(np.float32)


class Memory:
    """Bytes of random content; begins at a multiple of `unit`, and of nothing more if odd."""

    def __init__(self, n: int, unit: int, odd: bool):
        self.skip = unit if odd else 0
        self.bytes = DRAW.integers(0, 256, self.skip + n * unit, dtype=np.uint8)
        self.address = self.bytes.ctypes.data + self.skip


def make(n, grad_type, states, master_type, odd):
    """Return arguments of n random elements, and the memory that they point to."""
    units = {"param": 4 if master_type == 0 else 2, "grad": (4, 2)[grad_type]}
    units |= {"m": STATE_BYTES[states], "v": STATE_BYTES[states]}
    memory = {name: Memory(n, unit, odd) for name, unit in units.items()}
    if states == 2:
        memory |= {name: Memory(-(-n // 256), 4, odd) for name in ("m_absmax", "v_absmax")}
        memory["maps"] = Memory(2 * 283, 4, odd)
        memory["maps"].bytes[memory["maps"].skip :] = MAPS.view(np.uint8)
    if master_type == 1:
        memory["master"] = Memory(n, 4, odd)
    if master_type == 2:
        memory["low"] = Memory(n, 2, odd)
    numbers = dict(scale=0.5, rest1=0.1, beta2=0.999, rest2=0.001, eps=1e-8, decay=0.999, rate=1e-3, step=3, seed=5)
    modes = dict(grad_type=grad_type, states=states, master_type=master_type, threads=int(DRAW.integers(1, 5)))
    offset = int(DRAW.integers(0, 2**40))
    given = {name: part.address for name, part in memory.items()} | numbers | modes | {"n": n, "offset": offset}
    return module.AdamWArguments(**given), memory


def main():
    library = ctypes.CDLL(sys.argv[1])
    calls = 0

    def expect(code, arguments):
        found = library.cria_adamw(ctypes.byref(arguments))
        assert found == code, f"returned {found}, wanted {code}"

    sizes = [0, 1, 2, 255, 256, 257, 4095, 4097, *DRAW.integers(0, 3000, 4).tolist()]
    for grad_type in (0, 1):
        for states in (0, 1, 2):
            for master_type in (0, 1, 2, 3):
                for n in sizes:
                    arguments, _memory = make(n, grad_type, states, master_type, bool(n % 2))
                    expect(OK, arguments)
                    calls += 1
    arguments, _memory = make(40_000, 1, 2, 2, True)  # several threads
    expect(OK, arguments)
    for name, value, code in (
        ("n", -1, BAD_SIZE), ("offset", -8, BAD_SIZE), ("threads", 0, BAD_SIZE), ("grad_type", 2, BAD_MODE),
        ("states", 3, BAD_MODE), ("master_type", -1, BAD_MODE), ("param", None, BAD_MODE), ("low", None, BAD_MODE),
    ):  # fmt: skip
        arguments, _memory = make(300, 1, 0, 2, False)
        setattr(arguments, name, value)
        expect(code, arguments)
    for name in ("param", "grad", "m", "v", "low"):
        arguments, memory = make(300, 1, 0, 2, False)
        setattr(arguments, name, memory[name].address + 1)
        expect(BAD_ALIGNMENT, arguments)
    print(f"{calls} calls", flush=True)
    if sys.argv[2:] == ["overrun"]:
        arguments, _memory = make(299, 1, 0, 2, False)
        arguments.n = 300
        expect(OK, arguments)


main()
