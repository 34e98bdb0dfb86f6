// The order of accesses to shared memory: which of them nothing orders after another's.
#include <algorithm>

#include "machine.h"

void Clock::join(const Clock& other) {
    if (known.size() < other.known.size()) known.resize(other.known.size()), fenced.resize(other.known.size());
    for (size_t i = 0; i < other.known.size(); i++) {
        known[i] = std::max(known[i], other.known[i]);
        fenced[i] = std::max(fenced[i], other.fenced[i]);
    }
}

void Warp::fence_proxy() {
    for (size_t i = 0; i < clock.known.size(); i++) clock.fenced[i] = std::max(clock.fenced[i], clock.known[i]);
    time()++;  // what it writes from here on is not fenced
}

static string describe(const Block& b, Agent agent) {
    static const char* const NAMES[] = {"warp ", "a wgmma of warp ", "a bulk store of warp ", "a cp.async of warp "};
    int n = int(b.warps.size());
    return agent < 4 * n ? NAMES[agent / n] + std::to_string(agent % n) : "a bulk copy";
}

// Users that an access may not overtake: bits of Cell::users.
static u32 rivals_of(Access access) { return access == Access::load ? 8 : access == Access::store ? 15 : 7; }

static u32 others_of(const Cell& c, Access access, u32 me) {
    u32 atomics = c.users[3] & ~me, readers = (c.users[0] & ~me) | c.users[1] | c.users[2];
    return access == Access::load ? atomics : access == Access::store ? atomics | readers : readers;
}

namespace {
struct Cells {  // that an access touches, and the times of one of their users
    Cell *first, *last;
    u32* time;
    size_t stride;  // of times
    Cells(Block& b, u32 address, unsigned size, int user, int warp) {
        unsigned shift = b.launch.grain_shift;
        size_t start = address >> shift, n = b.warps.size();
        first = b.cells.data() + start, last = b.cells.data() + ((address + size - 1) >> shift);
        time = b.use_times.data() + (start * N_USERS + size_t(user)) * n + size_t(warp), stride = N_USERS * n;
    }
};
}  // namespace

static inline void write_cell(Cell& c, Agent agent, u32 time) {
    c.writer = u16(agent), c.write_time = time;
    std::fill(c.users, c.users + N_USERS, 0);
}

// Warps that hold copies of a value may all store it: `same` tells that the bytes are there already.
void Warp::touch(const Instruction& in, u32 address, unsigned size, int lane, Access access, bool same) {
    u32 now = time(), me = 1u << id, serial = block->serial;
    int user = access == Access::load ? 0 : 3;
    Cells cells(*block, address, size, user, id);
    for (Cell* c = cells.first; c <= cells.last; c++, cells.time += cells.stride) {
        if (c->serial != serial) *c = Cell(), c->serial = serial;
        bool known = c->writer == NOBODY ? access == Access::store : c->write_time <= clock.known[c->writer];
        if (__builtin_expect(!known || others_of(*c, access, me), 0) && !same) doubt(*c, in, address, lane, access);
        if (access == Access::store) write_cell(*c, id, now);
        else c->users[user] |= me, *cells.time = now;
    }
}

void Warp::doubt(const Cell& c, const Instruction& in, u32 address, int lane, Access access) {
    static const char* const USES[] = {"reads", "reads", "reads", "changes"};
    Block& b = *block;
    string verb = access == Access::load ? "reads" : access == Access::store ? "overwrites" : "changes";
    auto say = [&](const string& what) {
        find("race", in, lane, verb + " what " + what + ", without a wait or a barrier: shared address " + hex(address));
    };
    if (c.writer == NOBODY && access != Access::store && !c.users[3])
        find("uninitialised", in, lane, "reads: shared address " + hex(address));
    if (c.writer != NOBODY && c.write_time > clock.known[c.writer]) say(describe(b, c.writer) + " wrote");
    int n = int(b.warps.size());
    size_t cell = size_t(&c - b.cells.data());
    for (int user = 0; user < N_USERS; user++) {
        if (!(rivals_of(access) >> user & 1)) continue;
        for (int w : Lanes(c.users[user])) {
            Agent agent = user == 3 ? w : user * n + w;
            if (b.use_times[(cell * N_USERS + size_t(user)) * size_t(n) + size_t(w)] > clock.known[size_t(agent)])
                return say(describe(b, agent) + " " + USES[user]);
        }
    }
}

// An access by asynchronous work of this warp, which knows what the warp knows, and works as `agent` at `time`.
void Warp::touch_async(const Instruction& in, u32 address, unsigned size, Agent agent, u32 when, bool write) {
    int n = int(block->warps.size());
    Agent first_copy = block->agent(Worker::cp_async, 0);
    auto is_generic = [&](Agent a) { return a < n || (a >= first_copy && a < first_copy + n); };  // needs no fence
    Access access = write ? Access::store : Access::load;
    bool needs_fence = !is_generic(agent);
    int user = write ? 0 : agent / n;
    u32 serial = block->serial;
    Cells cells(*block, address, size, user, id);
    for (Cell* c = cells.first; c <= cells.last; c++, cells.time += cells.stride) {
        if (c->serial != serial) *c = Cell(), c->serial = serial;
        bool known = c->writer == NOBODY ? write : c->write_time <= clock.known[c->writer];
        if (__builtin_expect(!known || others_of(*c, access, 0), 0)) doubt(*c, in, address, 0, access);
        if (needs_fence && c->writer != NOBODY && c->write_time > clock.fenced[c->writer] && is_generic(c->writer))
            find("proxy", in, 0, string(write ? "overwrites" : "reads") + " what " + describe(*block, c->writer) +
                 " wrote, without fence.proxy.async: shared address " + hex(address));
        if (write) write_cell(*c, agent, when);
        else c->users[user] |= 1u << id, *cells.time = when;
    }
}
