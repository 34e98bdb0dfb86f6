// Turns: a warp runs until it waits, a block until all of its warps have ended.
#include "machine.h"

constexpr int MOST_IDLE_ROUNDS = 1000;  // in which no warp arrives anywhere: then all of them wait for ever

// ---- a warp ----

void Warp::pop() {
    while (true) {
        if (stack.empty()) {
            active = 0;
            return;
        }
        Entry e = stack.back();
        stack.pop_back();
        pc = e.pc, join = e.join, active = e.mask & alive;
        if (active && pc != join) return;
    }
}

// Lanes that take a branch run first; the others, and then all of them from the join on, are put on the stack.
static void diverge(Warp& w, const Instruction& in, u32 taken) {
    int after = w.pc + 1, meet = in.join;
    u32 stay = w.active & ~taken;
    if (meet >= 0 && meet != w.join) w.stack.push_back({meet, w.join, w.active});
    if (after != meet) w.stack.push_back({after, meet, stay});
    if (in.target == meet) w.pop();
    else w.pc = in.target, w.join = meet, w.active = taken;
}

void Warp::finish() {
    copies.commit(), products.commit(), bulk_stores.commit();
    finish_copies(0), finish_products(0), finish_bulk_stores(0);
}

bool Warp::run() {
    const vector<Instruction>& code = launch->kernel->code;
    u64 n = 0, lanes = 0, *by_class = launch->by_class;
    yielded = false;
    while (active && waiting < 0 && !yielded && !failed) {
        const Instruction& in = code[size_t(pc)];
        u32 mask = active;
        if (in.guard >= 0) mask &= in.guard_negated ? ~pred(in.guard) : pred(in.guard);
        n++, by_class[size_t(in.cls)]++, lanes += u32(__builtin_popcount(mask));
        if (__builtin_expect(in.flow == Flow::next, 1)) {
            pc++;
            if (mask) {
                if (__builtin_expect(in.converged && mask != FULL, 0))
                    find("converged", in, 0, "executed by a part of the warp: lanes " + hex(mask));
                if (__builtin_expect(!products.empty(), 0)) check_registers(in);
                in.run(*this, in, mask);
            }
        } else if (in.flow == Flow::exit) {
            alive &= ~mask, active &= ~mask;
            pc++;
            if (!active) pop();
        } else if (!mask) pc++;
        else if (mask == active) pc = in.target;
        else diverge(*this, in, mask);
        while (active && pc == join) pop();
        if (n + executed > launch->limit) {
            find("limit", in, 0, "more instructions than allowed");
            failed = true;
        }
    }
    if (!active && !failed) finish();
    executed += n;
    launch->instructions += n, launch->lanes += lanes;
    return !failed;
}

// ---- a block ----

Block::Block(Launch& l) : launch(l) {
    const Kernel& k = *l.kernel;
    u32 threads = l.block[0] * l.block[1] * l.block[2];
    shared.resize(l.shared_bytes);
    warps.resize((threads + 31) / 32);
    if (l.check) {
        cells.resize(l.shared_bytes / u64(k.grain) + 1);
        use_times.resize(cells.size() * N_USERS * warps.size());
    }
    for (size_t i = 0; i < warps.size(); i++) {
        Warp& w = warps[i];
        w.block = this, w.launch = &l, w.id = int(i);
        w.register_memory.resize(k.initial_registers.size() + 64);
        w.registers = reinterpret_cast<u8*>((reinterpret_cast<u64>(w.register_memory.data()) + 63) / 64 * 64);
        std::copy(k.initial_registers.begin(), k.initial_registers.end(), w.registers);
        w.local.assign(size_t(k.local_bytes) * 32, 0xff);
    }
}

static u32 special_value(const Block& b, const string& name, u32 warp, u32 lane) {
    const Launch& l = b.launch;
    u32 t = warp * 32 + lane, axis = u32(name.back() - 'x');
    u32 tid[3] = {t % l.block[0], t / l.block[0] % l.block[1], t / l.block[0] / l.block[1]};
    if (!name.rfind("%tid", 0)) return tid[axis];
    if (!name.rfind("%ntid", 0)) return l.block[axis];
    if (!name.rfind("%ctaid", 0)) return b.at[axis];
    if (!name.rfind("%nctaid", 0)) return l.grid[axis];
    if (name == "%laneid") return lane;
    if (name == "%warpid") return warp;
    if (name == "%nwarpid") return u32(b.warps.size());
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return u32((u64(2) << lane) - 1);
    if (name == "%lanemask_gt") return ~u32((u64(2) << lane) - 1);
    if (name == "%lanemask_ge") return ~((1u << lane) - 1);
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%cluster_nctarank") return 1;
    if (name == "%total_smem_size") return u32(l.shared_bytes);
    if (name == "%dynamic_smem_size") return u32(l.shared_bytes - l.kernel->static_shared);
    return 0;  // %smid, %cluster_ctarank
}

