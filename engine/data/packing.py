"""Examples of one optimizer step -> packed micro-batches that compute a common prefix once.

A micro-batch is one row of tokens: documents back to back, which never see each other, without padding but for the
tail. Examples that begin with the same tokens (a template, a repeated question) share them: the prefix stands once in
the row, and each document's queries look at its prefix's keys and then at its own, at positions that go on from the
prefix. What a prefix computes depends on nothing after it, and autograd sums the gradients that its keys and values
get from every document: outputs and gradients are those of the plain rows.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from engine.data.dataset import Dataset
from engine.model.batch import MicroBatch

LEAST_SHARED = 8  # tokens: a shorter prefix saves less than the extra blocks that attention reads for it
EVENING = 1.01  # the step in which a budget grows while micro-batches are evened out


def micro_batches(
    dataset: Dataset,
    examples: np.ndarray,
    max_tokens: int,
    max_examples: int | None = None,
    packing: bool = True,
    share_prefix: bool = True,
    align: int = 1,
    scale: float | None = None,
    mean_of_means: bool = False,
    ranks: int = 1,
    rank: int = 0,
) -> list[MicroBatch]:
    """The examples of a step, each in one micro-batch of at most max_tokens tokens (no example is longer) and at most
    max_examples examples: those of one rank, of which every rank gets as many.

    packing: best-fit, then evened out; without, in their order. align: T becomes a multiple of it by tokens of no
    document. scale: what the losses are multiplied by, in the weights; mean_of_means: and divided by the loss tokens
    and the number of micro-batches, for losses that add up to the mean of the micro-batches' means.

    Every rank cuts the whole step the same way and keeps each ranks-th micro-batch: the i-th of all ranks are computed
    at the same time, and the losses of all add up to the step's. A rank that would have none then, so that the others
    need not wait in vain, gets the shortest example once more, whose losses weigh 0; it counts in no mean.
    """
    rows = [dataset.tokens_of(i) for i in examples]
    groups = shared_prefixes(rows) if share_prefix else [(0, [i]) for i in range(len(rows))]
    lengths, max_tokens = [len(row) for row in rows], max(1, max_tokens // align) * align
    cut = in_order if not packing else pack if ranks == 1 else partial(spread, ranks=ranks)
    runs = cut(groups, lengths, max_tokens, max_examples)
    spare = np.array([np.argmin(lengths)])
    batches = []
    for turn in range(rank, -(-len(runs) // ranks) * ranks, ranks):
        run, factor = (runs[turn], scale) if turn < len(runs) else (spare, 0.0)
        if mean_of_means and turn < len(runs):
            factor = (scale or 1.0) / (sum(int(dataset.is_target_of(i).sum()) for i in examples[run]) * len(runs))
        batches.append(collate(dataset, examples[run], share_prefix, align, factor))
    return batches


# ---- which prefixes are shared --------------------------------------------------------------------------------------


def shared_prefixes(rows: Sequence[np.ndarray]) -> list[tuple[int, list[int]]]:
    """How many first tokens which rows share: groups (n_shared, [row, ...]), every row in one; n_shared is 0 for a row
    alone.

    Of all such groups, where each holds its prefix once and a row is in one group, these save the most tokens. In the
    tree of common prefixes either all rows below a node that share no longer prefix share the node's, or none does, as
    each of them gains the same by it; so one choice a node and a nearest sharing node above it is left to compare.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())
    common = [common_length(rows[a], rows[b]) for a, b in pairwise(order)]
    depths, parents, node_of = prefix_tree(common)
    down = sorted(range(len(depths)), key=depths.__getitem__)  # parents before their children, the root first
    above = {0: []}  # what depths the nearest sharing node above can have; 0: none shares
    for node in down[1:]:
        above[node] = [*above[parents[node]], depths[parents[node]]]
    # Tokens saved at and below a node, by the depth of the nearest sharing node, itself among them.
    leaves = np.bincount(node_of, minlength=len(depths)).tolist()
    saved = [{d: leaves[node] * d for d in [*above[node], depths[node]]} for node in range(len(depths))]
    shares = [{} for _ in depths]
    for node in reversed(down[1:]):
        sharing = saved[node][depths[node]] - depths[node]
        for d in above[node]:
            shares[node][d] = depths[node] >= LEAST_SHARED and sharing > saved[node][d]
            saved[parents[node]][d] += sharing if shares[node][d] else saved[node][d]
    prefix = {0: 0}  # node -> the sharing node that its rows belong to
    for node in down[1:]:
        up = prefix[parents[node]]
        prefix[node] = node if shares[node][depths[up]] else up
    members = {}
    for row, node in zip(order, node_of, strict=True):
        members.setdefault(prefix[node], []).append(row)
    alone = [(0, [row]) for row in sorted(members.pop(0, []))]
    return sorted([(depths[node], sorted(group)) for node, group in members.items()], key=lambda g: g[1]) + alone


