"""The tests of the ops, compiled for a chip and executed on the PTX machine; whether all of them passed on this code.

    python -m tests.helpers.on_machine      runs all of them and records that they passed

Compiling and executing are deterministic, so what passed passes again with the same sources, Triton and torch. While
the record fits the code, `make test` runs every SHARE-th of these tests, so that the way there is tried too. After a
change of a kernel, of the machine or of a test it runs all of them, until they are recorded again.
"""

import hashlib
import json
import sys

import triton

from kernels.compiled.known import bare_syntax
from kernels.measure.simulated_known import digest_sources
from tests.helpers.compiler import run_compiler
from tests.helpers.run import ROOT

CHIP, SHARE = "sm_90", 12
RECORD = ROOT / "tests" / "kernels" / "on_machine.json"
OPS = ROOT / "tests" / "kernels" / "ops"
FILES = sorted({path.name for path in OPS.glob("test_*.py")} - {"test_common.py"})


def digest_tests() -> str:
    """Return 16 hex digits that change with the kernels, the machine, these tests and what they are made of."""
    helpers = [ROOT / "tests" / "helpers" / name for name in ("kernels.py", "compiler.py", "run.py")]
    sources = [bare_syntax(path.read_text()) for path in sorted([*OPS.glob("*.py"), *helpers])]
    return hashlib.sha256("\0".join([digest_sources(), *sources]).encode()).hexdigest()[:16]


def is_recorded() -> bool:
    """Return whether all tests passed under this Triton on the code as it is."""
    return RECORD.exists() and json.loads(RECORD.read_text()).get(triton.__version__) == digest_tests()


def run_tests(file: str, share: int):
    """Run every share-th test of a file. Return the finished process; it fails for what the machine finds."""
    words = ("pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/ops/{file}")
    return run_compiler(*words, CRIA_TEST_CHIP=CHIP, CRIA_TEST_SHARE=str(share))


def main() -> int:
    """Run all tests; record that they passed, or show what failed and return 1."""
    for file in FILES:
        done = run_tests(file, 1)
        print(f"{file}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
            return 1
    RECORD.write_text(json.dumps({triton.__version__: digest_tests()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
