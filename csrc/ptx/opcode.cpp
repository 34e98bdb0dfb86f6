#include "opcode.h"

vector<string> split(const string& s, char at) {
    vector<string> parts(1);
    int depth = 0;
    for (char c : s) {
        if (c == '{' || c == '[' || c == '(') depth++;
        if (c == '}' || c == ']' || c == ')') depth--;
        if (c == at && !depth) parts.emplace_back();
        else parts.back() += c;
    }
    return parts;
}

string trim(const string& s) {
    size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
    return a == string::npos ? "" : s.substr(a, b - a + 1);
}

vector<string> braces(const string& operand) {
    string s = trim(operand);
    if (s.empty() || s[0] != '{') return {s};
    vector<string> parts = split(s.substr(1, s.size() - 2), ',');
    for (string& part : parts) part = trim(part);
    return parts;
}

int bytes_of(const string& type) {
    if (type == "pred") return 0;
    if (type == "bf16" || type == "f16" || type == "e4m3x2" || type == "e5m2x2") return 2;
    if (type == "bf16x2" || type == "f16x2" || type == "tf32") return 4;
    size_t digits = type.find_first_of("0123456789");
    int n = digits == string::npos ? 0 : atoi(type.c_str() + digits);
    if (n != 8 && n != 16 && n != 32 && n != 64) throw Error("unknown type ." + type);
    return n / 8;
}

Opcode::Opcode(const string& text, int line_of_text) : whole(text), line(line_of_text), parts(split(text, '.')) {
    parts.erase(std::remove(parts.begin(), parts.end(), ""), parts.end());
}

bool Opcode::take(const string& part) {
    auto it = std::find(parts.begin(), parts.end(), part);
    if (it == parts.end()) return false;
    parts.erase(it);
    return true;
}

string Opcode::take_any(std::initializer_list<const char*> of) {
    for (auto part : of) if (take(part)) return part;
    return "";
}

void Opcode::drop(std::initializer_list<const char*> of) {
    for (auto part : of) while (take(part)) {}
}

void Opcode::drop_prefix(const char* prefix) {
    parts.erase(std::remove_if(parts.begin(), parts.end(), [&](const string& s) { return !s.rfind(prefix, 0); }),
                parts.end());
}

string Opcode::take_first() {
    if (parts.empty()) throw unknown();
    string s = parts.front();
    parts.erase(parts.begin());
    return s;
}

string Opcode::take_last() {
    if (parts.empty()) throw unknown();
    string s = parts.back();
    parts.pop_back();
    return s;
}
