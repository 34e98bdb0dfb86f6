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

static Cell& cell_of(Block& b, size_t i) {
    Cell& c = b.cells[i];
    if (c.serial != b.serial) c = Cell(), c.serial = b.serial;
    return c;
}

static string describe(const Block& b, Agent agent) {
    static const char* const NAMES[] = {"warp ", "a wgmma of warp ", "a bulk store of warp ", "a cp.async of warp "};
    int n = int(b.warps.size());
    return agent < 4 * n ? NAMES[agent / n] + std::to_string(agent % n) : "a bulk copy";
}

// Warps that hold copies of a value may all store it: `same` tells that the bytes are there already.
void Warp::touch(const Instruction& in, u32 address, unsigned size, int lane, bool write, bool same) {
    Block& b = *block;
    unsigned shift = launch->grain_shift;
    u32 now = time(), me = 1u << id;
    size_t n_readers = N_READERS * b.warps.size();
    for (size_t i = address >> shift; i <= (address + size - 1) >> shift; i++) {
        Cell& c = cell_of(b, i);
        bool ordered = c.writer == NOBODY ? write : c.write_time <= clock.known[c.writer];
        bool is_read = write && ((c.readers[0] & ~me) | c.readers[1] | c.readers[2]);
        if (__builtin_expect(!ordered || is_read, 0)) doubt(c, i, in, address, lane, write, same);
        if (write) {
            c.writer = u16(id), c.write_time = now, c.atomic = false;
            std::fill(c.readers, c.readers + N_READERS, 0);
        } else {
            c.readers[0] |= me;
            b.read_times[i * n_readers + size_t(id)] = now;
        }
    }
}

void Warp::doubt(const Cell& c, size_t cell, const Instruction& in, u32 address, int lane, bool write, bool same) {
    Block& b = *block;
    string verb = write ? "overwrites" : "reads";
    auto say = [&](const string& what) { find("race", in, lane, what + ": shared address " + hex(address)); };
    if (c.writer == NOBODY && !write) find("uninitialised", in, lane, "reads: shared address " + hex(address));
    if (same) return;
    if (c.writer != NOBODY && c.write_time > clock.known[c.writer])
        say(verb + " what " + describe(b, c.writer) + " wrote, without a wait or a barrier");
    if (!write) return;
    int n = int(b.warps.size());
    for (int kind = 0; kind < N_READERS; kind++)
        for (int w : Lanes(c.readers[kind])) {
            Agent reader = kind * n + w;
            if (b.read_times[cell * size_t(N_READERS * n) + size_t(reader)] <= clock.known[size_t(reader)]) continue;
            return say("overwrites what " + describe(b, reader) + " reads, without a wait or a barrier");
        }
}

// An access by asynchronous work of this warp, which knows what the warp knows, and works as `agent` at `time`.
void Warp::touch_async(const Instruction& in, u32 address, unsigned size, Agent agent, u32 time, bool write) {
    Block& b = *block;
    unsigned shift = launch->grain_shift;
    int n = int(b.warps.size());
    bool generic = agent >= b.agent(Worker::cp_async, 0) && agent < 4 * n;  // cp.async needs no fence
    for (size_t i = address >> shift; i <= (address + size - 1) >> shift; i++) {
        Cell& c = cell_of(b, i);
        if (c.writer == NOBODY ? !write : c.write_time > clock.known[c.writer] || write)
            doubt(c, i, in, address, 0, write, false);
        bool by_generic = c.writer < n || (c.writer >= 3 * n && c.writer < 4 * n);
        if (!generic && by_generic && c.write_time > clock.fenced[c.writer])
            find("proxy", in, 0, string(write ? "overwrites" : "reads") + ": what " + describe(b, c.writer) +
                 " wrote, without fence.proxy.async");
        if (write) {
            c.writer = u16(agent), c.write_time = time, c.atomic = false;
            std::fill(c.readers, c.readers + N_READERS, 0);
        } else {
            c.readers[agent / n] |= 1u << (agent % n);
            b.read_times[i * size_t(N_READERS * n) + size_t(agent)] = time;
        }
    }
}
