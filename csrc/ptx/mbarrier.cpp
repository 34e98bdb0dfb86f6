// mbarriers: objects in shared memory that count arrivals, and bytes of bulk copies, from phase to phase.
#include "instructions.h"
#include "machine.h"

// An mbarrier that is used is read: what initialised it has to be ordered before.
Mbarrier* find_mbarrier(Warp& w, const Instruction& in, u64 address, int lane) {
    if (!w.shared(in, address, 8, lane, Access::load)) return nullptr;
    auto it = w.block->mbarriers.find(u32(address));
    if (it != w.block->mbarriers.end() && it->second.valid) return &it->second;
    w.find("mbarrier", in, lane, "not initialised: shared address " + hex(address));
    return nullptr;
}

static void complete_if_due(Block& b, Mbarrier& m) {
    b.events++;
    if (m.pending || m.tx) return;
    m.completed.join(m.arriving);
    m.completed.known[size_t(m.agent)] = m.time++;
    m.arriving = Clock();
    m.pending = m.count, m.phase++;
}

void complete_bytes(Block& b, Mbarrier& m, u64 bytes) {
    m.tx -= s64(bytes);
    complete_if_due(b, m);
}

void arrive(Warp& w, const Instruction& in, Mbarrier& m, u32 count, const Clock& clock, int lane) {
    m.arriving.join(clock);
    if (count > m.pending) {
        w.find("mbarrier", in, lane, "more arrivals than it counts: " + std::to_string(m.count) + " in a phase");
        return;
    }
    m.pending -= count;
    if (count) complete_if_due(*w.block, m);
}

// o: the count. Every mbarrier is an agent: as it, bulk copies write.
static void init(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    Block& b = *w.block;
    find_addresses(w, in.address[0], a);
    for (int lane : Lanes(mask)) {
        if (!w.shared(in, a[lane], 8, lane, Access::store)) continue;
        auto [it, is_new] = b.mbarriers.try_emplace(u32(a[lane]));
        Mbarrier& m = it->second;
        if (is_new) {
            m.agent = b.n_agents++;
            for (Warp& other : b.warps) {
                other.clock.known.resize(size_t(b.n_agents));
                other.clock.fenced.resize(size_t(b.n_agents));
            }
        }
        m.count = m.pending = w.reg<u32>(in.o[0])[lane];
        m.tx = 0, m.phase = 0, m.valid = true, m.arriving = m.completed = Clock();
        m.completed.known.resize(size_t(b.n_agents)), m.completed.fenced.resize(size_t(b.n_agents));
    }
}

static void invalidate(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    for (int lane : Lanes(mask))
        if (Mbarrier* m = find_mbarrier(w, in, a[lane], lane)) {
            if (!m->late.empty() || m->tx) w.find("mbarrier", in, lane, "invalidated: while copies are under way");
            m->valid = false;
            w.shared(in, a[lane], 8, lane, Access::store);
        }
}

// o: the phase's token or -1, the count or -1 for 1, the bytes to expect or -1. kind: 'e' expects, 'a' arrives, 'b' both,
// 'c' completes bytes.
static void arrive_or_expect(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    for (int lane : Lanes(mask)) {
        Mbarrier* m = find_mbarrier(w, in, a[lane], lane);
        if (!m) continue;
        if (in.o[0] >= 0) w.reg<u64>(in.o[0])[lane] = m->phase;
        u32 bytes = in.o[2] < 0 ? 0 : w.reg<u32>(in.o[2])[lane];
        if (in.kind == 'c') complete_bytes(*w.block, *m, bytes);
        else m->tx += bytes;
        if (in.kind == 'a' || in.kind == 'b') {
            arrive(w, in, *m, in.o[1] < 0 ? 1 : w.reg<u32>(in.o[1])[lane], w.clock, lane);
        }
    }
    w.time()++;
}

// o: predicate, token or parity. kind: 'p' for a parity. Whoever does not find the phase complete lets others go on.
static void test_wait(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    u32 done = 0, me = 1u << w.id;
    vector<Mbarrier*> asked;
    for (int lane : Lanes(mask)) {
        Mbarrier* m = find_mbarrier(w, in, a[lane], lane);
        if (!m) { done |= 1u << lane; continue; }
        auto complete = [&] {
            return in.kind == 'p' ? (m->phase & 1) != (w.reg<u32>(in.o[1])[lane] & 1) : m->phase > w.reg<u64>(in.o[1])[lane];
        };
        for (; !complete() && !m->late.empty() && m->asked & me; m->asked = 0) {
            Action act = std::move(m->late.front());
            m->late.erase(m->late.begin());
            act();
        }
        asked.push_back(m);
        if (!complete()) continue;
        done |= 1u << lane;
        w.clock.join(m->completed);
    }
    for (Mbarrier* m : asked) m->asked |= m->late.empty() ? 0 : me;
    u32& p = w.pred(in.o[0]);
    p = (p & ~mask) | done;
    if (done != mask) w.yielded = true;
}

static void read_mbarrier(Builder& b, Opcode op, Operands a) {
    op.take_first();
    string what = op.take_any({"init", "inval", "arrive", "expect_tx", "complete_tx", "test_wait", "try_wait"});
    bool expects = op.take("expect_tx") || what == "expect_tx", parity = op.take("parity");
    op.drop({"release", "acquire", "relaxed", "cta", "cluster", "shared", "shared::cta", "shared::cluster", "b64"});
    op.end();
    auto emit = [&](Run run, const string& address) -> Instruction& {
        Address at = b.address(address, Space::shared);
        Instruction& in = b.emit(run, Class::sync);
        in.address[0] = at, in.o[0] = in.o[1] = in.o[2] = -1;
        return in;
    };
    b.kernel.grain = std::min(b.kernel.grain, 8);
    if (what == "init") {
        int count = b.source(a.at(1), 4);
        emit(init, a.at(0)).o[0] = count;
    } else if (what == "inval") emit(invalidate, a.at(0));
    else if (what == "test_wait" || what == "try_wait") {
        int p = b.predicate(a.at(0)), token = b.source(a.at(2), parity ? 4 : 8);  // a time limit after them is no matter
        Instruction& in = emit(test_wait, a.at(1));
        in.o[0] = p, in.o[1] = token, in.kind = parity ? 'p' : 't';
    } else if (what == "arrive") {  // state, [address], count or bytes
        bool has_state = a.at(0)[0] != '[';
        int state = has_state && a[0] != "_" ? b.result(a[0], 8) : -1;
        size_t at = has_state ? 1 : 0;
        int number = a.size() > at + 1 ? b.source(a[at + 1], 4) : -1;
        Instruction& in = emit(arrive_or_expect, a.at(at));
        in.o[0] = state, in.o[expects ? 2 : 1] = number, in.kind = expects ? 'b' : 'a';
    } else if (what == "expect_tx" || what == "complete_tx") {
        int bytes = b.source(a.at(1), 4);
        Instruction& in = emit(arrive_or_expect, a.at(0));
        in.o[2] = bytes, in.kind = what == "expect_tx" ? 'e' : 'c';
    } else throw op.unknown();
}

void add_mbarrier(ReadTable& t) { t["mbarrier"] = read_mbarrier; }
