// The checks of what csrc/cpu/isa/few_rows.cpp and decode.cpp are given.
#include "few_rows.h"

static uintptr_t bytes_of(int64_t type) { return type == WEIGHTS_FP32 ? 4 : 2; }

EXPORT int cria_few_rows(const FewRows* p) {
    if (p->type < WEIGHTS_FP32 || p->type > WEIGHTS_Q8) return BAD_MODE;
    if (p->rows < 0 || p->in < 1 || p->out < 0 || p->threads < 1) return BAD_SIZE;
    if (p->type == WEIGHTS_Q8 && p->in % 32) return BAD_SIZE;
    if (!is_aligned(p->w, bytes_of(p->type)) || !is_aligned(p->x, 4) || !is_aligned(p->y, 4)) return BAD_ALIGNMENT;
    CHOOSE(few_rows)(*p);
    return OK;
}

EXPORT int64_t cria_decode_workspace(const Llama* m, int64_t rows, int64_t longest, int64_t threads) {
    return shared_space(*m, rows, (longest + KEYS - 1) / KEYS) + threads * own_space(*m);
}

static bool has_sizes(const Llama& m, const Tokens& t) {
    if (m.dim < 1 || m.layers < 1 || m.kv_heads < 1 || m.heads % m.kv_heads || m.head_dim < 2 || m.head_dim % 2) return false;
    if (m.hidden_dim < 1 || m.vocab < 1 || t.rows < 1 || t.threads < 1) return false;
    for (int64_t r = 0; r < t.rows; r++) {
        if (t.tokens[r] < 0 || t.tokens[r] >= m.vocab || t.sequence[r] < 0 || t.sequence[r] >= t.sequences) return false;
        if (t.length[r] < 1 || t.length[r] > t.longest) return false;
    }
    return true;
}

static bool is_aligned(const Llama& m, const Tokens& t) {
    const uintptr_t bytes = bytes_of(m.type);
    bool good = is_aligned(m.embedding, bytes) && is_aligned(m.norm, bytes) && is_aligned(m.head, bytes);
    good = good && is_aligned(t.k, bytes) && is_aligned(t.v, bytes) && is_aligned(t.workspace, 4);
    for (int64_t i = 0; i < m.layers; i++) {
        const Layer& l = m.layer[i];
        const void* all[] = {l.attention_norm, l.wqkv, l.bqkv, l.wo, l.bo, l.ffn_norm, l.w13, l.b13, l.w2, l.b2};
        for (const void* p : all) good = good && is_aligned(p, bytes);
    }
    return good;
}

EXPORT int cria_decode(const Llama* m, const Tokens* t) {
    if (m->type != WEIGHTS_FP32 && m->type != WEIGHTS_BF16) return BAD_MODE;
    if (!has_sizes(*m, *t)) return BAD_SIZE;
    if (!is_aligned(*m, *t)) return BAD_ALIGNMENT;
    CHOOSE(decode)(*m, *t);
    return OK;
}