void Block::start(u32 x, u32 y, u32 z) {
    at[0] = x, at[1] = y, at[2] = z;
    serial++;
    std::fill(shared.begin(), shared.end(), 0xff);
    std::fill(barriers, barriers + 16, Barrier());
    mbarriers.clear();
    n_agents = 4 * int(warps.size());
    u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
    for (Warp& w : warps) {
        u32 in_warp = std::min(32u, threads - u32(w.id) * 32);
        w.pc = 0, w.join = w.waiting = -1, w.executed = 0, w.failed = false;
        w.alive = w.active = in_warp == 32 ? FULL : (1u << in_warp) - 1;
        w.stack.clear();
        w.copies = {}, w.products = {}, w.bulk_stores = {};
        w.clock.known.assign(size_t(n_agents), 0), w.clock.fenced.assign(size_t(n_agents), 0);
        w.time() = 1;
        std::fill(w.written_by.begin(), w.written_by.end(), 0), std::fill(w.read_by.begin(), w.read_by.end(), 0);
        for (auto& [name, r] : launch.kernel->special)
            for (u32 lane = 0; lane < 32; lane++) w.reg<u32>(r)[lane] = special_value(*this, name, u32(w.id), lane);
    }
}

static void write_vote(Warp& w, const Barrier& b) {  // of a bar.red
    if (!w.barrier_result) return;
    const Instruction& in = *w.barrier_result;
    if (in.kind == 'p') for (int lane : Lanes(w.active)) w.reg<u32>(in.o[2])[lane] = b.vote_count;
    else {
        bool yes = in.kind == '&' ? b.vote_all : b.vote_any;
        u32& p = w.pred(in.o[2]);
        p = (p & ~w.active) | (yes ? w.active : 0);
    }
    w.barrier_result = nullptr;
}

// Lets go whoever waits at a complete barrier.
bool Block::release_barriers() {
    bool some = false;
    u32 there = 0;
    for (Warp& w : warps) if (w.active) there |= 1u << w.id;
    for (int i = 0; i < 16; i++) {
        Barrier& b = barriers[i];
        int arrived = __builtin_popcount(b.arrived), wanted = b.threads ? b.threads / 32 : int(warps.size());
        bool complete = b.threads ? arrived >= wanted : (there & ~b.arrived) == 0;
        if (!arrived || !complete) continue;
        if (arrived < wanted)
            warps[size_t(__builtin_ctz(b.arrived))].find(
                "barrier", *b.in, 0,
                "reached by a part of the block: warps " + hex(b.arrived) + ", others have exited");
        for (int w : Lanes(b.arrived)) {
            Warp& warp = warps[size_t(w)];
            if (warp.waiting != i) continue;
            warp.waiting = -1;
            warp.clock.join(b.clock);
            write_vote(warp, b);
        }
        b = Barrier();
        launch.barriers++;
        some = true;
    }
    return some;
}

void Block::report_deadlock() {
    for (Warp& w : warps) {
        if (!w.active) continue;
        const Instruction& in = launch.kernel->code[size_t(std::max(w.pc - 1, 0))];
        if (w.waiting < 0) w.find("mbarrier", in, 0, "waits for ever: for an mbarrier");
        else
            w.find("barrier", *barriers[w.waiting].in, 0,
                   "waits for ever: warps " + hex(barriers[w.waiting].arrived) + " are there");
        return;
    }
}

bool Block::run() {
    u64 seen = events;
    for (int idle = 0; idle < MOST_IDLE_ROUNDS; idle++) {
        bool left = false, can_run = false;
        for (size_t i = 0; i < warps.size(); i++) {
            Warp& w = warps[launch.reverse ? warps.size() - 1 - i : i];
            if (w.active && w.waiting < 0 && !w.run()) return false;
            left = left || w.active;
            can_run = can_run || (w.active && w.waiting < 0);
        }
        if (!left) return true;
        if (release_barriers() || events != seen) idle = 0, seen = events;
        else if (!can_run) break;
    }
    report_deadlock();
    return false;
}
