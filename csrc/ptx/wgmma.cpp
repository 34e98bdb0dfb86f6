// wgmma: products that four warps start together, of matrices in shared memory, and wait for.
#include "fragments.h"
#include "instructions.h"
#include "product.h"

// A matrix in shared memory as a wgmma descriptor tells: in chunks of 16 bytes, which a swizzle moves about.
struct Described {
    u32 start, leading, stride;  // start in bytes, the others in chunks
    u32 row, mask;               // chunks in a row of the swizzle's pattern
    explicit Described(u64 d) {
        static const u32 ROWS[] = {1, 8, 4, 2};
        start = u32(d & 0x3fff) << 4, leading = u32(d >> 16 & 0x3fff), stride = u32(d >> 32 & 0x3fff);
        row = ROWS[d >> 62], mask = row - 1;
    }
    u32 place(u32 chunk) const {
        u32 a = start + chunk * 16;
        return a ^ (a >> 7 & mask) << 4;
    }
    // Chunk c of the two along k in a row, k contiguous; or chunk c along the rows of column k, rows contiguous.
    u32 along_k(u32 r, u32 c) const { return place(r % 8 * row + r / 8 * stride + (mask ? c : c * leading)); }
    u32 along_rows(u32 c, u32 k) const {
        return mask ? place(c % row + c / row * leading + k % 8 * row + k / 8 * stride)
                    : place(c * stride + k % 8 + k / 8 * leading);
    }
};

struct Part { int first, rows; bool rows_contiguous; };  // of a described matrix

template <class F> static void each_chunk(const Described& m, Part part, int elements, F f) {  // f(row, k, address)
    if (!part.rows_contiguous) {
        for (int r = 0; r < part.rows; r++)
            for (int c = 0; c < 2; c++) f(r, c * elements, m.along_k(u32(part.first + r), u32(c)));
    } else
        for (int c = 0; c < part.rows / elements; c++)
            for (int k = 0; k < 2 * elements; k++)
                f(c * elements, k, m.along_rows(u32(part.first / elements + c), u32(k)));
}

// n: columns. list: the result, then four of a if it is in registers. o: descriptors of a and b, predicate or -1 for
// "add to the result", which is the immediate then.
enum : char { A_IN_REGISTERS = 1, A_ROWS = 2, B_ROWS = 4, MINUS_A = 8, MINUS_B = 16 };  // in kind

static Part part_of_a(const Warp& w, const Instruction& in) { return {w.id % 4 * 16, 16, (in.kind & A_ROWS) != 0}; }
static Part part_of_b(const Instruction& in) { return {0, in.n, (in.kind & B_ROWS) != 0}; }

// (rows, K) in fp32, or its transpose.
template <class H> static void read_described(Warp& w, u64 d, Part part, bool transpose, float* out) {
    constexpr int E = 16 / sizeof(H), K = 2 * E;
    u8* shared = w.block->shared.data();
    each_chunk(Described(d), part, E, [&](int r, int k, u32 address) {
        H chunk[E];
        if (address + 16 <= w.block->shared.size()) std::memcpy(chunk, shared + address, 16);
        else std::memset(chunk, 0xff, 16);
        for (int e = 0; e < E; e++) {
            int row = part.rows_contiguous ? r + e : r, col = part.rows_contiguous ? k : k + e;
            float x = widen(chunk[e]);
            if (sizeof(H) == 4) x = cut_to_tf32(x);
            out[transpose ? col * part.rows + row : row * K + col] = x;
        }
    });
}

template <class H> static void multiply(Warp& w, const Product& p) {
    constexpr int K = 32 / sizeof(H);
    const Instruction& in = *p.in;
    int n = in.n;
    static thread_local float a[16 * 16], b[16 * 256], c[16 * 256];
    if (in.kind & A_IN_REGISTERS) read_left<H>(w, in.list.data() + n / 2, 4, a);
    else read_described<H>(w, p.a, part_of_a(w, in), false, a);
    read_described<H>(w, p.b, part_of_b(in), true, b);
    if (in.kind & MINUS_A) for (float& x : a) x = -x;
    if (in.kind & MINUS_B) for (float& x : b) x = -x;
    for (int i = 0; i < n / 2; i++) {
        const float* x = w.reg<float>(in.list[size_t(i)]);
        for (int lane = 0; lane < 32; lane++) c[accumulator(i, lane, n)] = p.add ? x[lane] : 0.0f;
    }
    add_product(c, a, b, n, K);
    for (int i = 0; i < n / 2; i++) {
        float* x = w.reg<float>(in.list[size_t(i)]);
        for (int lane = 0; lane < 32; lane++) x[lane] = c[accumulator(i, lane, n)];
    }
    w.launch->macs += u64(16 * n * K);
}

static void multiply_any(Warp& w, const Product& p) {  // size: 4 for tf32; sign: bf16, not f16
    if (p.in->size == 4) multiply<float>(w, p);
    else if (p.in->sign) multiply<bf16>(w, p);
    else multiply<f16>(w, p);
}

