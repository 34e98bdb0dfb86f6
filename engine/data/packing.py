"""The examples of one step, packed into micro-batches that compute a common prefix once.

A micro-batch is one sequence of tokens: documents back to back, which do not attend to each other, with padding only at
the end. Examples that begin with equal tokens (a template, a repeated question) share them. The prefix is in the
sequence once. Each document attends to its prefix and then to itself, at positions that continue from the prefix. What
a prefix computes depends on nothing after it, and autograd sums the gradients that its keys and values get from every
document. So outputs and gradients equal those of the examples computed one by one.

Packing is bin packing: examples are the items, micro-batches the bins, tokens the size. In this file, a row is
an example of the step; functions take rows by number, 0, 1, ..., with their lengths and prefix groups.

Which rows share a prefix is solved exactly. The sorted rows form a tree of common prefixes. Take the rows below a node
that share no longer prefix: either all of them share this node's prefix or none does, because each gains equally by it.
So the best groups follow from one choice for each node and each depth that its nearest sharing ancestor can have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from engine.data.dataset import Example
from engine.model.batch import MicroBatch

BUDGET_GROWTH = 1.01  # the factor by which a budget grows while micro-batches are evened out
LEAST_SHARED_TOKENS = 8  # a shorter one saves less than the extra blocks cost that attention reads for it

PrefixGroup = tuple[int, list[int]]  # (tokens of the shared prefix, the rows that share it); (0, [row]) shares nothing


@dataclass(frozen=True)
class Packing:
    """How the examples of a step become micro-batches."""

    max_tokens: int  # of a micro-batch; no example is longer
    max_examples: int | None = None  # of a micro-batch
    best_fit: bool = True  # False: examples stay in order
    share_prefix: bool = True  # compute a common prefix once
    multiple: int = 1  # T is padded to a multiple of this, with tokens that belong to no document


def make_micro_batches(
    examples: Sequence[Example],
    packing: Packing,
    *,
    scale: float | None = None,
    mean_of_means: bool = False,
    ranks: int = 1,
    rank: int = 0,
) -> list[MicroBatch]:
    """Return one rank's micro-batches of a step. Each example is in one micro-batch; every rank gets equally many.

    scale multiplies every loss, through the weights. mean_of_means divides each micro-batch's weights by its loss
    tokens and by the number of micro-batches, so that the losses add up to the mean of the micro-batches' means.

    Every rank makes the same micro-batches of the whole step and keeps number rank, rank + ranks, ... of them. So the
    ranks compute neighbouring micro-batches at the same time, and their losses add up to the step's. Collectives need
    every rank: one that has no micro-batch left while others have computes the shortest example again, with weights of
    0.
    """
    rows = [example.tokens for example in examples]
    groups = find_shared_prefixes(rows) if packing.share_prefix else [(0, [i]) for i in range(len(rows))]
    lengths = [len(row) for row in rows]
    max_tokens = max(1, packing.max_tokens // packing.multiple) * packing.multiple
    if not packing.best_fit:
        cut = cut_in_order
    elif ranks == 1:
        cut = pack_evenly
    else:
        cut = partial(spread_over_ranks, ranks=ranks)
    bins = cut(groups, lengths, max_tokens, packing.max_examples)
    shortest = np.array([np.argmin(lengths)])
    batches = []
    for turn in range(rank, -(-len(bins) // ranks) * ranks, ranks):
        rows_here, factor = (bins[turn], scale) if turn < len(bins) else (shortest, 0.0)
        members = [examples[row] for row in rows_here]
        if mean_of_means and turn < len(bins):
            n_loss_tokens = sum(int(example.is_target.sum()) for example in members)
            factor = (scale or 1.0) / (n_loss_tokens * len(bins))
        batches.append(collate(members, packing.share_prefix, packing.multiple, factor))
    return batches


# ---- which rows share a prefix --------------------------------------------------------------------------------------


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
    """Return the length of the common prefix of two rows."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def build_prefix_tree(common: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Build the tree of common prefixes of sorted rows. Rows i and i + 1 have common[i] tokens in common at the start.

    Return each node's depth in tokens, each node's parent, and the deepest node of each row. The root comes first; its
    depth is 0 and it is its own parent.
    """
    depths, parents, node_of, path = [0], [0], [], [0]  # path: from the root to the node where the last row hangs
    for depth in [*common, 0]:
        left, child = path[-1], None
        while depths[path[-1]] > depth:
            child = path.pop()
        if depths[path[-1]] < depth:  # a new node, between the end of the path and the popped child
            depths.append(depth)
            parents.append(path[-1])
            path.append(len(depths) - 1)
            if child is not None:
                parents[child] = path[-1]
        node_of.append(left if depths[left] >= depth else path[-1])
    return depths, parents, node_of


# ---- which rows go together -----------------------------------------------------------------------------------------


def cut_in_order(
    groups: Sequence[PrefixGroup], lengths: Sequence[int], max_tokens: int, max_examples: int | None
) -> list[np.ndarray]:
    """Divide the rows 0, 1, ... into bins that keep their order."""
    group_of, n_shared = index_by_row(groups)
    bins: list[list[int]] = []
    members: list[int] = []
    groups_here: set[int] = set()
    total = 0
    for row, length in enumerate(lengths):
        tokens = length - (n_shared[row] if group_of[row] in groups_here else 0)
        if members and (total + tokens > max_tokens or len(members) == max_examples):
            bins.append(members)
            members, groups_here, total, tokens = [], set(), 0, length
        members.append(row)
        groups_here.add(group_of[row])
        total += tokens
    return [np.array(b) for b in [*bins, members]]


def pack_evenly(
    groups: Sequence[PrefixGroup], lengths: Sequence[int], max_tokens: int, max_examples: int | None
) -> list[np.ndarray]:
    """Pack the rows into as few bins as best-fit finds, then even the bins out.

    The budget is lowered to the least at which equally many bins hold everything. One full and one nearly empty
    micro-batch need more memory than two half-full ones and take as long.
    """
    fewest = pack_best_fit(groups, lengths, max_tokens, max_examples)
    if len(fewest) == 1:
        return fewest
    budget: float = (sum(lengths) - count_saved_tokens(groups)) / len(fewest)  # the mean: no lower budget is enough
    while (budget := int(budget * BUDGET_GROWTH) + 1) < max_tokens:
        bins = pack_best_fit(groups, lengths, int(budget), max_examples)
        if len(bins) == len(fewest):
            return bins
    return fewest


def pack_best_fit(
    groups: Sequence[PrefixGroup], lengths: Sequence[int], max_tokens: int, max_examples: int | None
) -> list[np.ndarray]:
    """Pack the rows, the longest first, each into the bin where it leaves the fewest free tokens."""
    group_of, n_shared = index_by_row(groups)
    bins: list[list[int]] = []
    free_tokens: list[int] = []
    groups_in: list[set[int]] = []  # the groups whose prefix is in each bin
    for row in order_longest_first(lengths, n_shared):
        group, own = group_of[row], lengths[row] - n_shared[row]
        left = {}  # bin -> the tokens that would stay free
        for b, members in enumerate(bins):
            tokens = own if group in groups_in[b] else lengths[row]
            if tokens <= free_tokens[b] and len(members) != max_examples:
                left[b] = free_tokens[b] - tokens
        best = min(left, key=lambda b: (left[b], b), default=None)
        if best is None:
            bins.append([row])
            free_tokens.append(max_tokens - lengths[row])
            groups_in.append({group})
        else:
            bins[best].append(row)
            free_tokens[best] = left[best]
            groups_in[best].add(group)
    return [np.array(sorted(b)) for b in bins]


def spread_over_ranks(
    groups: Sequence[PrefixGroup], lengths: Sequence[int], max_tokens: int, max_examples: int | None, ranks: int
) -> list[np.ndarray]:
    """Pack the rows into a multiple of `ranks` bins of about equal size, the largest bin first.

    The number of bins is what best-fit needs, rounded up to the multiple; there may be fewer bins where rows are few.
    Different ranks compute neighbouring bins at the same time, so these should have similar sizes. Where bins of equal
    size would break a limit, those of best-fit are returned.
    """
    fewest = pack_best_fit(groups, lengths, max_tokens, max_examples)
    n_bins = -(-len(fewest) // ranks) * ranks
    bins = level_bins(groups, lengths, n_bins, max_tokens, max_examples) or fewest
    group_of, n_shared = index_by_row(groups)

    def count_computed_tokens(members):
        prefixes = sum(groups[g][0] for g in {group_of[row] for row in members})
        return sum(lengths[row] - n_shared[row] for row in members) + prefixes

    return sorted(bins, key=count_computed_tokens, reverse=True)


def level_bins(
    groups: Sequence[PrefixGroup], lengths: Sequence[int], n_bins: int, max_tokens: int, max_examples: int | None
) -> list[np.ndarray] | None:
    """Distribute the rows over n_bins bins of about equal size. Return None where a bin would exceed max_tokens.

    Rows are placed longest first, each into the bin that is then smallest (LPT, Graham 1969: without shared prefixes
    the largest bin is at most 4/3 of the optimum). But rows of one prefix stay together until their bin has the mean
    size: a step of Alpaca on eight ranks then computes 1.1% fewer tokens. They do not where max_examples is set: bins
    of long rows would be left for the end, and one of eight would be 20% larger than the mean. Empty bins are left out.
    """
    group_of, n_shared = index_by_row(groups)
    mean = 0 if max_examples else (sum(lengths) - count_saved_tokens(groups)) / n_bins
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    tokens = [0] * n_bins
    groups_in: list[set[int]] = [set() for _ in range(n_bins)]
    for row in order_longest_first(lengths, n_shared):
        group, own = group_of[row], lengths[row] - n_shared[row]
        after = [n + (own if group in here else lengths[row]) for n, here in zip(tokens, groups_in, strict=True)]
        free = [b for b, members in enumerate(bins) if len(members) != max_examples]
        best = min(free, key=lambda b: (group not in groups_in[b] or after[b] > mean, after[b], b))
        if after[best] > max_tokens:
            return None
        bins[best].append(row)
        tokens[best] = after[best]
        groups_in[best].add(group)
    return [np.array(sorted(members)) for members in bins if members]


def order_longest_first(lengths: Sequence[int], n_shared: dict[int, int]) -> list[int]:
    """Return the rows sorted by the tokens that they do not share, most first."""
    return sorted(range(len(lengths)), key=lambda row: (n_shared[row] - lengths[row], row))


def index_by_row(groups: Sequence[PrefixGroup]) -> tuple[dict[int, int], dict[int, int]]:
    """Return {row: number of its group} and {row: tokens of its group's prefix}."""
    group_of = {row: number for number, (_, group) in enumerate(groups) for row in group}
    return group_of, {row: n_shared for n_shared, group in groups for row in group}


# ---- bins to micro-batches -------------------------------------------------------------------------------------------


def collate(
    examples: Sequence[Example], share_prefix: bool = False, multiple: int = 1, scale: float | None = None
) -> MicroBatch:
    """Return the examples as one micro-batch, each shared prefix before the documents that continue from it.

    Shared prefixes are searched again among these examples, because the best groups of the step need not be the best
    within one micro-batch. A target that several examples share counts once for each, by its weight. scale multiplies
    every weight.
    """
    rows, targets = [example.tokens for example in examples], [example.is_target for example in examples]
    groups = find_shared_prefixes(rows) if share_prefix else [(0, [i]) for i in range(len(rows))]
    tokens, positions, documents, predicting = [], [], [], []
    end = 0

    def append_document(first, row, prefix):
        """Append row[first:] to the micro-batch and return the places of its tokens there."""
        nonlocal end
        start, end = end, end + len(row) - first
        if end > start:
            documents.append((start, end, *prefix))
            tokens.append(row[first:])
            positions.append(np.arange(first, len(row)))
        return np.arange(start, end)

    for n_shared, group in groups:
        shared = append_document(0, rows[group[0]][:n_shared], (0, 0))
        prefix = (shared[0], shared[-1] + 1) if n_shared else (0, 0)
        for i in group:
            places = np.concatenate((shared, append_document(n_shared, rows[i], prefix)))
            at = np.flatnonzero(targets[i])  # never 0: a document's first token is no target
            predicting.append(np.stack((places[at - 1], rows[i][at])))
    pairs, counts = np.unique(np.concatenate(predicting, axis=1), axis=1, return_counts=True)
    padding = -end % multiple
    weights = None
    if scale is not None or (counts > 1).any():
        weights = torch.from_numpy((counts * (1.0 if scale is None else scale)).astype(np.float32))
    return MicroBatch(
        tokens=torch.from_numpy(np.concatenate([*tokens, np.zeros(padding, np.int64)])),
        positions=torch.from_numpy(np.concatenate([*positions, np.zeros(padding, np.int64)])),
        documents=torch.tensor(documents, dtype=torch.int32),
        loss_rows=torch.from_numpy(pairs[0].astype(np.int64)),
        targets=torch.from_numpy(pairs[1].astype(np.int64)),
        weights=weights,
    )


def make_largest_micro_batch(n_tokens: int, length: int, vocab_size: int) -> MicroBatch:
    """Return n_tokens made-up tokens in documents of `length` tokens, all targets but the first of each.

    No micro-batch of n_tokens needs more memory or time.
    """
    starts = np.arange(0, n_tokens, length)
    ends = np.minimum(starts + length, n_tokens)
    tokens = torch.arange(n_tokens) % vocab_size
    loss_rows = torch.from_numpy(np.setdiff1d(np.arange(n_tokens), ends - 1))
    documents = np.stack((starts, ends, 0 * starts, 0 * starts), axis=1)
    return MicroBatch(
        tokens=tokens,
        positions=torch.arange(n_tokens) % length,
        documents=torch.from_numpy(documents).int(),
        loss_rows=loss_rows,
        targets=tokens[loss_rows + 1],
        weights=torch.full(loss_rows.shape, 1 / len(loss_rows)),
    )
