"""The names of a LLaMA's tensors at Hugging Face, Meta and llama.cpp, and the rows of our parameters that they fill.

    ours                 hf: Hugging Face           meta: Meta                      gguf: llama.cpp
    wqkv (wq, wk, wv)    q_proj, k_proj, v_proj     wq, wk (rows paired), wv        attn_q, attn_k (rows paired), attn_v
    w13 (w1, w3)         gate_proj, up_proj         w1, w3                          ffn_gate, ffn_up
    bqkv, bo, b13, b2    those and o_proj, down_proj, with .bias for .weight; Meta has none

RoPE rotates rows of a head in pairs. In our parameters and at Hugging Face, row i is paired with row i + Dh/2. At Meta
and in GGUF ("rows paired"), row 2i is paired with row 2i + 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.model.config import ModelConfig

PROGRAMS = ("hf", "meta", "gguf")
GLOBAL_NAMES = {
    "tok_embeddings": ("model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "norm.weight", "output_norm.weight"),
    "output": ("lm_head.weight", "output.weight", "output.weight"),
}
LAYER_PREFIXES = ("model.layers.{}.", "layers.{}.", "blk.{}.")
LAYER_NAMES = {
    "wq": ("self_attn.q_proj.weight", "attention.wq.weight", "attn_q.weight"),
    "wk": ("self_attn.k_proj.weight", "attention.wk.weight", "attn_k.weight"),
    "wv": ("self_attn.v_proj.weight", "attention.wv.weight", "attn_v.weight"),
    "wo": ("self_attn.o_proj.weight", "attention.wo.weight", "attn_output.weight"),
    "w1": ("mlp.gate_proj.weight", "feed_forward.w1.weight", "ffn_gate.weight"),
    "w3": ("mlp.up_proj.weight", "feed_forward.w3.weight", "ffn_up.weight"),
    "w2": ("mlp.down_proj.weight", "feed_forward.w2.weight", "ffn_down.weight"),
    "attention_norm": ("input_layernorm.weight", "attention_norm.weight", "attn_norm.weight"),
    "ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight", "ffn_norm.weight"),
}


@dataclass(frozen=True)
class Piece:
    """A tensor of another program, as rows of one of our parameters."""

    parameter: str
    first_row: int
    shape: tuple[int, ...]
    paired_heads: int  # heads whose rows come in neighbouring pairs; 0: the rows are in our order

    def rows_of(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the piece's rows of its parameter, a view."""
        return parameters[self.parameter][self.first_row : self.first_row + self.shape[0]]


def list_pieces(config: ModelConfig, program: str) -> dict[str, Piece]:
    """Return {tensor name: Piece} of everything that a checkpoint of this shape holds, in Hugging Face's order."""
    column = PROGRAMS.index(program)
    dim, hidden = config.dim, config.hidden_dim
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    q_pairs, k_pairs = (0, 0) if program == "hf" else (config.n_heads, config.n_kv_heads)
    layer = {  # name: parameter, first row, shape, paired heads
        "wq": ("wqkv", 0, (q_rows, dim), q_pairs),
        "wk": ("wqkv", q_rows, (kv_rows, dim), k_pairs),
        "wv": ("wqkv", q_rows + kv_rows, (kv_rows, dim), 0),
        "wo": ("wo", 0, (dim, q_rows), 0),
        "w1": ("w13", 0, (hidden, dim), 0),
        "w3": ("w13", hidden, (hidden, dim), 0),
        "w2": ("w2", 0, (dim, hidden), 0),
        "attention_norm": ("attention_norm", 0, (dim,), 0),
        "ffn_norm": ("ffn_norm", 0, (dim,), 0),
    }
    biased = ("wq", "wk", "wv", "wo") * config.attention_bias + ("w1", "w3", "w2") * config.mlp_bias
    table = {GLOBAL_NAMES["tok_embeddings"][column]: Piece("tok_embeddings", 0, (config.vocab_size, dim), 0)}
    for i in range(config.n_layers):
        for name, (parameter, first_row, shape, heads) in layer.items():
            their_name = LAYER_PREFIXES[column].format(i) + LAYER_NAMES[name][column]
            table[their_name] = Piece(f"layers.{i}.{parameter}", first_row, shape, heads)
            if name in biased:
                bias = Piece(f"layers.{i}.b{parameter[1:]}", first_row, shape[:1], heads)
                table[their_name.removesuffix("weight") + "bias"] = bias
    table[GLOBAL_NAMES["norm"][column]] = Piece("norm", 0, (dim,), 0)
    if not config.tied:
        table[GLOBAL_NAMES["output"][column]] = Piece("output", 0, (config.vocab_size, dim), 0)
    return table


def pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (heads Dh, D) rows, where RoPE pairs 2i and 2i + 1 of a head, in our order: i with i + Dh/2. A copy."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)  # (H, Dh/2, 2, D) -> (H, 2, Dh/2, D)


def halves_to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo pairs_to_halves(), in a copy: in the result, RoPE pairs rows 2i and 2i + 1 of a head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)  # (H, 2, Dh/2, D) -> (H, Dh/2, 2, D)