def saved(groups):
    """Tokens, were all rows together."""
    return sum(n_shared * (len(group) - 1) for n_shared, group in groups)


def common_length(a, b):
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def prefix_tree(common):
    """The tree of common prefixes of n sorted rows, of which row i and row i + 1 have common[i] tokens in common.

    Returns each node's depth in tokens and its parent, the root (0, None) first, and the deepest node of each row.
    """
    depths, parents, node_of, path = [0], [None], [], [0]  # path: from the root to where the last row hangs
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


# ---- which rows go together -----------------------------------------------------------------------------------------


def in_order(groups, lengths, max_tokens, max_examples):
    """The rows 0, 1, ... cut into runs that keep their order, each of at most max_tokens and max_examples."""
    group_of, n_shared = by_row(groups)
    runs, run, here, total = [], [], set(), 0
    for row, length in enumerate(lengths):
        tokens = length - (n_shared[row] if group_of[row] in here else 0)
        if run and (total + tokens > max_tokens or len(run) == max_examples):
            runs, run, here, total, tokens = [*runs, run], [], set(), 0, length
        run.append(row)
        here.add(group_of[row])
        total += tokens
    return [np.array(r) for r in [*runs, run]]


def pack(groups, lengths, max_tokens, max_examples):
    """The rows in as few runs of at most max_tokens and max_examples as best-fit finds, then of about the same size.

    Best-fit takes the longest row first and puts it where the least room remains. Then the budget is lowered to the
    least at which as many runs hold everything: what is computed at once is the smaller for it.
    """
    fewest = best_fit(groups, lengths, max_tokens, max_examples)
    if len(fewest) == 1:
        return fewest
    budget = (sum(lengths) - saved(groups)) / len(fewest)  # no lower one can do
    while (budget := int(budget * EVENING) + 1) < max_tokens:
        runs = best_fit(groups, lengths, budget, max_examples)
        if len(runs) == len(fewest):
            return runs
    return fewest


def best_fit(groups, lengths, max_tokens, max_examples):
    group_of, n_shared = by_row(groups)
    runs, room, here = [], [], []  # rows, tokens left, groups whose prefix is there
    for row in longest_first(lengths, n_shared):
        group, own = group_of[row], lengths[row] - n_shared[row]
        tokens = [own if group in groups_here else lengths[row] for groups_here in here]
        left = [r - t if r >= t and len(run) != max_examples else None
                for run, r, t in zip(runs, room, tokens, strict=True)]  # fmt: skip
        best = min((i for i, r in enumerate(left) if r is not None), key=lambda i: (left[i], i), default=None)
        if best is None:
            runs, room, here = [*runs, [row]], [*room, max_tokens - lengths[row]], [*here, {group}]
        else:
            runs[best].append(row)
            room[best] = left[best]
            here[best].add(group)
    return [np.array(sorted(run)) for run in runs]


