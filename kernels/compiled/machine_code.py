"""The facts of a compiled kernel: registers, spills, matrix instructions, widths of accesses. No GPU is needed.

ptxas writes the machine code (SASS) and nvdisasm prints it; Triton's wheel carries both. The accesses of each tl.load
and tl.store are read from two earlier stages, which name source lines: TTGIR (Triton's own code), which still has
tiles, and PTX, whose access widths ptxas keeps. The source lines of SASS itself are wrong for inline assembly in
Triton 3.9.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import knobs

from kernels.compiled.async_order import find_unordered

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_BLOCK = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # KB a block may ask for
SHARED_SM = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KB an SM has; 1 KB of it is reserved a block
TENSOR_COLUMNS = 512  # of tensor memory on an SM of sm_100
BULK = ("UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG")  # whole tiles, by the copy engine
ALU = {  # integers, logic, comparisons, selections: an SM takes one of them for two that it can issue
    "BMSK", "FLO", "FMNMX", "FSEL", "FSET", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R",
    "PLOP3", "POPC", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VABSDIFF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
}  # fmt: skip
MOVES = ("LDG", "LDGSTS", "STG", *BULK)  # between global memory and an SM

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
TILE = re.compile(
    r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local) .*?"
    r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>.*loc\((#loc\d*)\)$",
    re.M,
)

SourceLine = tuple[str, int]  # a file's name and a line number


@dataclass
class Stream:
    """The memory accesses of the tl.loads, or the tl.stores, of one source line."""

    line: int
    store: bool
    elements: int  # of the largest tile that the line moves
    element_bytes: int
    bits: int  # per thread, of the line's narrowest instruction; 0 if none was found

    def __str__(self) -> str:
        """Return a phrase for a message."""
        return f"the {'store' if self.store else 'load'} of {self.elements} elements in line {self.line}"


@dataclass
class Facts:
    """The facts of one compilation."""

    registers: int  # a thread
    stack_bytes: int  # a thread
    shared_bytes: int  # a program
    warps: int  # a program
    tensor_columns: int = 0  # of tensor memory (sm_100), a program
    instructions: int = 0  # of the whole kernel, each counted once, loops too
    alu: int = 0  # of these, those of the pipe for integers, logic, comparisons and selections
    spills: int = 0  # LDL and STL instructions
    spills_in_loops: int = 0
    matrix: dict[str, int] = field(default_factory=dict)  # opcode -> instructions
    matrix_in_loops: dict[str, int] = field(default_factory=dict)
    wide: int = 0  # instructions that move 128 bits or more a thread from or to global memory, or whole tiles
    narrow: int = 0  # instructions that move less
    streams: list[Stream] = field(default_factory=list)
    dots: int = 0  # tl.dot
    loaded: list[int] = field(default_factory=list)  # positions (without constants) of the arguments it loads from
    stored: list[int] = field(default_factory=list)  # positions of the arguments it stores to
    unordered: list[str] = field(default_factory=list)  # what matrix instructions read without a fence after its write


def read_facts(kernel: Any) -> Facts:
    """Return the facts of a compiled kernel, an object that triton.compile returned."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump shows no registers, wanted a line with REG: and STACK:\n{usage}")
    registers, stack = map(int, found.groups())
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])  # more than num_warps where warps are specialized
    warps = int(threads[1]) // 32 if threads else kernel.metadata.num_warps
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    facts = Facts(registers, stack, kernel.metadata.shared, warps, columns)
    facts.dots = len(re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b", kernel.asm["ttgir"]))
    facts.loaded, facts.stored = find_touched_arguments(kernel.asm["ttir"])
    facts.streams = find_streams(kernel.asm["ttgir"], kernel.asm["ptx"])
    facts.unordered = find_unordered(kernel.asm["ptx"])
    _count(parse_instructions(sass), facts)
    return facts


def _run(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


# ---- SASS -----------------------------------------------------------------------------------------------------------


def parse_instructions(sass: str) -> list[tuple[str, bool]]:
    """Return [(opcode with its suffixes, is in a loop)]. A loop lies between a backward branch and its target."""
    found: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for text in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            labels[label[1]] = len(found)
        elif code := INSTRUCTION.match(text):
            if jump := re.search(r"`\((\.L_x_\d+)\)", code[2]):
                jumps.append((len(found), jump[1]))
            found.append(code[1])
    # A branch to itself, after the last EXIT, is padding.
    loops = [(labels[to], place) for place, to in jumps if to in labels and labels[to] < place]
    return [(opcode, any(first <= i <= last for first, last in loops)) for i, opcode in enumerate(found)]


def access_bits(opcode: str) -> int:
    """Return the bits a thread moves in one global memory access of SASS; 128 for the copy engine's."""
    width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
    if opcode.split(".")[0] in BULK:
        return 128
    return int(width[1]) if width else 32


def _count(code: Iterable[tuple[str, bool]], facts: Facts) -> None:
    for opcode, is_in_loop in code:
        name = opcode.split(".")[0]
        facts.instructions += name != "NOP"
        facts.alu += name in ALU
        if name in ("LDL", "STL"):
            facts.spills += 1
            facts.spills_in_loops += is_in_loop
        elif re.fullmatch(r"[A-Z]*MMA", name):
            facts.matrix[name] = facts.matrix.get(name, 0) + 1
            if is_in_loop:
                facts.matrix_in_loops[name] = facts.matrix_in_loops.get(name, 0) + 1
        elif name in MOVES:
            facts.wide += access_bits(opcode) >= 128
            facts.narrow += access_bits(opcode) < 128


# ---- PTX and Triton's own codes -------------------------------------------------------------------------------------


def find_streams(ttgir: str, ptx: str) -> list[Stream]:
    """Return a stream for each source line that loads tiles through pointers, and for each that stores them."""
    narrowest: dict[tuple[SourceLine, bool], int] = {}
    for place, store, width in find_accesses(ptx):
        narrowest[place, store] = min(width, narrowest.get((place, store), width))
    return [
        Stream(place[1], store, *tile, narrowest.get((place, store), 0))
        for (place, store), tile in sorted(find_tiles(ttgir).items())
    ]


def find_accesses(ptx: str) -> Iterator[tuple[SourceLine, bool, int]]:
    """Yield ((file, line), is a store, bits a thread) of every global memory access in PTX."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', ptx, re.M))
    # first: of an inline assembly, whose later lines Triton 3.9 counts on from the true one
    place: Any = None
    first: Any = None
    for text in ptx.splitlines():
        if "begin inline asm" in text:
            first = ()
        elif "end inline asm" in text:
            place, first = first or place, None
        elif loc := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            place = (Path(files[loc[1]]).name, int(loc[2]))
            first = first if first or first is None else place
        elif move := re.search(r"\b(ld|st)\.\S*\bglobal\b\S*?(?:\.v(\d))?\.[bufs](\d+)\b", text):
            yield first or place, move[1] == "st", int(move[2] or 1) * int(move[3])
        elif copy := re.search(r"\bcp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", text):
            yield first or place, False, 8 * int(copy[1], 0)


def find_tiles(ttgir: str) -> dict[tuple[SourceLine, bool], tuple[int, int]]:
    """Return ((file, line), is a store) -> (elements, bytes an element) of the largest tile that the line moves."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))
    found: dict[tuple[SourceLine, bool], tuple[int, int]] = {}
    for op, shape, kind, place in TILE.findall(ttgir):
        elements = 1
        for n in shape.rstrip("x").split("x"):
            elements *= int(n)
        key = (_source_line(places[place], places), op == "tt.store")
        bits = re.search(r"\d+", kind)
        found[key] = max(found.get(key, (0, 0)), (elements, max(1, int(bits[0]) // 8 if bits else 0)))
    return found


def _source_line(text, places):
    """Return (file's name, line) of an MLIR location: of the innermost call, as in PTX.

    Folders are left out, because two checkouts may share Triton's cache.
    """
    while not (found := re.match(r'"([^"]*)":(\d+):\d+', text)):
        inner = re.search(r"#loc\d*", text)
        if not inner:
            raise ValueError(f"a location of TTGIR names no line: {text}")
        text = places[inner[0]]
    return Path(found[1]).name, int(found[2])


def find_touched_arguments(ttir: str) -> tuple[list[int], list[int]]:
    """Return the positions of the kernel's pointers that are loaded from, and of those stored to.

    ttir is Triton's first intermediate code; positions count its arguments. Each pointer that is used is traced back
    through the values that it was computed from, through loops and branches, to the arguments.
    """
    made_of: dict[str, list[str]] = {}  # a value -> the values that it comes from
    scopes: list[str | None] = []  # the results of the loops and branches around the line
    used: dict[str, set[str]] = {"load": set(), "store": set()}
    for text in ttir.splitlines():
        text = text.split(" loc(")[0]
        named = re.match(r"\s*(%\w+)(?::\d+)? = ", text)
        result = named[1] if named else None
        if text.lstrip().startswith("}") and "else" not in text and scopes:
            scopes.pop()
        elif found := re.search(r"scf\.yield ([^:]*)", text):
            for i, name in enumerate(found[1].split(",")):
                made_of.setdefault(f"{scopes[-1]}#{i}", []).append(name.strip())
        elif found := re.search(r"tt\.(?:descriptor_)?(load|store) (%[\w#]+)", text):
            used[found[1]].add(found[2])
        elif result and "!tt.ptr" in text:
            made_of.setdefault(result, []).extend(re.findall(r"%[\w#]+", text.split(" = ", 1)[1]))
        for inner, outer in re.findall(r"(%\w+) = (%[\w#]+)", text) if "iter_args" in text else ():
            made_of.setdefault(inner, []).append(outer)
        if re.search(r"\{$", text.rstrip()):
            scopes.append(result)
    head = re.search(r"tt\.func public @\w+\((.*?)attributes \{", ttir)
    arguments = re.findall(r"(%\w+): (!tt\.ptr)?", head[1]) if head else []
    loaded, stored = (
        [i for i, (name, pointer) in enumerate(arguments) if pointer and name in reached]
        for reached in (_follow_back(names, made_of) for names in used.values())
    )
    return loaded, stored


def _follow_back(names, made_of):
    """Return the names and every name that they are made of, directly or not."""
    reached: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += made_of.get(name, ()) or made_of.get(f"{name}#0", ())
    return reached


# ---- occupancy ------------------------------------------------------------------------------------------------------


def programs_per_sm(facts: Facts, chip: str) -> int:
    """Return how many programs an SM holds at once, the least of five limits:

    32 blocks,  64 warps / warps,  the SM's shared memory / (a program's + 1 KB reserved),  512 columns of tensor memory
    / a program's,  and what registers allow: each of 4 partitions has 16,384 and gives a warp 32 x registers, in 256s.
    Source: CUDA C++ Programming Guide, compute capabilities; NVIDIA's occupancy calculator.
    """
    registers_a_warp = -(-32 * facts.registers // 256) * 256
    by_registers = 4 * (16384 // registers_a_warp) // facts.warps
    by_shared = SHARED_SM[chip] * 1024 // (facts.shared_bytes + 1024)
    by_columns = TENSOR_COLUMNS // max(1, facts.tensor_columns)
    return min(32, 64 // facts.warps, by_registers, by_shared, by_columns)
