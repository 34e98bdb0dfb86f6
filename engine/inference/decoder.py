"""The forward of one token a sequence in one call of C++, on a CPU: the weights are read once, at the rate of memory.

What torch computes step by step (engine.model.llama with engine.inference.kv_cache) remains the specification, and runs
on GPUs, for prompts, and where find_decoder() returns None.
"""

import ctypes
from collections.abc import Sequence

import torch

from engine.inference.kv_cache import KVCache
from engine.model.llama import Transformer
from engine.model.rope import rope_tables
from kernels.native.arguments import Layer, Llama, Tokens
from kernels.native.cpu import find_cpu
from kernels.native.few_rows import TYPES, new_layers
from kernels.native.library import check

MAX_ROWS = 16  # sequences at once; of as many, torch takes 2.2 times as long in fp32 and 5.8 times in bf16


class Decoder:
    """The next token of sequences whose prompts are in a cache. It holds addresses of the model's weights."""

    def __init__(self, library: ctypes.CDLL, model: Transformer, cache: KVCache):
        c = model.config
        self.library, self.config, self.cache, self.model = library, c, cache, model
        self.threads = torch.get_num_threads()
        names = [field[0] for field in Layer._fields_]
        self.layers = new_layers([[getattr(layer, name) for name in names] for layer in model.layers])
        self.llama = Llama(
            TYPES[model.norm.dtype], c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.hidden_dim,
            c.vocab_size, c.norm_eps, *(t.data_ptr() for t in (model.tok_embeddings, model.norm, model.head)),
            self.layers,
        )  # fmt: skip
        _, batch, longest = cache.k.shape[:3]
        rows = min(batch, MAX_ROWS)
        size = library.cria_decode_workspace(ctypes.byref(self.llama), rows, longest, self.threads)
        self.workspace = torch.empty(size)

    def next_logits(self, tokens: Sequence[int], sequences: Sequence[int]) -> torch.Tensor:
        """Return logits (n, V) fp32 behind one more token of each of n sequences of the cache, at most MAX_ROWS.

        Raises NativeError for a token or a sequence that there is none of, or when the cache is full.
        """
        chosen = torch.tensor(sequences)
        positions = self.cache.begin_token(chosen)
        lengths, ids = positions + 1, torch.tensor(tokens)
        cos, sin = (table.contiguous() for table in rope_tables(self.config, positions, one_of_each=True))
        logits = torch.empty(len(tokens), self.config.vocab_size)
        _, batch, longest = self.cache.k.shape[:3]
        used = (ids, chosen, lengths, cos, sin, self.cache.k, self.cache.v, self.workspace, logits)
        step = Tokens(len(tokens), batch, longest, self.threads, *(t.data_ptr() for t in used))
        check(self.library.cria_decode(ctypes.byref(self.llama), ctypes.byref(step)), "decode")
        return logits


def find_decoder(model: Transformer, cache: KVCache) -> Decoder | None:
    """Return the decoder of a model and its cache; None where torch is to run.

    None without the CPU library, on another device, in a dtype other than fp32 and bf16, for --kernels triton and ref,
    for weights that lie in shards or parts, under an adapter, and with autograd.
    """
    parameters = list(model.parameters())
    plain = all(type(p) is torch.nn.Parameter and p.device.type == "cpu" and p.is_contiguous() for p in parameters)
    same_dtype = len({t.dtype for t in (*parameters, cache.k)}) == 1 and model.norm.dtype in TYPES
    suits = type(model) is Transformer and model.adapter is None and model.impl in ("auto", "native")
    if not (suits and plain and same_dtype) or torch.is_grad_enabled():
        return None
    library = find_cpu()
    return Decoder(library, model, cache) if library else None
