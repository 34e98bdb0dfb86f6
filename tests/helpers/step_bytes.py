"""What autograd keeps of a micro-batch, and what operators allocate, counted on models of any size."""

import dataclasses

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import kernels
from engine.model.batch import DeviceMicroBatch, MicroBatch

N = 27  # tokens of ready(): the interpreter's time grows with them


def ready(model, several_targets, n=N):
    """Return a micro-batch with a prefix, padding and documents. If several_targets, one row predicts two tokens."""
    documents = [[0, 5, 0, 0], [5, 12, 0, 5], [12, 13, 0, 5], [13, 22, 0, 0], [24, n, 0, 0]]
    positions = torch.zeros(n, dtype=torch.int64)
    for start, end, prefix_start, prefix_end in documents:
        positions[start:end] = torch.arange(end - start) + prefix_end - prefix_start
    rows = torch.cat([torch.arange(start + (end - start) // 2, end) for start, end, *_ in documents])
    rows = torch.cat((rows[:4], rows[3:])) if several_targets else rows
    batch = MicroBatch(
        torch.randint(301, (n,)), positions, torch.tensor(documents, dtype=torch.int32), rows,
        torch.randint(301, rows.shape), torch.rand(rows.shape),
    )  # fmt: skip
    one = model.prepare_batch(batch)
    return dataclasses.replace(one, rows=one.rows.clone())  # on a CPU a view of as many as there are targets


def saved_bytes(work, but=()):
    """Return the bytes of the distinct storages that autograd saves in work(), except those of the tensors in but."""
    found, but = {}, {t.untyped_storage()._cdata for t in but}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in but:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive = work()  # storages stay, so that none takes another's place
    del alive
    return sum(found.values())


def meta(n, dtype=torch.int64):
    return torch.empty(n, dtype=dtype, device="meta")


def meta_plan(c, n, n_queries=None):
    rows = None if n_queries is None else torch.arange(n_queries)
    return kernels.attention_plan(torch.tensor([[0, n, 0, 0]]), n, c.head_dim, "cpu", "triton", rows)


class Watch(TorchDispatchMode):
    """Counts the most bytes that operators' outputs hold at once, and the operations of matrix products."""

    def __init__(self, but):
        super().__init__()
        self.but, self.live = {t.untyped_storage()._cdata for t in but}, {}
        self.now = self.most = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (storage, _) in self.live.items() if storage.expired()]:
            self.now -= self.live.pop(key)[1]
        for t in tree_iter(out):
            key = t.untyped_storage()._cdata if isinstance(t, torch.Tensor) else None
            if key is not None and key not in self.but and key not in self.live:
                self.live[key] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
                self.now += self.live[key][1]
        self.most = max(self.most, self.now)
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return out


def meta_batch(c, tokens, loss_rows, query_rows):
    return DeviceMicroBatch(
        meta(tokens), meta(tokens), meta(loss_rows), meta(loss_rows, torch.float32), meta(query_rows),
        meta(loss_rows) if loss_rows > query_rows else None, (meta_plan(c, tokens), meta_plan(c, tokens, query_rows)),
    )  # fmt: skip


def watched(model, tokens, loss_rows, query_rows, dropout_seed=None):
    """Return the Watch of a micro-batch's forward and backward on the meta device. Its inputs count from the start."""
    one = meta_batch(model.config, tokens, loss_rows, query_rows)
    weights = [*model.buffers(), *(t for p in model.parameters() for t in (p, p.grad) if t is not None)]
    with Watch(weights) as watch:
        model.loss(one, dropout_seed).backward()
    saved = [one.tokens, one.rows, *([] if one.row_of_target is None else [one.row_of_target])]
    watch.most += sum(t.nbytes for t in saved)
    return watch
