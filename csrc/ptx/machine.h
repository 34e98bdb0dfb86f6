// A machine that runs PTX on the CPU: functional, not timed, and as strict as a sanitizer.
//
// A grid runs block after block over host memory: pointers are host addresses. The warps of a block take turns, each
// until it waits. A register is an array of 32 lanes; an instruction is a loop over them under a mask. Lanes that
// diverge at a branch meet again at its immediate post-dominator.
//
// Asynchronous work (cp.async, bulk copies, wgmma) takes effect when it is issued, or (late) when it is waited for:
// results that differ between the two miss a wait. Matrix products are sums of fp32 in the order of k; the units of a
// chip truncate a little differently. Approximate functions (ex2, rsqrt, ...) are rounded correctly.
//
// What is checked; each finding has the line of the PTX and of the source, the block, warp and lane:
//   global         an access outside the ranges that are given with a launch
//   shared         an access outside the block's allocation
//   misaligned     an address that is no multiple of the access's size
//   race           shared memory: an access that nothing orders after another warp's, or after a copy or a product
//                  that is still under way
//   proxy          asynchronous work reads or overwrites what was written without a fence.proxy.async since
//   registers      registers of a wgmma that are written between its fence and it, or used before it is waited for
//   uninitialised  shared memory that is read before the block wrote it; it holds NaN
//   barrier        a barrier that only a part of the block, or of a warp, reaches
//   mbarrier       an mbarrier that is not initialised, or that arrives more often than it counts
//   descriptor     a tensor map, or a copy by it, that the hardware does not take
//   converged      .sync or .aligned executed without lanes that it names
//   trap, limit    a trap; more instructions in a warp than allowed
//
// Order within a block is kept as vector clocks: every warp, and everything that works asynchronously for it, is an
// agent with a time of its own. A warp knows an agent up to a time. bar.sync, mbarriers and waits tell it more.
#pragma once

#include <deque>
#include <functional>
#include <tuple>
#include <utility>

#include "kernel.h"

struct Block;

struct Range { u64 low, high; const char* name; };  // of global memory

struct Launch {
    const Kernel* kernel = nullptr;
    u32 grid[3] = {}, block[3] = {};
    u64 shared_bytes = 0, limit = 0;
    bool late = false, reverse = false, check = true;
    unsigned grain_shift = 0;  // shared memory is looked after in pieces of 1 << grain_shift bytes
    vector<Range> ranges;  // by low
    vector<u8> params;
    std::map<std::tuple<string, int, string>, Finding> findings;
    u64 instructions = 0, lanes = 0, by_class[N_CLASSES] = {}, macs = 0, barriers = 0, blocks = 0;
    u64 loads = 0, load_sectors = 0, load_bytes = 0, stores = 0, store_sectors = 0, store_bytes = 0;
    u64 shared_accesses = 0, shared_ideal_cycles = 0, shared_cycles = 0;
};

// ---- who did what when ----

using Agent = int;
enum class Worker : u8 { warp, wgmma, bulk_store, cp_async };  // of each warp; mbarriers' agents come after all of them
constexpr Agent NOBODY = 0xffff;

// Time up to which each agent is known.
struct Clock {
    vector<u32> known;   // what it did is ordered before what follows
    vector<u32> fenced;  // what it wrote is visible to asynchronous work, too
    void join(const Clock& other);
};

enum class Access : u8 { load, store, atomic };
constexpr int N_USERS = 4;  // that may follow a write: warps, wgmmas and bulk stores that read, atomic instructions

struct Cell {  // what happened last to some bytes of shared memory
    u32 serial = 0;           // of the block that used them; of another block, nothing has happened
    u16 writer = NOBODY;
    u32 write_time = 0;
    u32 users[N_USERS] = {};  // warps, since the write; Block::use_times has when
};

template <class Work> struct Groups {  // of asynchronous work of a warp, committed together and waited for in order
    vector<Work> open;
    std::deque<std::pair<u32, vector<Work>>> committed;  // with the agent's time
    u32 time = 1;                                        // of what is open
    void commit() {
        committed.emplace_back(time++, std::move(open));
        open.clear();
    }
    bool empty() const { return open.empty() && committed.empty(); }
};

struct Copy {  // cp.async
    u32 to;
    u64 from;
    u8 size, given;  // bytes; beyond those given it writes zeros
    bool landed;
};
struct Product { const Instruction* in; u64 a, b; bool add; };  // wgmma
using Action = std::function<void()>;                           // what a bulk copy does

struct Mbarrier {
    u32 count = 0, pending = 0;  // arrivals of a phase, and those that are still to come
    s64 tx = 0;                  // bytes expected, less those that came
    u64 phase = 0;
    bool valid = false;
    Agent agent = 0;             // bulk copies write as this agent, at time `time`
    u32 time = 1;
    Clock arriving, completed;   // what those knew who arrived in this phase, and in earlier ones
    vector<Action> late;         // that takes effect when a warp asks for the second time
    u32 asked = 0;               // warps
};

