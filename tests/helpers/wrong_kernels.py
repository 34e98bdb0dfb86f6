"""Runs kernels.simulate on compiled kernels with a fault in them: python -m tests.helpers.wrong_kernels FAULT ARGS."""

import re
import sys

from kernels import simulate
from kernels.measure import simulated_records

FAULTS = {
    "wrong result": lambda ptx: re.sub(r"rsqrt\.approx", "sqrt.approx", ptx),
    "no barrier": lambda ptx: re.sub(r"\n\s*bar\.sync[^;]*;", "", ptx),
}


def main() -> None:
    """Run kernels.simulate, of the first case of RMSNorm, with the fault that the first argument names."""
    edit, on_machine, cases = FAULTS[sys.argv[1]], simulated_records.on_machine, simulate.simulated_cases()
    simulated_records.on_machine = lambda chip, **mode: on_machine(chip, edit=edit, **mode)
    simulate.simulated_cases = lambda: [case for case in cases if case.case.op == "rms_norm"][:1]
    simulate.main(sys.argv[2:])


if __name__ == "__main__":
    main()
