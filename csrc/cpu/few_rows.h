// Products of few rows of x with a matrix of weights, and a LLaMA's forward of one token a sequence made of them.
// kernels/native/arguments.py declares the structs for ctypes.
#pragma once

#include "api.h"

enum WeightType : int64_t { WEIGHTS_FP32 = 0, WEIGHTS_BF16 = 1, WEIGHTS_Q8 = 2 };

struct FewRows {  // y = x w^T, summed in fp32
    int64_t type;              // of w; Q8 is GGUF's q8_0: blocks of 32 numbers, an fp16 scale and 32 signed bytes
    int64_t rows, in, out;     // x: (rows, in), w: (out, in), y: (rows, out); in is whole blocks in Q8
    int64_t threads;
    const float* x;
    const void* w;
    float* y;
    float* workspace;  // rows * in numbers
};

struct Layer {  // what engine.model.llama.Block holds; a bias is null where there is none
    const void *attention_norm, *wqkv, *bqkv, *wo, *bo, *ffn_norm, *w13, *b13, *w2, *b2;
};

struct Llama {
    int64_t type;  // WEIGHTS_FP32 or WEIGHTS_BF16, of all weights and of the cache
    int64_t dim, layers, heads, kv_heads, head_dim, hidden_dim, vocab;
    double eps;
    const void *embedding, *norm, *head;
    const Layer* layer;
};

struct Tokens {  // the next token of some sequences of a cache
    int64_t rows;
    int64_t sequences, longest;  // of the cache: k and v are (layers, sequences, longest, kv_heads, head_dim)
    int64_t threads;
    const int64_t *tokens, *sequence;  // (rows): the token, and which sequence of the cache it goes on
    const int64_t* length;             // (rows): tokens of that sequence, this one counted
    const float *cos, *sin;            // (rows, head_dim / 2)
    void *k, *v;
    float* workspace;  // cria_decode_workspace() numbers
    float* logits;     // (rows, vocab)
};

constexpr int64_t KEYS = 128;  // of a block of attention: what a thread takes at a time

inline int64_t key_blocks(const Tokens& t) {
    int64_t most = 0;
    for (int64_t r = 0; r < t.rows; r++) most = t.length[r] > most ? t.length[r] : most;
    return (most + KEYS - 1) / KEYS;
}

inline int64_t widest(const Llama& m) {
    const int64_t o = m.heads * m.head_dim, most = m.dim > m.hidden_dim ? m.dim : m.hidden_dim;
    return most > o ? most : o;
}

// Numbers of the workspace that all threads share, and that each has for itself; decode.cpp's share() divides them.
inline int64_t shared_space(const Llama& m, int64_t rows, int64_t blocks) {
    const int64_t qkv = (m.heads + 2 * m.kv_heads) * m.head_dim, parts = m.heads * blocks * (m.head_dim + 2);
    return rows * (2 * m.dim + widest(m) + qkv + parts + 3 * m.hidden_dim) + widest(m);
}
inline int64_t own_space(const Llama& m) { return 5 * m.head_dim; }

EXPORT int cria_few_rows(const FewRows* product);
EXPORT int64_t cria_decode_workspace(const Llama* model, int64_t rows, int64_t longest, int64_t threads);
EXPORT int cria_decode(const Llama* model, const Tokens* tokens);

DECLARE(void, few_rows, const FewRows&)
DECLARE(void, decode, const Llama&, const Tokens&)
