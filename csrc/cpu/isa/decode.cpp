// The forward of one token a sequence, as engine.model.llama and engine.inference.kv_cache compute it in torch. All is
// fp32 from the embedding to the logits; keys and values alone are rounded, to the cache's type. (Rounding wherever
// torch's bf16 path does gives logits 2.5 times as far from the truth.)
//
// A forward is a row of stages, five a layer and the head; a stage is cut into pieces, of which the threads take one at
// a time. Whoever finishes a stage's last piece does what is too small to share (norms, sums) and opens the next one.
// So nobody waits for a thread that the system holds up, unless it holds a piece.
#include <sched.h>

#include "products.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

inline int64_t thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

enum Kind : int64_t { QKV, ATTENTION, OUT, FEED, DOWN, KINDS };  // of a layer's stages; the head is a QKV after the last

struct Space {  // the workspace
    float *x, *h, *scratch;  // the residual stream; the next product's input, arranged; a row of it
    float *qkv, *parts, *out, *gate_up, *products;
    float* own;     // of each thread: own_space() numbers
    int64_t part;   // numbers of a part of attention: the maximum, the sum of exponentials, head_dim weighted values
    int64_t blocks; // of keys, of the longest sequence
};

Space share(const Llama& m, const Tokens& t) {
    Space s;
    float* next = t.workspace;
    const auto take = [&next](int64_t n) { return next += n, next - n; };
    s.part = m.head_dim + 2, s.blocks = key_blocks(t);
    s.x = take(t.rows * m.dim);
    s.h = take(t.rows * widest(m));
    s.scratch = take(widest(m));
    s.qkv = take(t.rows * (m.heads + 2 * m.kv_heads) * m.head_dim);
    s.parts = take(t.rows * m.heads * s.blocks * s.part);
    s.out = take(t.rows * m.dim);
    s.gate_up = take(t.rows * 2 * m.hidden_dim);
    s.products = take(t.rows * m.hidden_dim);
    s.own = next;
    return s;
}

template <class W>
inline float at(const void* bias, int64_t i) {  // 0 where there is no bias
    return bias ? widen(static_cast<const W*>(bias)[i]) : 0.0f;
}

// x += out, which a product gave; then h = rms_norm(x).
template <class W>
void add(const Llama& m, int64_t rows, const Space& s, const void* bias) {
    for (int64_t b = 0; b < rows; b++)
        for (int64_t i = 0; i < m.dim; i++) s.x[b * m.dim + i] += s.out[b * m.dim + i] + at<W>(bias, i);
}

template <class W>
void norm(const Llama& m, int64_t rows, const Space& s, const void* weight) {
    for (int64_t b = 0; b < rows; b++) {
        const float* x = s.x + b * m.dim;
        vf squares = {};
        int64_t i = 0;
        for (; i + LANES <= m.dim; i += LANES) squares += load<vf>(x + i) * load<vf>(x + i);
        float total = sum(squares);
        for (; i < m.dim; i++) total += x[i] * x[i];
        const float scale = 1.0f / __builtin_sqrtf(total / m.dim + static_cast<float>(m.eps));
        const W* w = static_cast<const W*>(weight);
        for (i = 0; i < m.dim; i++) s.scratch[i] = x[i] * scale * widen(w[i]);
        arrange<W>(s.scratch, m.dim, s.h + b * m.dim);
    }
}

// The head that begins at number `first` of a row of qkv, rotated.
template <class W>
void rotate(const Llama& m, const float* qkv, const void* bias, int64_t first, const float* cos, const float* sin, float* to) {
    const int64_t half = m.head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const int64_t j = first + i;
        const float a = qkv[j] + at<W>(bias, j), b = qkv[j + half] + at<W>(bias, j + half);
        to[i] = a * cos[i] - b * sin[i], to[half + i] = b * cos[i] + a * sin[i];
    }
}

