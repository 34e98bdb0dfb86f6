"""What a compiled kernel will do on a chip that is not here: registers, spills, matrix instructions, widths of access.

Read from the machine code (SASS), which ptxas wrote and nvdisasm prints; Triton's wheel carries both. What each tl.load
and tl.store became is read from the two codes before it, which name source lines: Triton's (TTGIR), where a tile is yet
a tile, and PTX, whose widths ptxas keeps. (Lines in SASS do not serve: in Triton 3.9 those of inline assembly drift.)
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from triton import knobs

CHIPS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_BLOCK = {"sm_80": 163, "sm_90": 227, "sm_100": 227}  # KB a block may ask for
SHARED_SM = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KB an SM has; 1 KB of it is reserved a block
TENSOR_COLUMNS = 512  # of tensor memory, which sm_100 has, an SM
BULK = ("UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG")  # whole tiles, by the copy engine
MOVES = ("LDG", "LDGSTS", "STG", *BULK)  # between global memory and an SM

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
TILE = re.compile(
    r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local) .*?"
    r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>.*loc\((#loc\d*)\)$",
    re.M,
)


@dataclass
class Facts:
    """Of one compilation."""

    registers: int  # a thread
    stack_bytes: int  # a thread
    shared_bytes: int  # a program
    warps: int  # a program
    tensor_columns: int = 0  # of a Blackwell SM's tensor memory, a program
    spills: int = 0  # LDL and STL instructions
    spills_in_loops: int = 0
    matrix: dict = field(default_factory=dict)  # opcode -> instructions
    matrix_in_loops: dict = field(default_factory=dict)
    wide: int = 0  # instructions that move 128 bits or more a thread from or to global memory, or whole tiles
    narrow: int = 0  # that move less
    streams: list = field(default_factory=list)  # see Stream
    dots: int = 0  # tl.dot
    loaded: list = field(default_factory=list)  # positions of the arguments, without constants, that are loaded from
    stored: list = field(default_factory=list)  # and of those stored to


@dataclass
class Stream:
    """What the tl.loads, or the tl.stores, of one source line became."""

    line: int
    store: bool
    elements: int  # of the largest tile that the line moves
    element_bytes: int
    bits: int  # that the narrowest instruction moves a thread; 0 where none was found

    def __str__(self):
        return f"the {'store' if self.store else 'load'} of {self.elements} elements in line {self.line}"


def read_facts(kernel):
    """Facts of what triton.compile returned."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])  # more than num_warps where warps are specialized
    warps = int(threads[1]) // 32 if threads else kernel.metadata.num_warps
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    facts = Facts(registers, stack, kernel.metadata.shared, warps, columns)
    facts.dots = len(re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b", kernel.asm["ttgir"]))
    facts.loaded, facts.stored = touched(kernel.asm["ttir"])
    facts.streams = streams(kernel.asm["ttgir"], kernel.asm["ptx"])
    _count(instructions(sass), facts)
    return facts


def _run(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def instructions(sass):
    """[(opcode with its suffixes, whether it is in a loop: between a backward branch and its target)]"""
    found, labels, jumps = [], {}, []
    for text in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", text):
            labels[label[1]] = len(found)
        elif code := INSTRUCTION.match(text):
            if jump := re.search(r"`\((\.L_x_\d+)\)", code[2]):
                jumps.append((len(found), jump[1]))
            found.append(code[1])
    # A branch to itself, after the last EXIT, is padding.
    loops = [(labels[to], at) for at, to in jumps if to in labels and labels[to] < at]
    return [(opcode, any(first <= i <= last for first, last in loops)) for i, opcode in enumerate(found)]


def bits(opcode):
    """Width of a global memory access in SASS, a thread; 128 for those of the copy engine."""
    width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", opcode)
    return 128 if opcode.split(".")[0] in BULK else int(width[1]) if width else 32


def _count(code, facts):
    for opcode, looped in code:
        name = opcode.split(".")[0]
        if name in ("LDL", "STL"):
            facts.spills += 1
            facts.spills_in_loops += looped
        elif re.fullmatch(r"[A-Z]*MMA", name):
            facts.matrix[name] = facts.matrix.get(name, 0) + 1
            if looped:
                facts.matrix_in_loops[name] = facts.matrix_in_loops.get(name, 0) + 1
        elif name in MOVES:
            facts.wide += bits(opcode) >= 128
            facts.narrow += bits(opcode) < 128


def streams(ttgir, ptx):
    """A Stream for each source line that loads tiles through pointers, and for each that stores them."""
    narrowest = {}
    for place, store, width in accesses(ptx):
        narrowest[place, store] = min(width, narrowest.get((place, store), width))
    return [
        Stream(place[1], store, *tile, narrowest.get((place, store), 0))
        for (place, store), tile in sorted(tiles(ttgir).items())
    ]


def accesses(ptx):
    """((file, line), whether a store, bits a thread) of every global memory access in PTX."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', ptx, re.M))
    place = first = None  # first: of an inline assembly, whose later lines Triton 3.9 counts on from the true one
    for text in ptx.splitlines():
        if "begin inline asm" in text:
            first = ()
        elif "end inline asm" in text:
            place, first = first or place, None
        elif at := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            place = (Path(files[at[1]]).name, int(at[2]))
            first = first if first or first is None else place
        elif move := re.search(r"\b(ld|st)\.\S*\bglobal\b\S*?(?:\.v(\d))?\.[bufs](\d+)\b", text):
            yield first or place, move[1] == "st", int(move[2] or 1) * int(move[3])
        elif copy := re.search(r"\bcp\.async\.c[ag]\.shared\.global\S* \[.*?\], \[.*?\], (\w+)", text):
            yield first or place, False, 8 * int(copy[1], 0)


def tiles(ttgir):
    """((file, line), whether a store) -> (elements, bytes an element) of the largest tile moved there."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))
    found = {}
    for op, shape, kind, place in TILE.findall(ttgir):
        elements = 1
        for n in shape.rstrip("x").split("x"):
            elements *= int(n)
        key = (_place(places[place], places), op == "tt.store")
        found[key] = max(found.get(key, (0, 0)), (elements, max(1, int(re.search(r"\d+", kind)[0]) // 8)))
    return found


def _place(text, places):
    """(file's name, line) of an MLIR location: of the innermost call, as in PTX. No folders: two checkouts may share
    Triton's cache."""
    while not (at := re.match(r'"([^"]*)":(\d+):\d+', text)):
        text = places[re.search(r"#loc\d*", text)[0]]
    return Path(at[1]).name, int(at[2])


def touched(ttir):
    """Positions, among the arguments of Triton's first code (TTIR), of pointers loaded from, and of those stored to."""
    made_of, scopes, used = {}, [], {"load": set(), "store": set()}  # a value -> the values that it comes from
    for text in ttir.splitlines():
        text = text.split(" loc(")[0]
        result = (re.match(r"\s*(%\w+)(?::\d+)? = ", text) or [None, None])[1]
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
    head = re.search(r"tt\.func public @\w+\((.*?)attributes \{", ttir)[1]
    arguments = re.findall(r"(%\w+): (!tt\.ptr)?", head)
    reached = [_reach(names, made_of) for names in used.values()]
    return [[i for i, (name, pointer) in enumerate(arguments) if pointer and name in names] for names in reached]


def _reach(names, made_of):
    reached, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += made_of.get(name, ()) or made_of.get(f"{name}#0", ())
    return reached


def programs_per_sm(facts, chip):
    """How many programs an SM holds at once: the least of

    32 blocks,  64 warps / warps,  the SM's shared memory / (a program's + 1 KB reserved),  512 columns of tensor memory
    / a program's,  and what registers allow: each of 4 partitions has 16,384 and gives a warp 32 x registers, in 256s.
    Source: CUDA C++ Programming Guide, compute capabilities; NVIDIA's occupancy calculator.
    """
    a_warp = -(-32 * facts.registers // 256) * 256
    by_registers = 4 * (16384 // a_warp) // facts.warps
    by_shared = SHARED_SM[chip] * 1024 // (facts.shared_bytes + 1024)
    by_columns = TENSOR_COLUMNS // max(1, facts.tensor_columns)
    return min(32, 64 // facts.warps, by_registers, by_shared, by_columns)
