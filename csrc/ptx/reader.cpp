// Reads the text of PTX: directives, variables, kernels and their statements.
#include <optional>

#include "builder.h"

namespace {

bool is_word(char c) { return isalnum(u8(c)) || strchr("_$%.", c); }

vector<string> words_of(const string& s) {
    vector<string> words;
    for (size_t i = 0; i < s.size();) {
        size_t j = i;
        while (j < s.size() && !isspace(u8(s[j]))) j++;
        if (j > i) words.push_back(s.substr(i, j - i));
        i = j + 1;
    }
    return words;
}

class Text {  // with a place in it, and the line of that
  public:
    explicit Text(const string& t) : text(t) {}
    size_t at = 0;
    int line = 1;

    bool ended() const { return at >= text.size(); }
    char peek(size_t ahead = 0) const { return at + ahead < text.size() ? text[at + ahead] : '\0'; }
    void next() { line += text[at++] == '\n'; }
    bool is_comment() const { return text.compare(at, 2, "//") == 0 || text.compare(at, 2, "/*") == 0; }
    void skip_comment() {
        bool to_end_of_line = text[at + 1] == '/';
        size_t end = to_end_of_line ? text.find('\n', at) : text.find("*/", at);
        end = end == string::npos ? text.size() : end + (to_end_of_line ? 0 : 2);
        while (at < end) next();
    }
    void skip() {  // spaces and comments
        while (!ended())
            if (isspace(u8(text[at]))) next();
            else if (is_comment()) skip_comment();
            else break;
    }
    string word() {
        size_t start = at;
        while (!ended() && is_word(text[at])) at++;
        return text.substr(start, at - start);
    }
    string rest_of_line() {
        size_t start = at;
        while (!ended() && text[at] != '\n') at++;
        return text.substr(start, at - start);
    }
    string until(char stop) {  // without comments; beyond the character
        string s;
        while (!ended() && text[at] != stop)
            if (is_comment()) skip_comment();
            else s += text[at], next();
        if (!ended()) at++;
        return s;
    }
    void skip_braces() {
        int depth = 0;
        do {
            depth += text[at] == '{' ? 1 : text[at] == '}' ? -1 : 0;
            next();
        } while (depth && !ended());
    }

  private:
    const string& text;
};

struct Variable {
    Space space = Space::global;
    bool is_extern = false;
    u64 align = 1, bytes = 1;
    int width = 1;  // of an element
    string name;
    vector<string> values;
};

// .shared .align 16 .b8 name[1024]; or .global .align 4 .b32 name[2] = {1, 2}; or .param .u64 name
Variable read_variable(const string& statement) {
    Variable v;
    size_t equals = statement.find('=');
    vector<string> words = words_of(statement.substr(0, equals));
    string name;
    for (size_t i = 0; i < words.size(); i++) {
        const string& w = words[i];
        if (w == ".extern") v.is_extern = true;
        else if (w == ".shared") v.space = Space::shared;
        else if (w == ".local") v.space = Space::local;
        else if (w == ".align" && i + 1 < words.size()) v.align = u64(atoi(words[++i].c_str()));
        else if (w[0] != '.') name += w;
        else if (w == ".param") v.space = Space::param;
        else if (w == ".ptr") i++;  // and what it points to
        else if (w != ".global" && w != ".const" && w != ".visible" && w != ".weak") v.width = bytes_of(w.substr(1));
    }
    size_t open = name.find('[');
    v.name = name.substr(0, open);
    for (size_t p = open; p != string::npos; p = name.find('[', p + 1)) v.bytes *= u64(atoll(name.c_str() + p + 1));
    v.bytes *= u64(v.width);
    v.align = std::max(v.align, u64(v.width));
    if (equals != string::npos) v.values = braces(trim(statement.substr(equals + 1)));
    return v;
}

u64 place(const Variable& v, u64& end) {
    u64 at = (end + v.align - 1) / v.align * v.align;
    end = at + v.bytes;
    return at;
}

class Reader {
  public:
    Reader(Module& m, const string& t) : module(m), text(t) {}
    void read();

  private:
    Module& module;
    Text text;
    std::map<int, string> files;
    std::optional<Builder> builder;  // of the kernel that is being read
    std::map<string, int> labels;
    vector<string> label_scopes;  // labels of inner braces are their own

