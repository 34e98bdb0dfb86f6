"""The machine code of csrc/cuda, read from the built library and judged. No GPU is needed.

Rules for each kernel on each chip, as kernels/compiled/rules.py has them for Triton's:
  stack     no stack frame, no LDL or STL: nothing spills
  wide      it has accesses of global memory of 128 bits
  matrix    attention in 16 bits runs matrix instructions in a loop: HMMA, or HGMMA where it is written for sm_90
  bulk      attention that is written for sm_90 copies whole tiles both ways (UTMALDG, UTMASTG), and its warps give each
            other registers (USETMAXREG)
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from triton import knobs

from kernels.compiled.machine_code import CHIPS, MOVES, Facts, access_bits, parse_instructions, programs_per_sm
from kernels.native import toolchain
from kernels.native.cuda import load_cuda
from kernels.native.library import NativeError, path_of

THREADS = {  # a block, by the start of a kernel's name
    "adamw": 512, "grad_norm_kernel": 256, "decode": 128, "hopper_attention D = 64": 512,
    "hopper_attention D = 128": 384,
}  # fmt: skip
MATRIX = {"decode bf16": "HMMA", "decode fp16": "HMMA", "hopper_attention": "HGMMA"}  # by the start of a kernel's name
HOPPER = ("UTMALDG", "UTMASTG", "USETMAXREG")


@dataclass
class CudaFacts(Facts):
    """The facts of one kernel of csrc/cuda."""

    hopper: dict[str, int] = field(default_factory=dict)  # opcode of sm_90 -> instructions


class CudaKernel(NamedTuple):
    """One kernel on one chip."""

    source: str  # of csrc/cuda
    name: str
    chip: str
    facts: CudaFacts


def name_kernel(symbol: str) -> tuple[str, str]:
    """Return (source, name with its template arguments) of a kernel's symbol: adamw.cu, "adamw split 8bit"."""
    if found := re.search(r"adamwILi(\d)ELi(\d)E", symbol):
        masters, states = ("fp32 parameter", "fp32", "split", "stochastic"), ("fp32", "bf16", "8bit")
        return "adamw.cu", f"adamw {masters[int(found[1])]}, states {states[int(found[2])]}"
    if found := re.search(r"(decode|hopper_attention)I(\w+?)Li(\d+)E", symbol):
        dtype = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}[found[2]]
        if found[1] == "hopper_attention":
            return "hopper_attention.cu", f"hopper_attention D = {found[3]}, {dtype}"
        return "decode_attention.cu", f"decode {dtype}, D = {found[3]}"
    return "grad_norm.cu", symbol.removeprefix("cria_")


