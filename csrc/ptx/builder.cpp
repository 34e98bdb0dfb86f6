#include "builder.h"

#include <set>

Error Builder::fail(const string& what) const { return Error("line " + std::to_string(line) + ": " + name + ": " + what); }

int Builder::allot(int width) {
    int place = kernel.register_bytes;
    kernel.register_bytes += width == 8 ? 256 : width == 4 ? 128 : 64;
    return place;
}

void Builder::declare(const string& type, const string& names) {
    int width = bytes_of(type);
    if (width == 1) width = 2;
    for (const string& part : split(names, ',')) {
        string n = trim(part);
        size_t less = n.find('<');
        if (less == string::npos) {
            scopes.back()[n] = {allot(width), width};
            continue;
        }
        for (int i = 0, end = atoi(n.c_str() + less + 1); i < end; i++)
            scopes.back()[n.substr(0, less) + std::to_string(i)] = {allot(width), width};
    }
}

const Register* Builder::lookup(const string& n) {
    for (size_t i = scopes.size(); i--;) {
        auto it = scopes[i].find(n);
        if (it != scopes[i].end()) return &it->second;
    }
    static const std::set<string> SPECIAL = {  // run.cpp sets them
        "%tid.x",       "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",     "%ntid.z",     "%ctaid.x",
        "%ctaid.y",     "%ctaid.z",     "%nctaid.x",    "%nctaid.y",    "%nctaid.z",   "%laneid",     "%warpid",
        "%nwarpid",     "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%lanemask_eq",
        "%cluster_ctarank", "%cluster_nctarank", "%smid", "%dynamic_smem_size", "%total_smem_size"};
    if (!SPECIAL.count(n)) return nullptr;
    scopes[0][n] = {kernel.special[n] = allot(4), 4};
    return &scopes[0][n];
}

const Symbol* Builder::symbol(const string& n) {
    for (auto* table : {&symbols, &module.symbols}) {
        auto it = table->find(n);
        if (it != table->end()) return &it->second;
    }
    return nullptr;
}

bool parse_number(const string& s, bool is_double, bool is_float, u64& out) {
    size_t i = !s.empty() && s[0] == '-' ? 1 : 0;
    if (i >= s.size() || !isdigit(u8(s[i]))) return false;
    char mark = s.size() > i + 1 ? s[i + 1] : ' ';
    if (s[i] == '0' && strchr("fFdD", mark)) out = strtoull(s.c_str() + i + 2, nullptr, 16);
    else if (s[i] == '0' && (mark == 'x' || mark == 'X')) out = u64(strtoull(s.c_str() + i, nullptr, 16)) * (i ? ~0ull : 1);
    else if (s.find('.') != string::npos || is_float || is_double) {
        double x = strtod(s.c_str(), nullptr);
        out = is_double ? bits<u64>(x) : bits<u32>(float(x));
    } else out = u64(strtoull(s.c_str() + i, nullptr, 0)) * (i ? ~0ull : 1);
    return true;
}

int Builder::immediate(int width, u64 value) {
    if (width < 8) value &= (u64(1) << 8 * width) - 1;
    auto it = immediates.find({width, value});
    return it != immediates.end() ? it->second : immediates[{width, value}] = allot(width);
}

int Builder::source(const string& s, int width, const string& type) {
    if (const Register* r = lookup(s)) {
        if (r->width != width) throw fail("operand " + s + " has another width");
        sources.push_back(r->at);
        return r->at;
    }
    u64 x;
    if (parse_number(s, type == "f64", type == "f32", x)) return immediate(width, x);
    if (const Symbol* sym = symbol(s)) return immediate(width, sym->at);
    throw fail("operand " + s + " is not known");
}

int Builder::result(const string& s, int width) {
    const Register* r = lookup(s);
    if (!r || r->width != width) throw fail("result " + s + (r ? " has another width" : " is no register"));
    results.push_back(r->at);
    return r->at;
}

int Builder::predicate(const string& s) {
    const Register* r = lookup(s);
    if (!r || r->width) throw fail("operand " + s + " is no predicate");
    return r->at;
}

int Builder::temporary(int width) {
    string n = "?" + std::to_string(width) + "." + std::to_string(temporaries++ % 4);
    if (!scopes[0].count(n)) scopes[0][n] = {allot(width), width};
    return scopes[0][n].at;
}

Address Builder::address(const string& operand, Space space) {
    string s = trim(operand);
    if (s.size() < 2 || s[0] != '[') throw fail("address " + s);
    s = trim(s.substr(1, s.size() - 2));
    size_t plus = s.find('+');
    string base = trim(s.substr(0, plus));
    Address a;
    if (plus != string::npos) a.offset = strtoll(trim(s.substr(plus + 1)).c_str(), nullptr, 0);
    u64 x;
    if (const Register* r = lookup(base)) {
        a.base = r->at, a.width = r->width;
        sources.push_back(r->at);
    } else if (const Symbol* sym = symbol(base)) {
        a.offset += s64(sym->at);
        bool is_shared = sym->space == Space::shared || sym->space == Space::extern_shared;
        if (space == Space::generic && is_shared) a.offset += s64(SHARED_TAG);
    } else if (parse_number(base, false, false, x)) a.offset += s64(x);
    else throw fail("address " + s + " is not known");
    return a;
}

s64 Builder::number(const string& s) const {
    u64 x;
    if (!parse_number(s, false, false, x)) throw fail("operand " + s + " is no number");
    return s64(x);
}

Instruction& Builder::emit(Run run, Class cls) {
    if (!run) throw Opcode(name, line).unknown();
    Instruction in;
    in.run = run, in.cls = cls, in.guard = guard, in.guard_negated = guard_negated;
    in.line = line, in.loc = loc, in.name = name;
    in.sources.swap(sources), in.results.swap(results);
    kernel.code.push_back(std::move(in));
    return kernel.code.back();
}

Instruction& Builder::emit_simple(Run run, Class cls, const Operands& a, int result_width,
                                  std::initializer_list<int> widths, const string& type) {
    if (a.size() != widths.size() + 1) throw fail("has " + std::to_string(a.size()) + " operands");
    int o[8] = {result(a[0], result_width)}, i = 0;
    for (int width : widths) i++, o[i] = source(a[size_t(i)], width, type);
    Instruction& in = emit(run, cls);
    std::copy(o, o + i + 1, in.o);
    return in;
}

void Builder::finish() {
    kernel.initial_registers.assign(size_t(kernel.register_bytes), 0xff);
    for (auto& [key, place] : immediates)
        for (int lane = 0; lane < 32; lane++)
            std::memcpy(kernel.initial_registers.data() + place + lane * key.first, &key.second, size_t(key.first));
}