    void read_file();
    void add_variable(const Variable& v);
    void read_entry();
    void read_body(bool only_labels);
    void read_statement(bool only_labels);
    void read_directive(bool only_labels);
    void read_instruction(const string& statement);
    void add_location(const string& s);
    void finish_kernel();
    void name_places();
    string find_label(const string& name) const;
};

void Reader::read_file() {
    string s = text.rest_of_line();
    size_t quote = s.find('"');
    if (quote != string::npos) files[atoi(s.c_str())] = s.substr(quote + 1, s.find('"', quote + 1) - quote - 1);
}

void Reader::add_variable(const Variable& v) {
    auto& table = builder ? builder->symbols : module.symbols;
    if (v.is_extern && v.space == Space::shared) table[v.name] = {Space::extern_shared, 0};  // after all others
    else if (v.space == Space::shared)
        table[v.name] = {Space::shared, place(v, builder ? builder->kernel.static_shared : module.static_shared)};
    else if (v.space == Space::local) {
        u64 end = u64(builder->kernel.local_bytes);
        table[v.name] = {Space::local, place(v, end)};
        builder->kernel.local_bytes = int((end + 15) / 16 * 16);
    } else {
        module.globals.push_back(std::make_unique<vector<u8>>(v.bytes + 16, 0));
        vector<u8>& memory = *module.globals.back();
        for (size_t i = 0; i < v.values.size() && (i + 1) * size_t(v.width) <= v.bytes; i++) {
            u64 x = 0;
            parse_number(v.values[i], v.width == 8 && v.values[i].find('.') != string::npos, false, x);
            std::memcpy(memory.data() + i * size_t(v.width), &x, size_t(v.width));
        }
        table[v.name] = {Space::global, reinterpret_cast<u64>(memory.data())};
    }
}

string Reader::find_label(const string& name) const {
    for (size_t i = label_scopes.size(); i-- > 1;)
        if (labels.count(label_scopes[i] + name)) return label_scopes[i] + name;
    return name;
}

void Reader::add_location(const string& s) {  // file line column, function_name ..., inlined_at file line column
    Place p;
    sscanf(s.c_str(), "%d %d", &p.file, &p.line);
    size_t i = s.find("inlined_at");
    if (i != string::npos) sscanf(s.c_str() + i + 10, "%d %d", &p.outer_file, &p.outer_line);
    builder->kernel.locs.push_back(p);
    builder->loc = int(builder->kernel.locs.size()) - 1;
}

void Reader::read_instruction(const string& statement) {
    Builder& b = *builder;
    string s = trim(statement);
    b.guard = -1, b.guard_negated = false;
    if (s[0] == '@') {
        size_t end = s.find_first_of(" \t");
        b.name = s.substr(0, end), b.guard_negated = s[1] == '!';
        b.guard = b.predicate(s.substr(1 + b.guard_negated, end - 1 - b.guard_negated));
        s = trim(s.substr(end));
    }
    size_t end = s.find_first_of(" \t{[");
    b.name = s.substr(0, end);
    Operands operands;
    if (end != string::npos) for (const string& operand : split(s.substr(end), ',')) operands.push_back(trim(operand));
    Opcode op(b.name, b.line);
    ReadInstruction read = op.parts.empty() ? nullptr : reader_of(op.parts[0]);
    if (!read) throw op.unknown();
    try {
        read(b, op, operands);
    } catch (const std::out_of_range&) {
        throw b.fail("has " + std::to_string(operands.size()) + " operands");
    }
}

void Reader::read_directive(bool only_labels) {
    size_t start = text.at;
    int start_line = text.line;
    string directive = text.word();
    if (directive == ".loc") {
        string s = text.rest_of_line();
        if (!only_labels) add_location(s);
    } else if (directive == ".file") text.rest_of_line();
    else if (directive == ".pragma") text.until(';');
    else if (directive == ".reg") {
        string s = trim(text.until(';'));
        size_t end = s.find_first_of(" \t");
        if (!only_labels) builder->declare(s.substr(1, end - 1), s.substr(end));
    } else {
        text.at = start, text.line = start_line;
        string s = text.until(';');
        if (!only_labels) add_variable(read_variable(s));
    }
}

void Reader::read_statement(bool only_labels) {
    if (text.peek() == '.') return read_directive(only_labels);
    size_t start = text.at;
    string word = text.word();
    while (text.peek() == ' ' || text.peek() == '\t') text.at++;
    if (!word.empty() && text.peek() == ':' && text.peek(1) != ':') {
        text.at++;
        labels[label_scopes.back() + word] = int(builder->kernel.code.size());
        return;
    }
    text.at = start;
    string s = text.until(';');
    if (!only_labels && !trim(s).empty()) read_instruction(s);
}

void Reader::read_body(bool only_labels) {
    int depth = 0, n_scopes = 0;
    label_scopes.assign(1, "");
    do {
        text.skip();
        if (text.ended()) throw Error("line " + std::to_string(text.line) + ": the kernel has no end");
        builder->line = text.line;
        if (text.peek() == '{') {
            text.at++;
            if (depth++) {
                label_scopes.push_back(std::to_string(++n_scopes) + ":");
                builder->scopes.push_back({});
            }
        } else if (text.peek() == '}') {
            text.at++;
            if (--depth) label_scopes.pop_back(), builder->scopes.pop_back();
        } else read_statement(only_labels);
    } while (depth);
}

void Reader::finish_kernel() {
    Builder& b = *builder;
    Kernel& k = b.kernel;
    b.guard = -1, b.line = text.line, b.name = "exit";
    reader_of("exit")(b, Opcode("exit", b.line), {});
    b.finish();
    for (auto* table : {&b.symbols, &module.symbols})
        for (auto& [name, s] : *table)
            if (s.space == Space::extern_shared && k.static_shared)
                throw Error(k.name + ": extern shared memory beside static: " + name);
    for (Instruction& in : k.code) {
        if (in.flow != Flow::branch) continue;
        auto it = labels.find(in.label);
        if (it == labels.end()) throw Error("line " + std::to_string(in.line) + ": no label " + in.label);
        in.target = it->second;
    }
    find_joins(k);
    find_unfenced_registers(k);
}

void Reader::read_entry() {
    text.skip();
    auto kernel = std::make_unique<Kernel>();
    kernel->name = text.word();
    kernel->static_shared = module.static_shared;
    builder.emplace(module, *kernel);
    builder->find_label = [this](const string& name) { return find_label(name); };
    labels.clear();
    text.skip();
    if (text.peek() == '(') {
        text.at++;
        for (const string& p : split(text.until(')'), ',')) {
            if (trim(p).empty()) continue;
            Variable v = read_variable(p);
            u64 end = u64(kernel->param_bytes), at = place(v, end);
            kernel->params.push_back({int(at), int(v.bytes)});
            kernel->param_bytes = int(end);
            builder->symbols[v.name] = {Space::param, at};
        }
    }
    for (text.skip(); text.peek() != '{'; text.skip()) {  // .maxntid and the like
        if (text.peek() == ';') {
            text.at++;
            return builder.reset();
        }
        if (text.ended()) throw Error("line " + std::to_string(text.line) + ": the kernel has no body");
        text.next();
    }
    size_t start = text.at;
    int line = text.line;
    read_body(true);  // labels first: branches go forward, too
    text.at = start, text.line = line;
    read_body(false);
    finish_kernel();
    builder.reset();
    module.kernels[kernel->name] = std::move(kernel);
}

void Reader::name_places() {  // the files come last
    auto base = [&](int n) {
        string path = files.count(n) ? files[n] : "?";
        return path.substr(path.find_last_of('/') + 1);
    };
    for (auto& [name, kernel] : module.kernels) {
        for (const Place& p : kernel->locs) {
            string outer = p.outer_file ? " in " + base(p.outer_file) + ":" + std::to_string(p.outer_line) : "";
            kernel->places.push_back(base(p.file) + ":" + std::to_string(p.line) + outer);
        }
        for (Finding& f : kernel->findings) f.where = f.where.empty() ? "" : kernel->places[size_t(stoi(f.where))];
    }
}

void Reader::read() {
    for (text.skip(); !text.ended(); text.skip()) {
        int line = text.line;
        if (text.peek() != '.') throw Error("line " + std::to_string(line) + ": unexpected " + text.rest_of_line());
        size_t start = text.at;
        string directive = text.word();
        if (directive == ".visible" || directive == ".weak" || directive == ".extern") {
            text.skip();
            directive = text.peek() == '.' ? text.word() : directive;
        }
        if (directive == ".entry") read_entry();
        else if (directive == ".file") read_file();
        else if (directive == ".version" || directive == ".target" || directive == ".address_size" || directive == ".loc")
            text.rest_of_line();
        else if (directive == ".section") {
            while (!text.ended() && text.peek() != '{') text.next();
            text.skip_braces();
        } else if (directive == ".func") {  // no call is known, so nobody needs its body
            while (!text.ended() && text.peek() != '{' && text.peek() != ';') text.next();
            if (text.peek() == '{') text.skip_braces();
            else text.at++;
        } else {
            text.at = start, text.line = line;
            add_variable(read_variable(text.until(';')));
        }
    }
    name_places();
}

}  // namespace

void read_module(Module& module, const string& text) { Reader(module, text).read(); }