def spread(groups, lengths, max_tokens, max_examples, ranks):
    """The rows in as few runs as best-fit finds, up to a multiple of ranks as far as there are rows, and evened out
    where that keeps the limits. The largest first: neighbours, which are computed at the same time, are of like size.
    """
    fewest = best_fit(groups, lengths, max_tokens, max_examples)
    runs = level(groups, lengths, -(-len(fewest) // ranks) * ranks, max_tokens, max_examples) or fewest
    group_of, n_shared = by_row(groups)

    def computed(run):
        return sum(lengths[row] - n_shared[row] for row in run) + sum(groups[g][0] for g in {group_of[r] for r in run})

    return sorted(runs, key=computed, reverse=True)


def level(groups, lengths, n, max_tokens, max_examples):
    """The rows in n runs of about the same size, less those that stay empty; or None where that takes more than
    max_tokens.

    The longest row first, each to where the fewest tokens are with it (LPT, Graham 1969: the largest run is at most 4/3
    of the least possible where no prefix is shared). Before that, rows of a prefix keep together up to the mean size:
    an eighth of Alpaca's step takes 1.1% fewer tokens. Not where examples are counted: runs of long rows would be left
    for the last, and one of eight be 20% larger than the mean.
    """
    group_of, n_shared = by_row(groups)
    mean = 0 if max_examples else (sum(lengths) - saved(groups)) / n
    runs, tokens, here = [[] for _ in range(n)], [0] * n, [set() for _ in range(n)]
    for row in longest_first(lengths, n_shared):
        group, own = group_of[row], lengths[row] - n_shared[row]
        after = [t + (own if group in groups_here else lengths[row])
                 for t, groups_here in zip(tokens, here, strict=True)]  # fmt: skip
        free = [i for i, run in enumerate(runs) if len(run) != max_examples]
        best = min(free, key=lambda i: (group not in here[i] or after[i] > mean, after[i], i))
        if after[best] > max_tokens:
            return None
        runs[best].append(row)
        tokens[best] = after[best]
        here[best].add(group)
    return [np.array(sorted(run)) for run in runs if run]


def longest_first(lengths, n_shared):
    """Rows by the tokens that they alone have."""
    return sorted(range(len(lengths)), key=lambda row: (n_shared[row] - lengths[row], row))


def by_row(groups):
    group_of = {row: number for number, (_, group) in enumerate(groups) for row in group}
    return group_of, {row: n_shared for n_shared, group in groups for row in group}


# ---- laying out -----------------------------------------------------------------------------------------------------


def collate(
    dataset: Dataset, examples: np.ndarray, share_prefix: bool = False, align: int = 1, scale: float | None = None
) -> MicroBatch:
    """The examples as one micro-batch, each shared prefix before the documents that go on from it.

    A target that several examples share weighs as many; scale multiplies every weight.
    """
    rows, targets = [dataset.tokens_of(i) for i in examples], [dataset.is_target_of(i) for i in examples]
    groups = shared_prefixes(rows) if share_prefix else [(0, [i]) for i in range(len(rows))]
    tokens, positions, documents, predicting = [], [], [], []
    end = 0

    def put(first, row, prefix):
        nonlocal end
        start, end = end, end + len(row) - first
        if end > start:
            documents.append((start, end, *prefix))
            tokens.append(row[first:])
            positions.append(np.arange(first, len(row)))
        return np.arange(start, end)

    for n_shared, group in groups:
        shared = put(0, rows[group[0]][:n_shared], (0, 0))
        prefix = (shared[0], shared[-1] + 1) if n_shared else (0, 0)
        for i in group:
            places = np.concatenate((shared, put(n_shared, rows[i], prefix)))
            at = np.flatnonzero(targets[i])  # never 0: a document's first token is no target
            predicting.append(np.stack((places[at - 1], rows[i][at])))
    pairs, counts = np.unique(np.concatenate(predicting, axis=1), axis=1, return_counts=True)
    padding = -end % align
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


def synthetic(n_tokens: int, length: int, vocab_size: int) -> MicroBatch:
    """n_tokens in documents of `length`, every token a target but the first of each: the most work that a micro-batch
    of so many can be."""
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