// o[g] = the sum of p[g][s] v[s], of N query heads.
template <class W, int N>
void weigh_values(const float* p, const W* v, int64_t row, int64_t dim, int64_t count, float* o, int64_t o_row) {
    int64_t i = 0;
    for (; i + STEP <= dim; i += STEP) {
        vf sums[N][2] = {};
        for (int64_t s = 0; s < count; s++) {
            vf first, second;
            load_step(v + s * row + i, first, second);
            for (int g = 0; g < N; g++) sums[g][0] += first * p[g * KEYS + s], sums[g][1] += second * p[g * KEYS + s];
        }
        for (int g = 0; g < N; g++)
            for (int64_t j = 0; j < STEP; j++) {
                const int64_t at = place(v, j);
                o[g * o_row + i + j] = sums[g][at / LANES][at % LANES];
            }
    }
    for (; i < dim; i++)
        for (int g = 0; g < N; g++) {
            float total = 0;
            for (int64_t s = 0; s < count; s++) total += p[g * KEYS + s] * widen(v[s * row + i]);
            o[g * o_row + i] = total;
        }
}

// parts of up to four query heads q (n, head_dim), arranged, over `count` keys and values at k and v.
template <class W>
void attend_block(
    const Llama& m, const float* q, int64_t n, const W* k, const W* v, int64_t count, float* part, int64_t part_row) {
    const int64_t dim = m.head_dim, row = m.kv_heads * dim;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
    float p[4][KEYS];
    multiply(k, row, q, n, dim, 0, count, p[0], KEYS);
    for (int64_t g = 0; g < n; g++) {
        float most = p[g][0] * scale;
        for (int64_t s = 0; s < count; s++) p[g][s] *= scale, most = p[g][s] > most ? p[g][s] : most;
        for (int64_t s = count; s < KEYS; s++) p[g][s] = most - 1000.0f;  // whose exponential is 0
        vf total = {};
        for (int64_t s = 0; s < count; s += LANES) {
            const vf e = exponential(load<vf>(p[g] + s) - most);
            store(p[g] + s, e), total += e;
        }
        part[g * part_row] = most, part[g * part_row + 1] = sum(total);
    }
    if (n == 4) weigh_values<W, 4>(p[0], v, row, dim, count, part + 2, part_row);
    if (n == 3) weigh_values<W, 3>(p[0], v, row, dim, count, part + 2, part_row);
    if (n == 2) weigh_values<W, 2>(p[0], v, row, dim, count, part + 2, part_row);
    if (n == 1) weigh_values<W, 1>(p[0], v, row, dim, count, part + 2, part_row);
}

// Attention of row b's queries of one key head over one block of keys. The block that the row's own key falls into
// stores it first.
template <class W>
void attend(
    const Llama& m, const Tokens& t, const Space& s, int64_t layer, int64_t b, int64_t kv, int64_t block, float* q) {
    const int64_t dim = m.head_dim, begin = block * KEYS, length = t.length[b];
    if (begin >= length) return;
    const void* bias = m.layer[layer].bqkv;
    const float *qkv = s.qkv + b * (m.heads + 2 * m.kv_heads) * dim, *cos = t.cos + b * dim / 2, *sin = t.sin + b * dim / 2;
    const int64_t place_of = ((layer * t.sequences + t.sequence[b]) * t.longest * m.kv_heads + kv) * dim;
    W *k = static_cast<W*>(t.k) + place_of, *v = static_cast<W*>(t.v) + place_of;
    float* turned = q + 4 * dim;
    if (length <= begin + KEYS) {
        const int64_t at_k = (m.heads + kv) * dim, at_v = at_k + m.kv_heads * dim;
        W *own_k = k + (length - 1) * m.kv_heads * dim, *own_v = v + (length - 1) * m.kv_heads * dim;
        rotate<W>(m, qkv, bias, at_k, cos, sin, turned);
        for_vectors(dim, [&](int64_t i, auto read, auto write) { write(own_k + i, read(turned + i)); });
        for (int64_t i = 0; i < dim; i++) turned[i] = qkv[at_v + i] + at<W>(bias, at_v + i);
        for_vectors(dim, [&](int64_t i, auto read, auto write) { write(own_v + i, read(turned + i)); });
    }
    const int64_t group = m.heads / m.kv_heads, part_row = s.blocks * s.part, skipped = begin * m.kv_heads * dim;
    for (int64_t g = 0; g < group; g += 4) {
        const int64_t n = least(4, group - g), head = kv * group + g;
        for (int64_t j = 0; j < n; j++) {
            rotate<W>(m, qkv, bias, (head + j) * dim, cos, sin, turned);
            arrange<W>(turned, dim, q + j * dim);
        }
        float* part = s.parts + ((b * m.heads + head) * s.blocks + block) * s.part;
        attend_block(m, q, n, k + skipped, v + skipped, least(length - begin, KEYS), part, part_row);
    }
}