static void check_operand(Warp& w, const Instruction& in, u64 d, Part part) {
    Agent agent = w.block->agent(Worker::wgmma, w.id);
    each_chunk(Described(d), part, 16 / in.size, [&](int, int, u32 address) {
        if (w.fits_shared(in, address, 16, 16, 0, false) && w.launch->check)
            w.touch_async(in, address, 16, agent, w.products.time, false);
    });
}

static void wgmma(Warp& w, const Instruction& in, u32) {
    bool registers = in.kind & A_IN_REGISTERS;
    Product p{&in, registers ? 0 : w.reg<u64>(in.o[0])[0], w.reg<u64>(in.o[1])[0],
              in.o[2] < 0 ? in.immediate != 0 : (w.pred(in.o[2]) & 1) != 0};
    if (!registers) check_operand(w, in, p.a, part_of_a(w, in));
    check_operand(w, in, p.b, part_of_b(in));
    w.written_by.resize(size_t(w.launch->kernel->register_bytes) / 64), w.read_by.resize(w.written_by.size());
    for (size_t i = 0; i < in.list.size(); i++)
        (i < size_t(in.n) / 2 ? w.written_by : w.read_by)[size_t(in.list[i]) / 64] = w.products.time;
    if (!w.launch->late) multiply_any(w, p);
    w.products.open.push_back(p);
}

// What another instruction does to registers of a wgmma that is under way.
void Warp::check_registers(const Instruction& in) {
    u32 done = clock.known[size_t(block->agent(Worker::wgmma, id))];
    for (int r : in.sources)
        if (written_by[size_t(r) / 64] > done)
            return find("registers", in, 0, "reads: the result of a wgmma that no wait has finished");
    for (int r : in.results)
        if (written_by[size_t(r) / 64] > done || read_by[size_t(r) / 64] > done)
            return find("registers", in, 0, "writes: an operand of a wgmma that no wait has finished");
}

void Warp::finish_products(size_t left) {
    for (; products.committed.size() > left; products.committed.pop_front()) {
        auto& [time, group] = products.committed.front();
        if (launch->late) for (const Product& p : group) multiply_any(*this, p);
        clock.known[size_t(block->agent(Worker::wgmma, id))] = time;
    }
}

static void nothing(Warp&, const Instruction&, u32) {}
static void commit(Warp& w, const Instruction&, u32) { w.products.commit(); }
static void wait(Warp& w, const Instruction& in, u32) { w.finish_products(size_t(in.immediate)); }

static void read_product(Builder& b, Opcode& op, const Operands& a) {
    auto& t = op.parts;  // shape, types of d, a, b
    if (t.size() != 4 || t[1] != "f32" || t[2] != t[3] || a.size() < 6) throw op.unknown();
    if (t[2] != "bf16" && t[2] != "f16" && t[2] != "tf32") throw op.unknown();
    int n = atoi(t[0].c_str() + t[0].find('n') + 1), size = t[2] == "tf32" ? 4 : 2;
    if (t[0] != "m64n" + std::to_string(n) + "k" + std::to_string(32 / size)) throw op.unknown();
    vector<int> list;
    for (const string& r : braces(a[0])) {
        const Register* found = b.lookup(r);
        if (!found || found->width != 4) throw b.fail("result " + r);
        list.push_back(found->at);  // products of a chain share them, so they are no results to be checked
    }
    vector<string> left = braces(a[1]);
    bool registers = left.size() == 4;
    if (int(list.size()) != n / 2) throw op.unknown();
    int da = 0, db = b.source(a[2], 8), p = -1;
    if (registers) for (const string& r : left) list.push_back(b.source(r, 4));
    else da = b.source(a[1], 8);
    u64 add = 0;
    if (!parse_number(a[3], false, false, add)) p = b.predicate(a[3]);
    auto flag = [&](size_t i) { return i < a.size() ? b.number(a[i]) : 0; };
    Instruction& in = b.emit(wgmma, Class::matrix);
    in.converged = true, in.list = list, in.n = n, in.size = size, in.sign = t[2] == "bf16";
    in.o[0] = da, in.o[1] = db, in.o[2] = p, in.immediate = s64(add);
    in.kind = char((registers ? A_IN_REGISTERS : 0) | (!registers && flag(6) ? A_ROWS : 0) |
                   (flag(registers ? 6 : 7) ? B_ROWS : 0) | (flag(4) < 0 ? MINUS_A : 0) | (flag(5) < 0 ? MINUS_B : 0));
}

static void read_wgmma(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.drop({"sync", "aligned"});
    if (op.take("mma_async")) return read_product(b, op, a);
    string what = op.take_any({"fence", "commit_group", "wait_group"});
    op.end();
    if (what.empty()) throw op.unknown();
    Instruction& in = b.emit(what == "fence" ? nothing : what == "commit_group" ? commit : wait, Class::sync);
    in.converged = true;
    if (what == "wait_group") in.immediate = b.number(a.at(0));
}

void add_wgmma(ReadTable& t) { t["wgmma"] = read_wgmma; }
