"""The two orders that a matrix instruction needs, checked in the text of PTX.

wgmma (sm_90) and tcgen05.mma (sm_100) read shared memory by the async proxy, a path of their own: between a write of
that memory (a store, or the wait for cp.async) and the read, PTX wants a fence.proxy.async. wgmma also reads registers
while the program goes on: between the last write of each and the wgmma, PTX wants a wgmma.fence. A GPU need not show
that an order is missing: it may give right results for years. Here the paths through a kernel are followed from label
to label, and a write counts if it reaches the matrix instruction on any of them without a fence.
Source: PTX ISA, "Async proxy" and "wgmma.fence".
"""

import re
from dataclasses import dataclass, field

READS = ("wgmma.mma_async", "tcgen05.mma")
SHARED_WRITES = ("cp.async.wait_group", "cp.async.wait_all", "st.shared", "stmatrix")
JUMP = re.compile(r"(@!?%p\d+ )?(?:bra(?:\.uni)? (\$\w+)|ret|exit)$")
REGISTER = re.compile(r"%r\w*\d+")

State = dict[str, int]  # "shared memory" or a register -> the PTX line of its write, if no fence follows on some path


@dataclass
class _Block:
    """Instructions that run one after the other, with the lines they stand in, and the labels of what may follow."""

    instructions: list[tuple[int, str]] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)


def find_unordered(ptx: str) -> list[str]:
    """Return a phrase for each matrix instruction that reads what no fence has ordered after its write."""
    if not any(name in ptx for name in READS):
        return []
    blocks = _split_blocks(ptx)
    states: dict[str, State] = {"start": {}}
    waiting = ["start"]
    while waiting:
        label = waiting.pop()
        after, _ = _run_block(blocks[label], states[label])
        for follower in blocks[label].followers:
            known = states.get(follower)
            if known is None or after.keys() - known.keys():
                states[follower] = after | (known or {})
                waiting.append(follower)
    return [phrase for label, state in states.items() for phrase in _run_block(blocks[label], state)[1]]


def _split_blocks(ptx: str) -> dict[str, _Block]:
    """Return the blocks by label. The first is "start"; what follows a jump without a label is named by its line."""
    block = _Block()
    blocks = {"start": block}
    for number, text in enumerate(ptx.splitlines(), 1):
        text = " ".join(text.split("//")[0].split())
        if label := re.match(r"(\$\w+):", text):
            block.followers.append(label[1])
            block = blocks[label[1]] = _Block()
            continue
        for instruction in filter(None, map(str.strip, text.split(";"))):
            block.instructions.append((number, instruction))
            if jump := JUMP.match(instruction):
                guard, target = jump.groups()
                block.followers += [target] if target else []
                block.followers += [f"line {number}"] if guard else []
                block = blocks[f"line {number}"] = _Block()
    return blocks


def _run_block(block: _Block, before: State) -> tuple[State, list[str]]:
    """Return the state after a block, and a phrase for each matrix instruction in it that lacks an order."""
    state, found = dict(before), []
    for number, text in block.instructions:
        name = re.sub(r"^@!?%p\d+ ", "", text)
        if name.startswith("fence.proxy.async"):
            state.pop("shared memory", None)
        elif name.startswith("wgmma.fence"):
            state = {key: line for key, line in state.items() if key == "shared memory"}
        elif name.startswith(READS):
            used = set(REGISTER.findall(" ".join(re.findall(r"\{[^}]*\}", name)))) if name[0] == "w" else set()
            found += [
                f"{name.split()[0]} in PTX line {number} reads {key} written in line {state[key]}, no fence between"
                for key in sorted(state.keys() & {"shared memory", *used})
            ]
        elif name.startswith(SHARED_WRITES):
            state["shared memory"] = number
        elif written := re.match(r"[a-z][\w.:]* (\{[^}]*\}|%\w+)", name):
            state |= dict.fromkeys(REGISTER.findall(written[1]), number)
    return state, found
