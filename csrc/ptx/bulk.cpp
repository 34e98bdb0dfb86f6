// Bulk copies: runs of bytes, and tiles of tensors, between global and shared memory.
#include "combine.h"
#include "instructions.h"
#include "machine.h"
#include "tensor_map.h"

namespace {

struct Piece {  // at most 16 bytes, of which those from first to last are inside of the tensor
    u32 shared;
    u64 global;
    u8 size, first, last;
};

struct Transfer {
    vector<Piece> pieces;
    bool to_shared = true, nan = false;
    bool reduces = false;
    Combine combine = Combine::add;
    int type = 0;  // of what is reduced, as in a tensor map

    u64 bytes() const {
        u64 n = 0;
        for (const Piece& p : pieces) n += p.size;
        return n;
    }
};

template <class T> void reduce_elements(Combine op, u8* to, const u8* from, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i += sizeof(T)) {
        T old, x;
        std::memcpy(&old, to + i, sizeof(T));
        std::memcpy(&x, from + i, sizeof(T));
        old = combine(op, old, x, x);
        std::memcpy(to + i, &old, sizeof(T));
    }
}

void reduce_into(const Transfer& t, u8* to, const u8* from, unsigned bytes) {
    switch (t.type) {
        case 2: return reduce_elements<u32>(t.combine, to, from, bytes);
        case 3: return reduce_elements<s32>(t.combine, to, from, bytes);
        case 4: return reduce_elements<u64>(t.combine, to, from, bytes);
        case 5: return reduce_elements<s64>(t.combine, to, from, bytes);
        case 6: return reduce_elements<f16>(t.combine, to, from, bytes);
        case 9: return reduce_elements<double>(t.combine, to, from, bytes);
        case 10: return reduce_elements<bf16>(t.combine, to, from, bytes);
        default: return reduce_elements<float>(t.combine, to, from, bytes);
    }
}

void perform(Block& b, const Transfer& t) {
    for (const Piece& p : t.pieces) {
        u8* shared = b.shared.data() + p.shared;
        u8* global = reinterpret_cast<u8*>(p.global);
        unsigned inside = unsigned(p.last - p.first);
        if (t.to_shared) {
            std::memset(shared, t.nan ? 0xff : 0, p.size);
            if (inside) std::memcpy(shared + p.first, global + p.first, inside);
        } else if (t.reduces) reduce_into(t, global + p.first, shared + p.first, inside);
        else if (inside) std::memcpy(global + p.first, shared + p.first, inside);
    }
}

// ---- what a copy touches ----

u32 swizzled(u32 a, int swizzle) {  // of 32, 64, 128 bytes: 1, 2 or 3 bits of the place of 16 bytes
    return a ^ ((a >> 7 & ((1u << swizzle) - 1)) << 4);
}

string fault_of(const TensorMap& m, int rank, u64 shared) {
    int size = element_bytes(m.type);
    if (m.last_axis + 1 != rank) return "has " + std::to_string(m.last_axis + 1) + " axes";
    if (!size || m.interleave || m.swizzle > 3) return "is of a type or layout that is not known";
    if (m.address % 16) return "address is no multiple of 16";
    u32 row = m.box[0] * u32(size);
    if (row % 16) return "box has rows of " + std::to_string(row) + " bytes, no multiple of 16";
    if (m.swizzle && row > 16u << m.swizzle) return "box has rows of " + std::to_string(row) + " bytes, over the swizzle's";
    for (int i = 0; i < rank; i++) {
        if (m.box[i] < 1 || m.box[i] > 256) return "box has an axis of " + std::to_string(m.box[i]);
        if (m.step[i] != 1) return "has steps over elements";
        if (i && m.stride[i - 1] % 16) return "stride is no multiple of 16";
    }
    return shared % 128 ? "tile's shared address is no multiple of 128" : "";
}

// The tile at these coordinates, row by row. A place outside of the tensor has no bytes inside.
vector<Piece> cut_tile(const TensorMap& m, int rank, const s64* at, u32 shared) {
    vector<Piece> pieces;
    s64 size = element_bytes(m.type);
    u32 chunks = m.box[0] * u32(size) / 16, rows = 1;
    for (int i = 1; i < rank; i++) rows *= m.box[i];
    for (u32 row = 0; row < rows; row++) {
        u64 start = m.address;
        bool inside = true;
        for (u32 i = 1, rest = row; i < u32(rank); rest /= m.box[i], i++) {
            s64 index = at[i] + s64(rest % m.box[i]);
            inside = inside && index >= 0 && index < s64(m.size[i]);
            start += u64(index) * m.stride[i - 1];
        }
        for (u32 c = 0; c < chunks; c++) {
            s64 byte = at[0] * size + s64(c) * 16, end = s64(m.size[0]) * size;
            s64 first = std::clamp<s64>(-byte, 0, 16), last = std::clamp<s64>(end - byte, first, 16);
            u32 place = swizzled(shared + (row * chunks + c) * 16, m.swizzle);
            pieces.push_back({place, start + u64(byte), 16, u8(inside ? first : 0), u8(inside ? last : 0)});
        }
    }
    return pieces;
}

