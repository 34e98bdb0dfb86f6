// Makes the instructions of one kernel out of opcodes and the text of operands.
#pragma once

#include <functional>

#include "opcode.h"

using Operands = vector<string>;

class Builder {
  public:
    Module& module;
    Kernel& kernel;
    std::map<string, Symbol> symbols;            // parameters and the kernel's own variables
    vector<std::map<string, Register>> scopes{1};  // registers, of each block of braces
    int line = 0, loc = -1;                      // of the instruction that is being read
    string name;                                 // its opcode
    int guard = -1;
    bool guard_negated = false;
    std::function<string(const string&)> find_label;  // the full name of one

    Builder(Module& m, Kernel& k) : module(m), kernel(k) {}

    Error fail(const string& what) const;

    void declare(const string& type, const string& names);  // .reg
    const Register* lookup(const string& name);             // null if it is no register
    const Symbol* symbol(const string& name);

    // Each returns a place in a warp's registers. width: bytes; a register of another width is an error.
    int source(const string& operand, int width, const string& type = "");  // a register or an immediate
    int result(const string& operand, int width);
    int predicate(const string& operand);
    int immediate(int width, u64 value);
    int temporary(int width);
    Address address(const string& operand, Space space);
    s64 number(const string& operand) const;  // that the instruction itself holds

    Instruction& emit(Run run, Class cls);  // run: null makes it unknown
    // A result and sources of these widths, in o.
    Instruction& emit_simple(Run run, Class cls, const Operands& a, int result_width, std::initializer_list<int> widths,
                             const string& type = "");

    void finish();  // places the immediates

  private:
    std::map<std::pair<int, u64>, int> immediates;
    vector<int> sources, results;  // of the instruction that is being read
    int temporaries = 0;
    int allot(int width);
};

// The number that text says. is_double, is_float: a plain number becomes those bits.
bool parse_number(const string& text, bool is_double, bool is_float, u64& out);

using ReadInstruction = void (*)(Builder&, Opcode, Operands);
ReadInstruction reader_of(const string& mnemonic);  // instructions.cpp; null if there is none
