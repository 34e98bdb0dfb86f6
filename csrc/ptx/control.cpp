// Branches, barriers and fences.
#include "instructions.h"
#include "machine.h"

static void nothing(Warp&, const Instruction&, u32) {}

static void read_branch(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.drop({"uni"});
    op.end();
    Instruction& in = b.emit(nothing, Class::control);
    in.flow = Flow::branch, in.label = b.find_label(a.at(0));
}

static void read_exit(Builder& b, Opcode op, Operands) {
    op.take_first();
    op.drop({"uni"});
    op.end();
    b.emit(nothing, Class::control).flow = Flow::exit;
}

static void trap(Warp& w, const Instruction& in, u32 mask) {
    w.find("trap", in, __builtin_ctz(mask), "trap");
    w.failed = true;
}
static void read_trap(Builder& b, Opcode op, Operands) {
    op.take_first();
    op.end();
    b.emit(trap, Class::control);
}

// ---- barriers of the block: run.cpp lets go whoever waits at a complete one ----

// o: the number, the threads or -1 for all; of bar.red the result, then the predicate. kind: s sync, a arrive, and of
// bar.red p popc, & and, | or.
static void barrier(Warp& w, const Instruction& in, u32 mask) {
    if (mask != w.alive)
        w.find("barrier", in, __builtin_ctz(w.alive & ~mask),
               "reached by a part of the warp: lanes " + hex(mask) + " of " + hex(w.alive));
    int lane = __builtin_ctz(mask);
    u32 number = w.reg<u32>(in.o[0])[lane] & 15;
    Barrier& b = w.block->barriers[number];
    if (b.arrived >> w.id & 1) w.find("barrier", in, lane, "reached twice by a warp before it is complete");
    b.arrived |= 1u << w.id, b.in = &in;
    b.threads = in.o[1] < 0 ? 0 : int(w.reg<u32>(in.o[1])[lane]);
    b.clock.join(w.clock);
    w.time()++;
    w.block->events++;
    if (in.kind != 'a') w.waiting = int(number);
    if (in.kind == 's' || in.kind == 'a') return;
    u32 p = (in.negated ? ~w.pred(in.o[3]) : w.pred(in.o[3])) & mask;
    b.vote_all = b.vote_all && p == mask, b.vote_any = b.vote_any || p;
    b.vote_count += u32(__builtin_popcount(p));
    w.barrier_result = &in;
}

static void warp_barrier(Warp& w, const Instruction& in, u32 mask) {  // o: members
    u32 named = w.reg<u32>(in.o[0])[__builtin_ctz(mask)], missing = named & w.alive & ~mask;
    if (missing) w.find("converged", in, __builtin_ctz(missing), "executed without a lane that it names");
}

static void read_barrier(Builder& b, Opcode op, Operands a) {
    op.take_first();
    op.drop({"cta", "aligned"});
    if (op.take("warp")) {
        op.take("sync");
        op.end();
        int members = b.source(a.at(0), 4);
        b.emit(warp_barrier, Class::sync).o[0] = members;
        return;
    }
    bool red = op.take("red");
    string kind = red ? op.take_any({"popc", "and", "or"}) : op.take_any({"sync", "arrive"});
    op.drop({"u32", "pred"});
    op.end();
    if (kind.empty()) throw op.unknown();
    int o[4] = {-1, -1, -1, -1};
    if (red) {
        o[2] = kind == "popc" ? b.result(a.at(0), 4) : b.predicate(a.at(0));
        o[3] = b.predicate(a.back().substr(a.back()[0] == '!'));
    }
    size_t first = red ? 1 : 0, end = a.size() - first;
    if (end <= first) throw op.unknown();
    o[0] = b.source(a[first], 4);
    if (end > first + 1) o[1] = b.source(a[first + 1], 4);
    Instruction& in = b.emit(barrier, Class::sync);
    std::copy(o, o + 4, in.o);
    in.negated = red && a.back()[0] == '!';
    in.kind = kind == "and" ? '&' : kind == "or" ? '|' : kind[0];
}

// ---- fences ----

static void fence_proxy(Warp& w, const Instruction&, u32) { w.fence_proxy(); }

static void read_fence(Builder& b, Opcode op, Operands) {
    op.take_first();
    bool proxy = op.take("proxy"), tensor_map = op.take("tensormap::generic");
    op.drop({"async", "async::generic", "shared::cta", "async.shared::cta", "sc", "acq_rel", "acquire", "release", "cta",
             "gpu", "sys", "gl", "cluster", "mbarrier_init"});
    op.end();
    b.emit(proxy && !tensor_map ? fence_proxy : nothing, Class::sync);
}

// ---- what changes nothing here ----

static void read_hint(Builder& b, Opcode op, Operands) {
    b.emit(nothing, op.parts[0].rfind("prefetch", 0) ? Class::sync : Class::global);
}

void add_control(ReadTable& t) {
    t["bra"] = read_branch;
    for (auto what : {"ret", "exit"}) t[what] = read_exit;
    t["trap"] = read_trap;
    for (auto what : {"bar", "barrier"}) t[what] = read_barrier;
    for (auto what : {"fence", "membar"}) t[what] = read_fence;
    for (auto what : {"prefetch", "prefetchu", "applypriority", "discard", "griddepcontrol", "setmaxnreg", "nanosleep"})
        t[what] = read_hint;
}