vector<Piece> cut_run(u32 shared, u64 global, u32 bytes) {
    vector<Piece> pieces;
    for (u32 i = 0; i < bytes; i += 16) pieces.push_back({shared + i, global + i, 16, 0, 16});
    return pieces;
}

// Whether every byte may be touched. Sectors are counted by runs of bytes in global memory.
bool check(Warp& w, const Instruction& in, const Transfer& t, int lane, Agent agent, u32 time) {
    Launch& l = *w.launch;
    u64 sectors = 0, bytes = 0, next_sector = 0, next_byte = 0;
    for (const Piece& p : t.pieces) {
        unsigned n = unsigned(p.last - p.first);
        if (!w.fits_shared(in, p.shared, p.size, 16, lane, t.to_shared)) return false;
        if (n && !w.global(in, p.global + p.first, n, lane, t.to_shared ? Access::load : Access::store, 1)) return false;
        if (l.check) w.touch_async(in, p.shared, p.size, agent, time, t.to_shared);
        if (!n) continue;
        u64 low = p.global + p.first, high = low + n;
        u64 first = low == next_byte ? next_sector : low >> 5, last = (high - 1) >> 5;
        if (last >= first) sectors += last - first + 1;
        next_sector = last + 1, next_byte = high, bytes += n;
    }
    (t.to_shared ? l.loads : l.stores)++;
    (t.to_shared ? l.load_sectors : l.store_sectors) += sectors;
    (t.to_shared ? l.load_bytes : l.store_bytes) += bytes;
    in.sectors += sectors, in.used_bytes += bytes;
    return true;
}

void start_load(Warp& w, const Instruction& in, const Transfer& t, u64 mbarrier, int lane) {
    Mbarrier* m = find_mbarrier(w, in, mbarrier, lane);
    if (!m || !check(w, in, t, lane, m->agent, m->time)) return;
    Block& b = *w.block;
    auto act = [&b, m, t] { perform(b, t); complete_bytes(b, *m, t.bytes()); };
    if (w.launch->late) m->late.push_back(act);
    else act();
}

void start_store(Warp& w, const Instruction& in, const Transfer& t, int lane) {
    Block& b = *w.block;
    if (!check(w, in, t, lane, b.agent(Worker::bulk_store, w.id), w.bulk_stores.time)) return;
    auto act = [&b, t] { perform(b, t); };
    if (w.launch->late) w.bulk_stores.open.push_back(act);
    else act();
}

// ---- instructions. address: shared, global or the tensor map, mbarrier. kind: 'l' load, 's' store, 'r' reduce ----

void start(Warp& w, const Instruction& in, Transfer& t, u64 mbarrier, int lane) {
    t.to_shared = in.kind == 'l', t.reduces = in.kind == 'r', t.combine = in.combine;
    if (t.to_shared) start_load(w, in, t, mbarrier, lane);
    else start_store(w, in, t, lane);
}

// o: bytes. size: of the type that is reduced.
void copy_run(Warp& w, const Instruction& in, u32 mask) {
    u64 shared[32], global[32], mbarrier[32];
    find_addresses(w, in.address[0], shared);
    find_addresses(w, in.address[1], global);
    find_addresses(w, in.address[2], mbarrier);
    for (int lane : Lanes(mask)) {
        u32 bytes = w.reg<u32>(in.o[0])[lane];
        if (bytes % 16 || shared[lane] % 16 || global[lane] % 16) {
            w.find("misaligned", in, lane, "bulk copy: of " + std::to_string(bytes) + " bytes between " +
                   hex(shared[lane]) + " and " + hex(global[lane]) + ", wanted multiples of 16");
            continue;
        }
        Transfer t;
        t.pieces = cut_run(u32(shared[lane]), global[lane], bytes), t.type = int(in.immediate);
        start(w, in, t, mbarrier[lane], lane);
    }
}

