// What a launch tells: findings, slow accesses and counters, as JSON.
#include "report.h"

void Warp::find(const char* kind, const Instruction& in, int lane, const string& text) {
    string group = text.substr(0, text.find(':'));
    Finding& f = launch->findings[{kind, in.line, group}];
    if (f.count++) return;
    f.kind = kind, f.text = text, f.instruction = in.name, f.line = in.line, f.warp = id, f.lane = lane;
    f.where = in.loc < 0 ? "" : launch->kernel->places[size_t(in.loc)];
    std::copy(block->at, block->at + 3, f.block);
}

static string quoted(const string& s) {
    string r = "\"";
    for (char c : s) {
        if (c == '"' || c == '\\') r += '\\';
        r += c >= 0 && c < ' ' ? ' ' : c;
    }
    return r + "\"";
}

namespace {
class Object {  // of JSON
  public:
    Object& add(const string& name, const string& text) { return add_raw(name, quoted(text)); }
    Object& add(const string& name, u64 x) { return add_raw(name, std::to_string(x)); }
    Object& add_raw(const string& name, const string& json) {
        body += (body.empty() ? "" : ", ") + quoted(name) + ": " + json;
        return *this;
    }
    string text() const { return "{" + body + "}"; }

  private:
    string body;
};
}  // namespace

static string list_of(const vector<string>& items) {
    string s;
    for (const string& item : items) s += (s.empty() ? "" : ", ") + item;
    return "[" + s + "]";
}

string report_error(const string& text) { return Object().add("error", text).text(); }

static string report_finding(const Finding& f) {
    string block = list_of({std::to_string(f.block[0]), std::to_string(f.block[1]), std::to_string(f.block[2])});
    return Object()
        .add("kind", f.kind).add("text", f.text).add("instruction", f.instruction).add("where", f.where)
        .add("line", u64(f.line)).add("warp", u64(f.warp)).add("lane", u64(f.lane)).add("count", f.count)
        .add_raw("block", block).text();
}

static string report_slow(const Kernel& k) {
    vector<string> slow;
    for (const Instruction& in : k.code) {
        if (in.used_bytes * 10 >= in.sectors * 32 * 9 && in.cycles <= in.ideal_cycles) continue;
        slow.push_back(Object()
            .add("line", u64(in.line)).add("instruction", in.name)
            .add("where", in.loc < 0 ? "" : k.places[size_t(in.loc)])
            .add("sectors", in.sectors).add("bytes", in.used_bytes)
            .add("cycles", in.cycles).add("ideal_cycles", in.ideal_cycles).text());
    }
    return list_of(slow);
}

static string report_counters(const Launch& l) {
    Object o;
    o.add("blocks", l.blocks).add("instructions", l.instructions).add("lanes", l.lanes);
    for (int i = 0; i < N_CLASSES; i++) o.add(string("instructions.") + CLASS_NAMES[i], l.by_class[i]);
    return o.add("multiply_adds", l.macs)
        .add("loads", l.loads).add("load_sectors", l.load_sectors).add("load_bytes", l.load_bytes)
        .add("stores", l.stores).add("store_sectors", l.store_sectors).add("store_bytes", l.store_bytes)
        .add("shared_accesses", l.shared_accesses).add("shared_ideal_cycles", l.shared_ideal_cycles)
        .add("shared_cycles", l.shared_cycles).add("barriers", l.barriers).text();
}

string report_launch(const Launch& l) {
    vector<string> findings;
    for (const Finding& f : l.kernel->findings) findings.push_back(report_finding(f));
    for (auto& [key, f] : l.findings) findings.push_back(report_finding(f));
    return Object()
        .add_raw("findings", list_of(findings)).add_raw("slow", report_slow(*l.kernel))
        .add_raw("counters", report_counters(l)).text();
}
