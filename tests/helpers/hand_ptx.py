"""Small kernels written by hand in PTX, for tests of the PTX machine."""

import re

import torch

from kernels.compiled.ptx import Module

REGISTERS = ".reg .b64 %a<9>, %d<20>; .reg .b32 %r<99>; .reg .b32 %t; .reg .b16 %h<9>; .reg .pred %p<9>;"


def make_kernel(body, params=2, shared=0, target="sm_80", maps=0):
    """Return a module with one kernel k of `params` pointers, in %a0 and up, its thread in %t, and `shared` bytes.

    maps: tensor maps, parameters m0 and up after the pointers.

    Registers: %a (64 bits) for pointers, %d (64), %r (32), %h (16) and %p (predicates) for the body.
    """
    names = [f".param .u64 p{i}" for i in range(params)] + [f".param .align 64 .b8 m{i}[128]" for i in range(maps)]
    loads = "".join(f"ld.param.b64 %a{i}, [p{i}]; cvta.to.global.u64 %a{i}, %a{i};\n" for i in range(params))
    memory = f".shared .align 1024 .b8 memory[{shared}];" if shared else ""
    return Module(
        f".version 8.7\n.target {target}\n.address_size 64\n{memory}\n"
        f".visible .entry k({', '.join(names)}) {{ {REGISTERS}\n"
        f"{loads}mov.u32 %t, %tid.x;\n{body}\nret; }}"
    )


def run_elementwise(instruction, *inputs, out):
    """Run an instruction of "... D, A, B, C;" on each element of 1-d tensors, one lane each, and return out."""
    width = {t: {2: ("b16", "%h"), 4: ("b32", "%r"), 8: ("b64", "%d")}[t.element_size()] for t in (*inputs, out)}
    body = ""
    for i, t in enumerate(inputs):
        kind, reg = width[t]
        body += f"mad.wide.u32 %d8, %t, {t.element_size()}, %a{i}; ld.global.{kind} {reg}{i}, [%d8];\n"
    kind, reg = width[out]
    names = {"D": f"{reg}7", **{"ABC"[i]: f"{width[t][1]}{i}" for i, t in enumerate(inputs)}}
    body += re.sub(r"\b[ABCD]\b", lambda m: names[m[0]], instruction)
    body += f"\nmad.wide.u32 %d8, %t, {out.element_size()}, %a{len(inputs)}; st.global.{kind} [%d8], {reg}7;\n"
    module = make_kernel(body, params=len(inputs) + 1, target="sm_90a")
    for first in range(0, len(out), 1024):
        tensors = [t[first : first + 1024] for t in (*inputs, out)]
        assert not module.launch("k", 1, tensors, block=(len(tensors[0]),)).findings
    return out


def find_kinds(*results):
    """Return the kinds of all findings."""
    return {finding.kind for result in results for finding in result.findings}


def make_floats(n=4096, seed=0):
    """Return fp32 of all magnitudes, with ties of rounding to bf16, both zeros and both infinities."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * torch.exp2(torch.randint(-30, 20, (n,), generator=g).float())
    x[: n // 4] = (x[: n // 4].view(torch.int32) & -0x8000 | 0x8000).view(torch.float32)
    x[-4:] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    return x