// h = the blocks of attention put together.
template <class W>
void join_blocks(const Llama& m, const Tokens& t, const Space& s) {
    const int64_t dim = m.head_dim, wide = m.heads * dim;
    for (int64_t b = 0; b < t.rows; b++) {
        const int64_t used = (t.length[b] + KEYS - 1) / KEYS;
        for (int64_t head = 0; head < m.heads; head++) {
            const float* part = s.parts + (b * m.heads + head) * s.blocks * s.part;
            float *o = s.scratch + head * dim, most = part[0], total = 0;
            for (int64_t i = 1; i < used; i++) most = part[i * s.part] > most ? part[i * s.part] : most;
            for (int64_t i = 0; i < dim; i++) o[i] = 0;
            for (int64_t i = 0; i < used; i++) {
                const float* from = part + i * s.part;
                const float weight = exponential(fill(from[0] - most))[0];
                total += weight * from[1];
                for (int64_t j = 0; j < dim; j++) o[j] += weight * from[2 + j];
            }
            for (int64_t i = 0; i < dim; i++) o[i] /= total;
        }
        arrange<W>(s.scratch, wide, s.h + b * wide);
    }
}

// products = silu(gate) up, of columns [first, last).
template <class W>
void swiglu(const Llama& m, const Layer& l, int64_t rows, const Space& s, int64_t first, int64_t last) {
    for (int64_t b = 0; b < rows; b++) {
        float *gate = s.gate_up + b * 2 * m.hidden_dim, *up = gate + m.hidden_dim, *out = s.products + b * m.hidden_dim;
        for (int64_t i = first; i < last; i += LANES) {
            const int64_t n = least(LANES, last - i);
            vf g = {};
            for (int64_t j = 0; j < n; j++) g[j] = gate[i + j] + at<W>(l.b13, i + j);
            const vf silu = g / (1.0f + exponential(-g));
            for (int64_t j = 0; j < n; j++) out[i + j] = silu[j] * (up[i + j] + at<W>(l.b13, m.hidden_dim + i + j));
        }
    }
}

template <class W>
struct Forward {
    const Llama& m;
    const Tokens& t;
    const Space s;
    alignas(64) int64_t ticket = 0;  // stage * 2^32 + the piece that is next
    alignas(64) int64_t done = 0;    // pieces of the stage

    int64_t stages() const { return KINDS * m.layers + 1; }

    // Rows of the weights of a stage's product.
    int64_t out_rows(int64_t stage) const {
        if (stage == KINDS * m.layers) return m.vocab;
        const int64_t rows[KINDS] = {(m.heads + 2 * m.kv_heads) * m.head_dim, 0, m.dim, m.hidden_dim, m.dim};
        return rows[stage % KINDS];
    }

    int64_t pieces(int64_t stage) const {
        if (stage % KINDS == ATTENTION) return t.rows * m.kv_heads * s.blocks;
        const int64_t chunk = chunk_of(out_rows(stage), t.threads);
        return (out_rows(stage) + chunk - 1) / chunk;
    }

    void multiply_piece(const void* w, int64_t in, int64_t first, int64_t last, float* y, int64_t y_row) const {
        multiply(static_cast<const W*>(w), in, s.h, t.rows, in, first, last, y, y_row);
    }

