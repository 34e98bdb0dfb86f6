"""Attention on the PTX machine as sm_90 runs it, as it ships and with its fences removed. Prints what is found in JSON.

python -m tests.helpers.attention_orders       not under TRITON_INTERPRET=1; test_async_order.py runs it
"""

import json
import re
from unittest.mock import patch

import torch

from kernels.compiled.async_order import find_unordered
from kernels.compiled.launch_cases import Make, attention_cases
from kernels.compiled.launches import call_case
from kernels.compiled.simulation import on_machine
from kernels.ops import attention

CASE = next(case for case in attention_cases() if case.label == "backward H=9 K=3 Dh=64")


def run_attention(edit=None, late=False):
    """Return [dq, dk, dv] of bf16, and the names of the kernels with findings of each sort."""
    torch.manual_seed(0)
    with on_machine("sm_90", edit, late=late, reverse=late) as results:
        call = CASE.build(Make("cpu", tokens=130))  # runs the forward
        call_case(call)
    found = {"proxy": [], "other": [], "text": [r.kernel for r in results if find_unordered(r.ptx)]}
    for result in results:
        kinds = {finding.kind for finding in result.findings}
        found["proxy"] += [result.kernel] * ("proxy" in kinds)
        found["other"] += [result.kernel] * bool(kinds - {"proxy"})
    return call[7:10], found


def remove_fences(ptx):
    """Return PTX without its proxy fences."""
    return re.sub(r"fence\.proxy\.async\S*;", "", ptx)


def main():
    """Run each variant and print {variant: {sort of finding: kernels}}."""
    shipped, found = run_attention()
    late, found_late = run_attention(late=True)
    _, found_without = run_attention(remove_fences)
    with patch.object(attention, "adds_orders", lambda op, device: False):
        plain, found_plain = run_attention()
    seen = {
        "shipped": found,
        "shipped, late": found_late,
        "without fences": found_without,
        "without orders": found_plain,
    }
    equal = {"late": late, "without orders": plain}  # the orders change no value
    seen["equal"] = {k: all(a.equal(b) for a, b in zip(shipped, v, strict=True)) for k, v in equal.items()}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
