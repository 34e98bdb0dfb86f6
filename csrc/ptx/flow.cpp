// What the graph of a kernel's branches tells, before any run.
#include <algorithm>
#include <set>

#include "kernel.h"

namespace {

struct BasicBlock { int first, last; vector<int> next; };  // last: its last instruction; next: blocks, n for the end

vector<BasicBlock> find_blocks(const vector<Instruction>& code) {
    int size = int(code.size());
    std::set<int> starts = {0};
    for (int i = 0; i < size; i++)
        if (code[size_t(i)].flow != Flow::next) {
            starts.insert(i + 1);
            if (code[size_t(i)].flow == Flow::branch) starts.insert(code[size_t(i)].target);
        }
    vector<int> first(starts.begin(), starts.end());
    if (first.back() == size) first.pop_back();
    int n = int(first.size());
    auto block_of = [&](int pc) {
        return pc >= size ? n : int(std::upper_bound(first.begin(), first.end(), pc) - first.begin()) - 1;
    };
    vector<BasicBlock> blocks;
    for (int b = 0; b < n; b++) {
        int last = (b + 1 < n ? first[size_t(b) + 1] : size) - 1;
        const Instruction& in = code[size_t(last)];
        vector<int> next;
        if (in.flow == Flow::branch) next.push_back(block_of(in.target));
        if (in.flow == Flow::exit) next.push_back(n);
        if (in.flow == Flow::next || in.guard >= 0) next.push_back(block_of(last + 1));
        blocks.push_back({first[size_t(b)], last, next});
    }
    return blocks;
}

}  // namespace

// The join of a branch is its immediate post-dominator: the nearest place that all paths from it pass.
void find_joins(Kernel& kernel) {
    vector<BasicBlock> blocks = find_blocks(kernel.code);
    size_t n = blocks.size();
    vector<vector<bool>> passes(n + 1, vector<bool>(n + 1, true));  // which blocks all paths from a block pass
    passes[n].assign(n + 1, false);
    passes[n][n] = true;
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t b = n; b--;) {
            vector<bool> both(n + 1, true);
            for (int s : blocks[b].next)
                for (size_t i = 0; i <= n; i++) both[i] = both[i] && passes[size_t(s)][i];
            both[b] = true;
            if (both != passes[b]) passes[b] = both, changed = true;
        }
    }
    for (size_t b = 0; b < n; b++) {
        Instruction& in = kernel.code[size_t(blocks[b].last)];
        if (in.flow != Flow::branch) continue;
        long most = 0;  // the nearest has all the others after it
        for (size_t i = 0; i < n; i++) {
            if (i == b || !passes[b][i]) continue;
            long after = std::count(passes[i].begin(), passes[i].end(), true);
            if (after > most) most = after, in.join = blocks[i].first;
        }
    }
}

// Between a wgmma.fence and a wgmma nothing orders a write of the wgmma's registers before it: a compiler of PTX may, but
// need not, put the write first. So this is a finding although no run shows it.
void find_unfenced_registers(Kernel& kernel) {
    auto is_product = [](const Instruction& in) { return in.name.rfind("wgmma.mma_async", 0) == 0; };
    if (std::none_of(kernel.code.begin(), kernel.code.end(), is_product)) return;
    vector<BasicBlock> blocks = find_blocks(kernel.code);
    using Writes = std::map<int, int>;  // register -> line of a write since the last fence
    vector<Writes> at_start(blocks.size());
    std::set<std::pair<int, int>> told;
    vector<size_t> work;
    for (size_t i = blocks.size(); i--;) work.push_back(i);
    while (!work.empty()) {
        size_t b = work.back();
        work.pop_back();
        Writes writes = at_start[b];
        for (int i = blocks[b].first; i <= blocks[b].last; i++) {
            const Instruction& in = kernel.code[size_t(i)];
            if (in.name.rfind("wgmma.fence", 0) == 0) writes.clear();
            else if (is_product(in)) {
                for (int r : in.list) {
                    auto it = writes.find(r);
                    if (it == writes.end() || !told.insert({in.line, it->second}).second) continue;
                    Finding f;
                    f.kind = "registers", f.instruction = in.name, f.line = in.line, f.count = 1;
                    f.text = "an operand is written on line " + std::to_string(it->second) + ": after the wgmma.fence";
                    f.where = in.loc < 0 ? "" : std::to_string(in.loc);
                    kernel.findings.push_back(f);
                }
            } else
                for (int r : in.results) writes[r] = in.line;
        }
        for (int s : blocks[b].next) {
            if (size_t(s) >= blocks.size()) continue;
            size_t before = at_start[size_t(s)].size();
            at_start[size_t(s)].insert(writes.begin(), writes.end());
            if (at_start[size_t(s)].size() != before) work.push_back(size_t(s));
        }
    }
}
