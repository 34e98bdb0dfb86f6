"""Which rows of tokens share their first tokens, so that a micro-batch computes each shared prefix once.

The choice is solved exactly. Sorted rows form a tree of common prefixes. At each node of it, either all rows below that
share no longer prefix share this node's prefix, or none of them does, because each of them gains equally by it. So the
best groups follow from one choice per node and possible sharing ancestor.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

LEAST_SHARED_TOKENS = 8  # a shorter prefix saves less than the extra blocks that attention reads for it

PrefixGroup = tuple[int, list[int]]  # (tokens of the shared prefix, the rows that share it); (0, [row]) shares nothing


def find_shared_prefixes(rows: Sequence[np.ndarray]) -> list[PrefixGroup]:
    """Return the groups of rows whose sharing saves the most tokens. Every row is in exactly one group.

    A group computes its prefix once, so it saves n_shared * (len(group) - 1) tokens.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())
    common = [count_common_tokens(rows[a], rows[b]) for a, b in pairwise(order)]
    depths, parents, node_of = build_prefix_tree(common)
    down = sorted(range(len(depths)), key=depths.__getitem__)  # parents before their children, the root first
    above: dict[int, list[int]] = {0: []}  # node -> the depths that its nearest sharing ancestor can have
    for node in down[1:]:
        above[node] = [*above[parents[node]], depths[parents[node]]]
    # saved[node][d]: tokens saved at and below a node whose nearest sharing node, itself included, has depth d.
    leaves = np.bincount(node_of, minlength=len(depths)).tolist()
    saved = [{d: leaves[node] * d for d in [*above[node], depths[node]]} for node in range(len(depths))]
    shares: list[dict[int, bool]] = [{} for _ in depths]
    for node in reversed(down[1:]):
        sharing = saved[node][depths[node]] - depths[node]
        for d in above[node]:
            shares[node][d] = depths[node] >= LEAST_SHARED_TOKENS and sharing > saved[node][d]
            saved[parents[node]][d] += sharing if shares[node][d] else saved[node][d]
    prefix = {0: 0}  # node -> the sharing node that its rows belong to
    for node in down[1:]:
        up = prefix[parents[node]]
        prefix[node] = node if shares[node][depths[up]] else up
    members: dict[int, list[int]] = {}
    for row, node in zip(order, node_of, strict=True):
        members.setdefault(prefix[node], []).append(row)
    unshared = [(0, [row]) for row in sorted(members.pop(0, []))]
    return sorted([(depths[node], sorted(group)) for node, group in members.items()], key=lambda g: g[1]) + unshared


def count_saved_tokens(groups: Sequence[PrefixGroup]) -> int:
    """Return the tokens that the groups save when all rows are in one micro-batch."""
    return sum(n_shared * (len(group) - 1) for n_shared, group in groups)


def count_common_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of first tokens in which two rows agree."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def build_prefix_tree(common: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Build the tree of common prefixes of sorted rows, where rows i and i + 1 have common[i] first tokens in common.

    Returns each node's depth in tokens, each node's parent, and the deepest node of each row. The root comes first; its
    depth is 0 and it is its own parent.
    """
    depths, parents, node_of, path = [0], [0], [], [0]  # path: from the root to the node where the last row hangs
    for depth in [*common, 0]:
        left, child = path[-1], None
        while depths[path[-1]] > depth:
            child = path.pop()
        if depths[path[-1]] < depth:  # a new node, between the path's end and what was popped
            depths.append(depth)
            parents.append(path[-1])
            path.append(len(depths) - 1)
            if child is not None:
                parents[child] = path[-1]
        node_of.append(left if depths[left] >= depth else path[-1])
    return depths, parents, node_of