// list: the coordinates.
void copy_tile(Warp& w, const Instruction& in, u32 mask) {
    u64 shared[32], map[32], mbarrier[32];
    find_addresses(w, in.address[0], shared);
    find_addresses(w, in.address[1], map);
    find_addresses(w, in.address[2], mbarrier);
    int rank = int(in.list.size());
    for (int lane : Lanes(mask)) {
        TensorMap m;
        bool is_param = (map[lane] & TAG) == PARAM_TAG;
        const u8* p = is_param ? w.reach(in, map[lane], 64, lane, Access::load)
                               : w.global(in, map[lane], 128, lane, Access::load, 64);
        if (!p) continue;
        std::memcpy(&m, p, sizeof m);
        string fault = fault_of(m, rank, shared[lane]);
        if (!fault.empty()) {
            w.find("descriptor", in, lane, "the tensor map's " + fault);
            continue;
        }
        s64 at[5];
        for (int i = 0; i < rank; i++) at[i] = w.reg<s32>(in.list[size_t(i)])[lane];
        Transfer t;
        t.pieces = cut_tile(m, rank, at, u32(shared[lane])), t.nan = m.fill == 1, t.type = m.type;
        start(w, in, t, mbarrier[lane], lane);
    }
}

void commit_stores(Warp& w, const Instruction&, u32) { w.bulk_stores.commit(); }
void wait_stores(Warp& w, const Instruction& in, u32) { w.finish_bulk_stores(size_t(in.immediate)); }

Combine take_combine(Opcode& op) {
    static const std::map<string, Combine> KINDS = {
        {"add", Combine::add},     {"min", Combine::min},    {"max", Combine::max},       {"inc", Combine::increment},
        {"dec", Combine::decrement}, {"and", Combine::bit_and}, {"or", Combine::bit_or}, {"xor", Combine::bit_xor}};
    for (auto& [name, combine] : KINDS) if (op.take(name)) return combine;
    throw op.unknown();
}

int take_type(Opcode& op) {
    static const std::map<string, int> TYPES = {{"u32", 2}, {"s32", 3}, {"u64", 4}, {"s64", 5}, {"f16", 6}, {"f32", 7},
                                                {"f64", 9}, {"bf16", 10}, {"b32", 2}, {"b64", 4}};
    auto it = TYPES.find(op.take_last());
    if (it == TYPES.end()) throw op.unknown();
    return it->second;
}

}  // namespace

void Warp::finish_bulk_stores(size_t left) {
    for (; bulk_stores.committed.size() > left; bulk_stores.committed.pop_front()) {
        auto& [time, group] = bulk_stores.committed.front();
        for (Action& act : group) act();
        clock.known[size_t(block->agent(Worker::bulk_store, id))] = time;
    }
}

// [map, {coordinates}] as an address and the registers of the coordinates.
static void read_tile(Builder& b, const Opcode& op, const string& operand, Address& map, vector<int>& at) {
    string s = trim(operand);
    vector<string> parts = split(s.substr(1, s.size() - 2), ',');
    if (parts.size() != 2) throw op.unknown();
    map = b.address("[" + parts[0] + "]", Space::generic);
    for (const string& r : braces(parts[1])) at.push_back(b.source(r, 4));
}

static void read_copy(Builder& b, Opcode& op, Operands a, bool reduces) {
    bool hint = op.take("L2::cache_hint"), loads = op.take("mbarrier::complete_tx::bytes"), tile = op.take("tensor");
    if (loads == op.take("bulk_group")) throw op.unknown();
    op.drop({"shared::cta", "shared::cluster", "global", "noftz", "tile", "1d", "2d", "3d", "4d", "5d"});
    Combine combine = reduces ? take_combine(op) : Combine::add;
    int type = reduces && !tile ? take_type(op) : 0;
    op.end();
    if (hint) a.pop_back();
    if (a.size() != 2u + loads + !tile) throw op.unknown();
    Address shared = b.address(a[loads ? 0 : 1], Space::shared), global, mbarrier;
    if (loads) mbarrier = b.address(a.back(), Space::shared);
    vector<int> coordinates;
    int bytes = -1;
    if (tile) read_tile(b, op, a[loads ? 1 : 0], global, coordinates);
    else {
        global = b.address(a[loads ? 1 : 0], Space::global);
        bytes = b.source(a[2], 4);
    }
    Instruction& in = b.emit(tile ? copy_tile : copy_run, Class::async);
    in.kind = loads ? 'l' : reduces ? 'r' : 's', in.combine = combine, in.space = Space::generic;
    in.list = coordinates, in.o[0] = bytes, in.immediate = type;
    in.address[0] = shared, in.address[1] = global, in.address[2] = mbarrier;
}

// cp.async.bulk and cp.reduce.async.bulk, without "cp" and "bulk".
void read_bulk(Builder& b, Opcode op, Operands a) {
    bool reduces = op.take("reduce");
    if (!op.take("async")) throw op.unknown();
    if (op.take("commit_group")) {
        op.end();
        b.emit(commit_stores, Class::async);
    } else if (op.take("wait_group")) {
        op.take("read");
        op.end();
        b.emit(wait_stores, Class::async).immediate = b.number(a.at(0));
    } else if (op.take("prefetch")) b.emit([](Warp&, const Instruction&, u32) {}, Class::async);
    else read_copy(b, op, a, reduces);
}
