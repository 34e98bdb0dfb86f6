"""Faults planted into the PTX of this project's kernels, and what the PTX machine finds of them, a line for each.

python -m tests.helpers.planted_faults       not under TRITON_INTERPRET=1; tests/kernels/compiled/test_planted_faults.py
"""

import json
import re
import warnings
from functools import partial

import torch

import kernels
from kernels.compiled.simulation import on_machine
from tests.helpers.descriptor_kernels import run_product


def remove(pattern, ptx, which=None):
    """Return PTX without the statements that match: all of them, or only one by its number."""
    found = list(re.finditer(rf"(?m)^\s*(@!?%p\d+\s+)?{pattern}[^;]*;", ptx))
    for match in reversed(found if which is None else found[which : which + 1]):
        ptx = ptx[: match.start()] + ptx[match.end() :]
    return ptx


def change(pattern, into, ptx, count=1):
    """Return PTX with the first matches of a pattern changed."""
    return re.sub(pattern, into, ptx, count=count)


def run_attention(chip, edit=None, late=False):
    """Return the output of attention over two documents with a shared prefix, and the launches' results."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(200, h, 64).bfloat16() for h in (2, 1, 1))
    table = torch.tensor([[0, 40, 0, 0], [40, 200, 0, 40]], dtype=torch.int32)
    with on_machine(chip, edit, late=late) as results:
        out = kernels.attention(q, k, v, table, "triton")
    return out, results


def run_norm(chip, edit=None, late=False):
    """Return the gradient of rms_norm's input, and the results of its two launches."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 1000).bfloat16().requires_grad_(), torch.randn(1000).bfloat16()
    with on_machine(chip, edit, late=late) as results:
        kernels.rms_norm(x, weight, impl="triton").backward(torch.ones(9, 1000).bfloat16())
    return x.grad, results


# Up to the offset of the address.
LOAD, STORE = r"(ld\.global[.\w:]* [^;\[]*\[\s*%rd\d+)[\s+\d]*\]", r"(st\.global[.\w:]* \[\s*%rd\d+)[\s+\d]*\]"
WIDE_STORE, SHARED_STORE = STORE.replace("global", r"global\.v4"), r"(st\.shared[.\w:]*\s+\[\s*%r\d+)[\s+\d]*\]"
FAULTS = {  # name: how to run it, what is changed
    "no wait for cp.async": (partial(run_attention, "sm_80"), partial(remove, r"cp\.async\.wait_group")),
    "no wait for wgmma": (partial(run_attention, "sm_90"), partial(remove, r"wgmma\.wait_group")),
    "no proxy fence": (partial(run_attention, "sm_90"), partial(remove, r"fence\.proxy\.async")),
    "no barrier": (partial(run_attention, "sm_80"), partial(remove, r"bar\.sync")),
    "no wait for a tile": (
        run_product,
        # Without the loop around try_wait: whatever it answers, go on.
        partial(change, r"(mbarrier\.try_wait[^;]*;)\s*@!%?\w+ bra[.\w]* \w+;", r"\1", count=0),
    ),
    "a register written after the fence": (
        partial(run_attention, "sm_90"),
        lambda ptx: change(
            r"(?s)(wgmma\.fence[^;]*;)(.*?wgmma\.mma_async[^{]*\{(%r\d+))", r"\1 mov.b32 \3, 0;\2", ptx
        ),
    ),
    "a load beyond the end": (partial(run_norm, "sm_80"), partial(change, LOAD, r"\1+18000]", count=0)),
    "a store beyond the end": (partial(run_norm, "sm_80"), partial(change, STORE, r"\1+18000]", count=0)),
    "a store off by two bytes": (partial(run_norm, "sm_80"), partial(change, WIDE_STORE, r"\1+2]", count=0)),
    "no mask": (partial(run_norm, "sm_90"), partial(change, r"@!?%p\d+ (ld|st)\.global", r"\1.global", count=0)),
    "shared memory over the block's": (partial(run_norm, "sm_90"), partial(change, SHARED_STORE, r"\1+232448]")),
}  # fmt: skip


def plant(name):
    """Run a fault early and late, beside the kernel as it is, and return what was found."""
    run, edit = FAULTS[name]
    right, results = run()
    assert any(edit(result.ptx) != result.ptx for result in results), f"{name}: no kernel has what is to be changed"
    early, found_early = run(edit=edit)
    late, found_late = run(edit=edit, late=True)
    found = [finding for result in (*found_early, *found_late) for finding in result.findings]
    return {
        "fault": name,
        "unedited": [str(finding) for result in results for finding in result.findings],
        "kinds": sorted({finding.kind for finding in found}),
        "findings": [str(finding) for finding in found][:5],
        "early is right": torch.equal(early, right),
        "late is right": torch.equal(late, right),
    }


def count_barriers(run):
    """Return how many barriers of a run's kernels, removed one by one, are found; how many change what comes out and
    are not found; and how many there are."""
    right, results = run()
    total = found = missed = 0
    for kernel in {result.ptx for result in results}:
        for which in range(len(re.findall(r"(?m)^\s*(?:@!?%p\d+\s+)?bar\.sync", kernel))):
            out, edited = run(edit=lambda ptx, k=kernel, w=which: remove(r"bar\.sync", ptx, w) if ptx == k else ptx)
            is_found = any(result.findings for result in edited)
            found, total, missed = found + is_found, total + 1, missed + (not is_found and not out.equal(right))
    return {"found": found, "of": total, "missed": missed}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    for fault in FAULTS:
        print(json.dumps(plant(fault)), flush=True)
    for op, run_op in (("attention", run_attention), ("rms_norm", run_norm)):
        for chip_ in ("sm_80", "sm_90"):
            print(json.dumps({"barriers of": f"{op} {chip_}"} | count_barriers(partial(run_op, chip_))), flush=True)
