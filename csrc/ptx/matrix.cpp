// mma, ldmatrix and stmatrix: matrices that a warp multiplies and moves.
#include "fragments.h"
#include "instructions.h"
#include "product.h"

// o: the result (16, 8), a (16, K) of A registers, b (K, 8) of half as many, c (16, 8).
template <class H, int A> static void mma(Warp& w, const Instruction& in, u32) {
    constexpr int K = sizeof(H) == 4 ? A * 2 : A * 4;
    float a[16 * K], b[K * 8], c[16 * 8];
    const int *ra = in.o + 4, *rb = ra + A, *rc = rb + A / 2;
    read_left<H>(w, ra, A, a);
    for (int q = 0; q < A / 2; q++) {
        const u32* x = w.reg<u32>(rb[q]);
        for (int lane = 0; lane < 32; lane++) {
            int n = lane / 4, t = lane % 4;
            if constexpr (sizeof(H) == 4) b[(t + q * 4) * 8 + n] = cut_to_tf32(bits<float>(x[lane]));
            else {
                float* to = b + (2 * t + q * 8) * 8 + n;
                to[0] = widen(H{u16(x[lane])}), to[8] = widen(H{u16(x[lane] >> 16)});
            }
        }
    }
    for (int q = 0; q < 4; q++)
        for (int lane = 0; lane < 32; lane++) c[accumulator(q, lane, 8)] = w.reg<float>(rc[q])[lane];
    add_product(c, a, b, 8, K);
    for (int q = 0; q < 4; q++)
        for (int lane = 0; lane < 32; lane++) w.reg<float>(in.o[q])[lane] = c[accumulator(q, lane, 8)];
    w.launch->macs += 16 * 8 * K;
}

static void read_mma(Builder& b, Opcode op, Operands a) {
    op.take_first();
    string shape = op.take_any({"m16n8k16", "m16n8k8"});
    op.drop({"sync", "aligned", "row", "col"});
    auto& t = op.parts;  // types of d, a, b, c
    if (t.size() != 4 || t[0] != "f32" || t[3] != "f32" || t[1] != t[2] || shape.empty() || a.size() != 4)
        throw op.unknown();
    bool long_k = shape == "m16n8k16";
    Run run = t[1] == "bf16"             ? (long_k ? Run(mma<bf16, 4>) : Run(mma<bf16, 2>))
              : t[1] == "f16"            ? (long_k ? Run(mma<f16, 4>) : Run(mma<f16, 2>))
              : t[1] == "tf32" && !long_k ? Run(mma<float, 4>)
                                         : nullptr;
    vector<int> o;
    for (const string& r : braces(a[0])) o.push_back(b.result(r, 4));
    for (size_t i = 1; i < 4; i++) for (const string& r : braces(a[i])) o.push_back(b.source(r, 4));
    if (o.size() > 16) throw op.unknown();
    Instruction& in = b.emit(run, Class::matrix);
    in.converged = true;
    std::copy(o.begin(), o.end(), in.o);
}

// n matrices of 8 x 8; lane i of the address has row i % 8 of matrix i / 8. o: a register of each.
static void matrix_rows(Warp& w, const Instruction& in, u32) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    count_shared(*w.launch, in, a, in.n == 4 ? FULL : (1u << 8 * in.n) - 1, 16);
    for (int j = 0; j < in.n; j++) {
        u16 tile[8][8] = {};
        u32* r = w.reg<u32>(in.o[j]);
        auto element = [&](int lane, int half) -> u16& {
            int row = lane / 4, col = lane % 4 * 2 + half;
            return in.trans ? tile[col][row] : tile[row][col];
        };
        if (in.write)
            for (int lane = 0; lane < 32; lane++)
                element(lane, 0) = u16(r[lane]), element(lane, 1) = u16(r[lane] >> 16);
        for (int row = 0; row < 8; row++) {
            const u8* made = in.write ? reinterpret_cast<const u8*>(tile[row]) : nullptr;
            int lane = 8 * j + row;
            u8* p = w.shared(in, u32(a[lane]), 16, lane, in.write ? Access::store : Access::load, made);
            if (in.write) { if (p) std::memcpy(p, tile[row], 16); }
            else if (p) std::memcpy(tile[row], p, 16);
            else std::memset(tile[row], 0xff, 16);
        }
        if (!in.write)
            for (int lane = 0; lane < 32; lane++) r[lane] = element(lane, 0) | u32(element(lane, 1)) << 16;
    }
}

static void read_matrix_rows(Builder& b, Opcode op, Operands a) {
    bool write = op.take_first() == "stmatrix";
    op.drop({"sync", "aligned", "m8n8", "b16", "shared", "shared::cta"});
    bool trans = op.take("trans");
    int n = op.take("x1") ? 1 : op.take("x2") ? 2 : op.take("x4") ? 4 : 0;
    op.end();
    if (!n || a.size() != 2) throw op.unknown();
    vector<string> registers = braces(a[write ? 1 : 0]);
    if (int(registers.size()) != n) throw op.unknown();
    int o[4];
    for (int i = 0; i < n; i++) o[i] = write ? b.source(registers[size_t(i)], 4) : b.result(registers[size_t(i)], 4);
    Address address = b.address(a[write ? 0 : 1], Space::shared);
    Instruction& in = b.emit(matrix_rows, Class::shared);
    in.n = n, in.trans = trans, in.write = write, in.converged = true, in.space = Space::shared;
    in.address[0] = address;
    std::copy(o, o + n, in.o);
}

void add_matrix(ReadTable& t) {
    t["mma"] = read_mma;
    for (auto what : {"ldmatrix", "stmatrix"}) t[what] = read_matrix_rows;
}
