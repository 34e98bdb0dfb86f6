// A kernel as it was read: a list of instructions, each with the function that runs it.
#pragma once

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "numbers.h"

using std::string;
using std::vector;

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, u32 mask);  // mask: the lanes that run it, never none

enum class Flow : u8 { next, branch, exit };
enum class Space : u8 { global, shared, extern_shared, local, param, generic };
enum class Combine : u8 { add, min, max, bit_and, bit_or, bit_xor, exchange, compare_swap, increment, decrement };
enum class Class : u8 { integer, floating, special, move, global, shared, async, matrix, shuffle, sync, control };
constexpr int N_CLASSES = 11;
const char* const CLASS_NAMES[N_CLASSES] = {"int",   "float",  "special", "move", "global", "shared",
                                            "async", "matrix", "shuffle", "sync", "control"};

// Tags in the upper byte of generic addresses.
constexpr u64 SHARED_TAG = 0x5aull << 56, LOCAL_TAG = 0x5bull << 56, PARAM_TAG = 0x5cull << 56, TAG = 0xffull << 56;

struct Address {
    int base = -1, width = 8;  // register and its bytes
    s64 offset = 0;
};

// Registers are offsets into a warp's registers. What a field means is said where an instruction is read.
struct Instruction {
    Run run = nullptr;
    Flow flow = Flow::next;
    Class cls = Class::integer;
    Space space = Space::global;
    Combine combine = Combine::add;
    int guard = -1;             // predicate
    bool guard_negated = false;
    bool converged = false;     // all lanes must run it together
    bool sign = false, negated = false, trans = false, write = false;
    char kind = 0;
    int o[16] = {};             // operands: results, then sources; -1 for one that is not there
    vector<int> list;           // operands without a limit
    int n = 1, size = 4;        // elements, and the bytes of each
    int width[4] = {};          // bytes of the registers of a vector
    Address address[3];
    s64 immediate = 0;
    int target = -1, join = -1; // of a branch: where it goes, and where its lanes meet again
    int line = 0, loc = -1;     // in the PTX; in Kernel::places
    string name, label;
    vector<int> sources, results;  // all registers but predicates

    // Of one launch.
    mutable u32 range = 0;  // of global memory, that it reached last
    mutable u64 sectors = 0, used_bytes = 0, cycles = 0, ideal_cycles = 0;
};

struct Finding {
    string kind, text, instruction, where;
    int line = 0, warp = 0, lane = 0;
    u32 block[3] = {};
    u64 count = 0;
};

struct Register { int at, width; };  // width: bytes, 0 for a predicate
struct Parameter { int at, size; };
struct Symbol { Space space; u64 at; };

struct Place { int file = 0, line = 0, outer_file = 0, outer_line = 0; };  // in the source, and where that is inlined

struct Kernel {
    string name;
    vector<Instruction> code;
    vector<Parameter> params;
    int param_bytes = 0, register_bytes = 0, local_bytes = 0;
    u64 static_shared = 0;
    vector<u8> initial_registers;  // holds the immediates
    vector<Place> locs;
    vector<string> places;                // of locs, as text
    std::map<string, int> special;        // "%tid.x" -> register
    int grain = 16;                       // bytes of shared memory that are looked after together
    vector<Finding> findings;             // that need no run
};

struct Module {
    std::map<string, std::unique_ptr<Kernel>> kernels;
    vector<std::unique_ptr<vector<u8>>> globals;
    std::map<string, Symbol> symbols;
    u64 static_shared = 0;
};

void read_module(Module& module, const string& text);  // reader.cpp; throws Error
void find_joins(Kernel& kernel);                       // flow.cpp: sets join of every branch
void find_unfenced_registers(Kernel& kernel);          // flow.cpp
