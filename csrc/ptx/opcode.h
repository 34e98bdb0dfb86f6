// The text of an instruction, in parts.
#pragma once

#include <algorithm>

#include "kernel.h"

vector<string> split(const string& s, char at);  // outside of brackets
string trim(const string& s);
vector<string> braces(const string& operand);  // "{a, b}" -> a, b
int bytes_of(const string& type);              // "b32" -> 4; 0 for "pred"

// The parts of an opcode are taken one by one. One that nobody takes makes the instruction unknown.
struct Opcode {
    string whole;
    int line;
    vector<string> parts;

    Opcode(const string& text, int line_of_text);
    Error unknown() const { return Error("line " + std::to_string(line) + ": unknown instruction: " + whole); }
    void end() const { if (!parts.empty()) throw unknown(); }
    bool take(const string& part);
    string take_any(std::initializer_list<const char*> of);  // "" if none is there
    void drop(std::initializer_list<const char*> of);
    void drop_prefix(const char* prefix);
    string take_first();
    string take_last();
};