struct Barrier {
    u32 arrived = 0;  // warps
    bool vote_all = true, vote_any = false;  // of a bar.red
    u32 vote_count = 0;
    int threads = 0;  // 0: all of the block
    const Instruction* in = nullptr;
    Clock clock;      // what those know who arrived
};

struct Block {
    Launch& launch;
    u32 at[3] = {};
    u32 serial = 0;
    vector<u8> shared;
    vector<Cell> cells;
    vector<u32> use_times;   // of each cell, by user and warp
    vector<Warp> warps;
    Barrier barriers[16];
    std::map<u32, Mbarrier> mbarriers;  // by address
    int n_agents = 0;
    u64 events = 0;          // arrivals and completions: without any, who waits for an mbarrier waits for ever

    explicit Block(Launch& l);
    void start(u32 x, u32 y, u32 z);
    bool run();  // false: it cannot go on
    Agent agent(Worker worker, int warp) const { return int(worker) * int(warps.size()) + warp; }

  private:
    bool release_barriers();
    void report_deadlock();
};

// ---- a warp ----

struct Entry { int pc, join; u32 mask; };

struct Warp {
    Block* block = nullptr;
    Launch* launch = nullptr;
    int id = 0, pc = 0, join = -1;
    u32 active = 0, alive = 0;
    vector<Entry> stack;
    int waiting = -1;             // for a barrier
    bool yielded = false;         // an mbarrier is not there yet: others go first
    bool failed = false;
    const Instruction* barrier_result = nullptr;  // that a bar.red writes when its barrier is complete
    u64 executed = 0;
    vector<u8> register_memory, local;
    u8* registers = nullptr;
    Clock clock;
    Groups<Copy> copies;
    Groups<Product> products;
    Groups<Action> bulk_stores;
    vector<u32> written_by, read_by;  // register / 64 -> time of the wgmma that uses it

    template <class T> T* reg(int at) { return reinterpret_cast<T*>(registers + at); }
    u32& pred(int at) { return *reinterpret_cast<u32*>(registers + at); }
    u64 get(int at, int width, int lane) {
        return width == 8 ? reg<u64>(at)[lane] : width == 4 ? reg<u32>(at)[lane] : reg<u16>(at)[lane];
    }
    void set(int at, int width, int lane, u64 x) {
        if (width == 8) reg<u64>(at)[lane] = x;
        else if (width == 4) reg<u32>(at)[lane] = u32(x);
        else reg<u16>(at)[lane] = u16(x);
    }

    u32& time() { return clock.known[size_t(id)]; }  // its own

    bool run();    // run.cpp: until it waits or ends; false: it cannot go on
    void pop();    // to the lanes that wait at a join
    void finish();  // all that is under way

    void find(const char* kind, const Instruction& in, int lane, const string& text);  // report.cpp

    // memory.cpp: the bytes of a checked access, or null after a finding. made: the bytes to store, if they are known.
    // alignment: 0 for the size.
    u8* global(const Instruction& in, u64 address, unsigned size, int lane, Access access, unsigned alignment = 0);
    u8* shared(const Instruction& in, u64 address, unsigned size, int lane, Access access, const u8* made = nullptr);
    u8* reach(const Instruction& in, u64 address, unsigned size, int lane, Access access, const u8* made = nullptr);
    bool fits_shared(const Instruction& in, u64 address, unsigned size, unsigned alignment, int lane, bool write);

    // order.cpp
    void touch(const Instruction& in, u32 address, unsigned size, int lane, Access access, bool same);
    void touch_async(const Instruction& in, u32 address, unsigned size, Agent agent, u32 time, bool write);
    void fence_proxy();

    void finish_copies(size_t left);    // copies.cpp: cp.async
    void finish_products(size_t left);  // wgmma.cpp
    void finish_bulk_stores(size_t left);  // bulk.cpp
    void check_registers(const Instruction& in);  // wgmma.cpp

  private:
    void doubt(const Cell& c, const Instruction& in, u32 address, int lane, Access access);
};

// Lanes of a mask: for (int lane : Lanes(mask)).
struct Lanes {
    u32 mask;
    explicit Lanes(u32 m) : mask(m) {}
    struct Iterator {
        u32 rest;
        int operator*() const { return __builtin_ctz(rest); }
        void operator++() { rest &= rest - 1; }
        bool operator!=(const Iterator& o) const { return rest != o.rest; }
    };
    Iterator begin() const { return {mask}; }
    Iterator end() const { return {0}; }
};

void find_addresses(Warp& w, const Address& address, u64* out);  // memory.cpp: of each lane

// mbarrier.cpp
Mbarrier* find_mbarrier(Warp& w, const Instruction& in, u64 address, int lane);  // null after a finding
void complete_bytes(Block& b, Mbarrier& m, u64 bytes);
void arrive(Warp& w, const Instruction& in, Mbarrier& m, u32 count, const Clock& clock, int lane);

// counters.cpp
void count_global(Launch& l, const Instruction& in, const u64* a, u32 mask, unsigned size, bool write);
void count_shared(Launch& l, const Instruction& in, const u64* a, u32 mask, unsigned size);
void count_access(Warp& w, const Instruction& in, const u64* a, u32 mask, unsigned size, bool write);

string hex(u64 x);