    void run_piece(int64_t stage, int64_t piece, float* own) const {
        const int64_t layer = stage / KINDS, out = out_rows(stage), chunk = chunk_of(out, t.threads), f = m.hidden_dim;
        const int64_t first = piece * chunk, last = least(first + chunk, out);
        if (layer == m.layers) return multiply_piece(m.head, m.dim, first, last, t.logits, m.vocab);
        const Layer& l = m.layer[layer];
        switch (stage % KINDS) {
            case QKV: return multiply_piece(l.wqkv, m.dim, first, last, s.qkv, out);
            case OUT: return multiply_piece(l.wo, m.heads * m.head_dim, first, last, s.out, out);
            case DOWN: return multiply_piece(l.w2, f, first, last, s.out, out);
            case FEED:
                multiply_piece(l.w13, m.dim, first, last, s.gate_up, 2 * f);
                multiply_piece(l.w13, m.dim, f + first, f + last, s.gate_up, 2 * f);
                return swiglu<W>(m, l, t.rows, s, first, last);
            default: {
                const int64_t heads = piece / s.blocks;
                attend<W>(m, t, s, layer, heads / m.kv_heads, heads % m.kv_heads, piece % s.blocks, own);
            }
        }
    }

    // What follows a stage, by one thread: the input of the next one.
    void finish(int64_t stage) const {
        const int64_t layer = stage / KINDS;
        if (layer == m.layers) return;
        const Layer& l = m.layer[layer];
        switch (stage % KINDS) {
            case ATTENTION: return join_blocks<W>(m, t, s);
            case OUT: return add<W>(m, t.rows, s, l.bo), norm<W>(m, t.rows, s, l.ffn_norm);
            case DOWN:
                add<W>(m, t.rows, s, l.b2);
                return norm<W>(m, t.rows, s, layer + 1 < m.layers ? m.layer[layer + 1].attention_norm : m.norm);
            case FEED:
                for (int64_t b = 0; b < t.rows; b++)
                    arrange<W>(s.products + b * m.hidden_dim, m.hidden_dim, s.h + b * m.hidden_dim);
        }
    }

    void begin() const {
        const W* embedding = static_cast<const W*>(m.embedding);
        for (int64_t b = 0; b < t.rows; b++)
            for (int64_t i = 0; i < m.dim; i++) s.x[b * m.dim + i] = widen(embedding[t.tokens[b] * m.dim + i]);
        norm<W>(m, t.rows, s, m.layer[0].attention_norm);
    }

    void work(int64_t thread) {
        for (;;) {
            const int64_t mine = __atomic_fetch_add(&ticket, 1, __ATOMIC_ACQ_REL), stage = mine >> 32;
            if (stage == stages()) return;
            const int64_t piece = mine & 0xFFFFFFFF, all = pieces(stage);
            if (piece < all) {
                run_piece(stage, piece, s.own + thread * own_space(m));
                if (__atomic_add_fetch(&done, 1, __ATOMIC_ACQ_REL) < all) continue;
                finish(stage);
                done = 0;
                __atomic_store_n(&ticket, (stage + 1) << 32, __ATOMIC_RELEASE);
                continue;
            }
            for (int64_t looks = 0; __atomic_load_n(&ticket, __ATOMIC_ACQUIRE) >> 32 == stage; looks++)
                looks < 1000 ? pause() : void(sched_yield());  // some 20 us, the length of a piece
        }
    }
};

template <class W>
void run(const Llama& m, const Tokens& t) {
    Forward<W> forward{m, t, share(m, t)};
    forward.begin();
#pragma omp parallel num_threads(t.threads)
    forward.work(thread_number());
}

}  // namespace

namespace ISA {

void decode(const Llama& m, const Tokens& t) { m.type == WEIGHTS_BF16 ? run<bf16>(m, t) : run<float>(m, t); }

}  // namespace ISA