def read_kernels(library: Path, chips: Collection[str] = tuple(CHIPS)) -> Iterator[CudaKernel]:
    """Yield the kernels of a library for the chips, in the order of their names."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-xelf", "all", str(library)], cwd=folder, check=True, capture_output=True
        )
        for path in Path(folder).glob("*.cubin"):
            chip = path.name.split(".")[-2].removesuffix("a")
            found += (
                [CudaKernel(*name_kernel(s), chip, facts) for s, facts in _read_cubin(path)] if chip in chips else []
            )
    yield from sorted(found, key=lambda kernel: (kernel.source, kernel.name, list(CHIPS).index(kernel.chip)))


def _read_cubin(path: Path) -> Iterator[tuple[str, CudaFacts]]:
    def run(*command):
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout

    usage = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path)
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if not resources:  # host functions alone
        return
    sass = run(knobs.nvidia.nvdisasm.path, "-c", "-ndf", path)
    code = dict(re.findall(r"\.section\s+\.text\.(\S+?),(.*?)(?=\.section\s|\Z)", sass, re.S))
    for symbol, registers, stack, shared in resources:
        name = name_kernel(symbol)[1]
        threads = next(n for start, n in THREADS.items() if name.startswith(start))
        facts = CudaFacts(int(registers), int(stack), int(shared), threads // 32)
        _count(code[symbol], facts)
        yield symbol, facts


def _count(sass: str, facts: CudaFacts) -> None:
    for opcode, is_in_loop in parse_instructions(sass):
        name = opcode.split(".")[0]
        facts.instructions += name != "NOP"
        facts.spills += name in ("LDL", "STL")
        if name in HOPPER:
            facts.hopper[name] = facts.hopper.get(name, 0) + 1
        if name.endswith("MMA"):
            facts.matrix[name] = facts.matrix.get(name, 0) + 1
            facts.matrix_in_loops[name] = facts.matrix_in_loops.get(name, 0) + is_in_loop
        elif name in MOVES:
            facts.wide += access_bits(opcode) >= 128
            facts.narrow += access_bits(opcode) < 128


def judge(kernel: CudaKernel) -> list[str]:
    """Return the rules that a kernel breaks, a line each."""
    facts, broken = kernel.facts, []
    if facts.stack_bytes or facts.spills:
        broken.append(f"stack: {facts.stack_bytes} bytes, {facts.spills} LDL/STL; wanted none")
    if not facts.wide:
        broken.append("wide: no access of 128 bits; wanted some")
    for start, opcode in MATRIX.items():
        if kernel.name.startswith(start) and not facts.matrix_in_loops.get(opcode):
            broken.append(f"matrix: no {opcode} in a loop; wanted some")
    if kernel.name.startswith("hopper") and (missing := [name for name in HOPPER if name not in facts.hopper]):
        broken.append(f"bulk: no {', '.join(missing)}; wanted some")
    return [f"csrc/cuda/{kernel.source} {kernel.name} {kernel.chip}: {line}" for line in broken]


def make_record(kernel: CudaKernel) -> dict:
    """Return a kernel's record, as the file has it."""
    facts = kernel.facts
    return {
        "source": kernel.source,
        "kernel": kernel.name,
        "chip": kernel.chip,
        "instructions": facts.instructions,
        "registers": facts.registers,
        "stack_bytes": facts.stack_bytes,
        "spills": facts.spills,
        "blocks_per_sm": programs_per_sm(facts, kernel.chip),  # without dynamic shared memory
        "matrix": facts.matrix,
        "hopper": facts.hopper,
        "wide": facts.wide,
        "narrow": facts.narrow,
    }


def format_cuda_record(record: dict) -> str:
    """Return a record as one line for the terminal."""
    return (
        f"{record['chip']:6} csrc/cuda/{record['source']} {record['kernel']}: {record['instructions']} instructions, "
        f"{record['registers']} registers, {record['spills']} spills, {record['blocks_per_sm']} blocks an SM, "
        f"{'+'.join(record['matrix']) or 'no matrix'}, {record['wide']} accesses wide of "
        f"{record['wide'] + record['narrow']}"
    )


def judge_library(chips: Collection[str]) -> tuple[list[dict], list[str], str]:
    """Return the records and the broken rules of the built library, and what built it or why there is none."""
    try:
        load_cuda()
        compiler = toolchain.describe(toolchain.find_nvcc())
    except (NativeError, toolchain.MissingCompiler) as error:
        return [], [], f"not judged: {error}"
    kernels = list(read_kernels(path_of("cuda"), chips))
    return [make_record(k) for k in kernels], [line for k in kernels for line in judge(k)], compiler


def save_cuda_records(path: Path, records: list[dict], compiler: str) -> None:
    """Write the records, one a line."""
    lines = ",\n".join(json.dumps(r) for r in records)
    path.write_text(f'{{"compiler": {json.dumps(compiler)},\n"records": [\n{lines}\n]}}\n')


def find_cuda_differences(path: Path, records: list[dict], compiler: str, chips: Collection[str]) -> list[str]:
    """Return how the records of the chips differ from the file's, if the same compiler made both."""
    old: dict = json.loads(path.read_text()) if path.exists() else {"compiler": compiler, "records": []}
    if old["compiler"] != compiler:
        return []
    before = {json.dumps(r) for r in old["records"] if r["chip"] in chips}
    now = {json.dumps(r) for r in records}
    return [f"- {line}" for line in sorted(before - now)] + [f"+ {line}" for line in sorted(now - before)]
