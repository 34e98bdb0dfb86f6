#include "api.h"

#include <algorithm>

#include "report.h"

constexpr int MOST_FAILED_BLOCKS = 4;  // of a launch; the others are not run

static char* copy_text(const string& s) {
    char* p = static_cast<char*>(malloc(s.size() + 1));
    std::memcpy(p, s.c_str(), s.size() + 1);
    return p;
}

int ptx_abi_version() { return ABI_VERSION; }
void ptx_free(char* text) { free(text); }

void* ptx_load(const char* text, char** error) {
    auto module = std::make_unique<Module>();
    try {
        read_module(*module, text);
    } catch (const std::exception& e) {
        *error = copy_text(e.what());
        return nullptr;
    }
    return module.release();
}

void ptx_unload(void* module) { delete static_cast<Module*>(module); }

char* ptx_kernels(void* module) {
    string s;
    for (auto& [name, kernel] : static_cast<Module*>(module)->kernels) {
        s += name;
        for (const Parameter& p : kernel->params) s += " " + std::to_string(p.size);
        s += "\n";
    }
    return copy_text(s);
}

static void fill_launch(Launch& l, const Module& module, const Request& q) {
    const Kernel& k = *l.kernel;
    std::copy(q.grid, q.grid + 3, l.grid);
    std::copy(q.block, q.block + 3, l.block);
    l.late = q.late, l.reverse = q.reverse, l.check = q.check, l.limit = q.limit ? q.limit : ~u64(0);
    l.grain_shift = unsigned(__builtin_ctz(unsigned(k.grain)));
    l.shared_bytes = k.static_shared + q.dynamic_shared;
    l.params.assign(size_t(k.param_bytes) + 8, 0);
    for (u32 i = 0; i < q.n_args; i++)
        std::memcpy(l.params.data() + k.params[i].at, q.args[i], size_t(k.params[i].size));
    for (u32 i = 0; i < q.n_ranges; i++)
        if (q.ranges[2 * i] < q.ranges[2 * i + 1])
            l.ranges.push_back({q.ranges[2 * i], q.ranges[2 * i + 1], q.names[i]});
    for (auto& global : module.globals) {
        u64 a = reinterpret_cast<u64>(global->data());
        l.ranges.push_back({a, a + global->size(), "a variable of the module"});
    }
    std::sort(l.ranges.begin(), l.ranges.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
    for (const Instruction& in : k.code) in.range = 0, in.sectors = in.used_bytes = in.cycles = in.ideal_cycles = 0;
}

static void run_grid(Launch& l) {
    Block block(l);
    int failed = 0;
    for (u32 z = 0; z < l.grid[2]; z++)
        for (u32 y = 0; y < l.grid[1]; y++)
            for (u32 x = 0; x < l.grid[0]; x++) {
                block.start(x, y, z);
                l.blocks++;
                if (!block.run() && ++failed >= MOST_FAILED_BLOCKS) return;
            }
}

char* ptx_run(void* module, const char* name, const Request* request) {
    Module& m = *static_cast<Module*>(module);
    auto it = m.kernels.find(name);
    if (it == m.kernels.end()) return copy_text(report_error("no such kernel"));
    size_t wanted = it->second->params.size();
    if (request->n_args != wanted)
        return copy_text(report_error("the kernel takes " + std::to_string(wanted) + " parameters"));
    u64 threads = u64(request->block[0]) * request->block[1] * request->block[2];
    if (!threads || threads > 1024) return copy_text(report_error("a block has 1 to 1024 threads"));
    Launch l;
    l.kernel = it->second.get();
    fill_launch(l, m, *request);
    run_grid(l);
    return copy_text(report_launch(l));
}
