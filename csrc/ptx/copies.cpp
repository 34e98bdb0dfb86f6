// cp.async: copies of 4, 8 or 16 bytes a lane from global to shared memory.
#include "instructions.h"
#include "machine.h"

static void land(Warp& w, Copy& c) {
    if (c.landed) return;
    u8* to = w.block->shared.data() + c.to;
    if (c.given) std::memcpy(to, reinterpret_cast<const u8*>(c.from), c.given);
    std::memset(to + c.given, 0, size_t(c.size - c.given));
    c.landed = true;
}

void Warp::finish_copies(size_t left) {
    for (; copies.committed.size() > left; copies.committed.pop_front()) {
        auto& [time, group] = copies.committed.front();
        for (Copy& c : group) land(*this, c);
        clock.known[size_t(block->agent(Worker::cp_async, id))] = time;
    }
}

// address: to, from. o: a register with the bytes that are given, or -1 for all.
static void copy_async(Warp& w, const Instruction& in, u32 mask) {
    u64 to[32], from[32];
    u32 reads = 0;
    unsigned size = unsigned(in.size);
    find_addresses(w, in.address[0], to);
    find_addresses(w, in.address[1], from);
    for (int lane : Lanes(mask)) {
        u32 given = in.o[0] < 0 ? size : std::min(w.reg<u32>(in.o[0])[lane], size);
        reads |= given ? 1u << lane : 0;
        if (given && !w.global(in, from[lane], given, lane, Access::load, size)) continue;
        if (!w.fits_shared(in, to[lane], size, size, lane, true)) continue;
        if (w.launch->check)
            w.touch_async(in, u32(to[lane]), size, w.block->agent(Worker::cp_async, w.id), w.copies.time, true);
        Copy c{u32(to[lane]), from[lane], u8(size), u8(given), false};
        if (!w.launch->late) land(w, c);
        w.copies.open.push_back(c);
    }
    if (reads) count_global(*w.launch, in, from, reads, size, false);
    count_shared(*w.launch, in, to, mask, size);
}

static void commit_copies(Warp& w, const Instruction&, u32) { w.copies.commit(); }
static void wait_copies(Warp& w, const Instruction& in, u32) {  // immediate: groups that may be left, -1 for wait_all
    if (in.immediate < 0) w.copies.commit();
    w.finish_copies(in.immediate < 0 ? 0 : size_t(in.immediate));
}

// Each lane arrives when its copies so far have landed. With .noinc it is one of those that are counted; else it raises
// the count first, which changes nothing but what a waiting warp knows.
static void arrive_copied(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    u32 last = w.copies.time++;
    Clock then = w.clock;
    then.known[size_t(w.block->agent(Worker::cp_async, w.id))] = last;
    for (int lane : Lanes(mask)) {
        Mbarrier* m = find_mbarrier(w, in, a[lane], lane);
        if (!m) continue;
        u32 count = in.kind == 'n' ? 1 : 0;
        auto act = [&w, &in, m, count, lane, then] {
            for (auto& [time, group] : w.copies.committed) for (Copy& c : group) land(w, c);
            for (Copy& c : w.copies.open) land(w, c);
            arrive(w, in, *m, count, then, lane);
        };
        if (w.launch->late) m->late.push_back(act);
        else act();
    }
    w.time()++;
}

static void read_cp_async(Builder& b, Opcode op, Operands a) {
    bool hint = op.take("L2::cache_hint");
    op.drop_prefix("L2::");
    op.drop({"ca", "cg", "shared", "shared::cta", "global"});
    op.end();
    if (hint) a.pop_back();
    if (a.size() < 3) throw op.unknown();
    int given = a.size() > 3 ? b.source(a[3], 4) : -1;
    Address to = b.address(a[0], Space::shared), from = b.address(a[1], Space::global);
    Instruction& in = b.emit(copy_async, Class::async);
    in.size = int(b.number(a[2])), in.o[0] = given, in.address[0] = to, in.address[1] = from;
    b.kernel.grain = std::min(b.kernel.grain, in.size);
}

void read_bulk(Builder& b, Opcode op, Operands a);  // bulk.cpp

static void read_cp(Builder& b, Opcode op, Operands a) {
    op.take_first();
    if (op.take("bulk")) return read_bulk(b, op, a);
    if (!op.take("async")) throw op.unknown();
    if (op.take("commit_group")) {
        op.end();
        b.emit(commit_copies, Class::async);
    } else if (op.take("wait_all")) {
        op.end();
        b.emit(wait_copies, Class::async).immediate = -1;
    } else if (op.take("wait_group")) {
        op.end();
        b.emit(wait_copies, Class::async).immediate = b.number(a.at(0));
    } else if (op.take("mbarrier") && op.take("arrive")) {
        bool counted = op.take("noinc");
        op.drop({"shared", "shared::cta", "b64"});
        op.end();
        Address address = b.address(a.at(0), Space::shared);
        Instruction& in = b.emit(arrive_copied, Class::async);
        in.kind = counted ? 'n' : 'i', in.address[0] = address;
    } else read_cp_async(b, op, a);
}

void add_copies(ReadTable& t) { t["cp"] = read_cp; }
