// tensormap.replace and the copy of a tensor map from shared to global memory: maps that a kernel makes itself.
#include "tensor_map.h"

#include <cstddef>

#include "instructions.h"
#include "machine.h"

int element_bytes(int type) {  // u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz
    static const int BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    return type >= 0 && type < 13 ? BYTES[type] : 0;
}

// immediate: where the field is. size: its bytes. o: the value.
static void replace(Warp& w, const Instruction& in, u32 mask) {
    u64 a[32];
    find_addresses(w, in.address[0], a);
    for (int lane : Lanes(mask)) {
        u64 value = w.get(in.o[0], in.width[0], lane);
        u8* p = w.reach(in, a[lane] + u64(in.immediate), unsigned(in.size), lane, Access::store);
        if (p) std::memcpy(p, &value, size_t(in.size));
    }
}

static void read_replace(Builder& b, Opcode& op, const Operands& a) {
    struct Field { size_t at; int size, step; };
    static const std::map<string, Field> FIELDS = {
        {"global_address", {offsetof(TensorMap, address), 8, 0}},
        {"rank", {offsetof(TensorMap, last_axis), 1, 0}},
        {"elemtype", {offsetof(TensorMap, type), 1, 0}},
        {"interleave_layout", {offsetof(TensorMap, interleave), 1, 0}},
        {"swizzle_mode", {offsetof(TensorMap, swizzle), 1, 0}},
        {"fill_mode", {offsetof(TensorMap, fill), 1, 0}},
        {"box_dim", {offsetof(TensorMap, box), 4, 4}},
        {"global_dim", {offsetof(TensorMap, size), 4, 4}},
        {"element_stride", {offsetof(TensorMap, step), 4, 4}},
        {"global_stride", {offsetof(TensorMap, stride), 8, 8}}};
    op.drop({"tile", "b1024"});
    bool is_shared = op.take("shared::cta") || op.take("shared");
    if (!is_shared && !op.take("global")) throw op.unknown();
    string type = op.take_last();
    auto field = FIELDS.find(op.take_last());
    op.end();
    if (field == FIELDS.end() || a.size() != (field->second.step ? 3 : 2)) throw op.unknown();
    auto [at, size, step] = field->second;
    int w = bytes_of(type), value = b.source(a.back(), w);
    Space space = is_shared ? Space::shared : Space::global;
    Address address = b.address(a[0], space);
    Instruction& in = b.emit(replace, is_shared ? Class::shared : Class::global);
    in.space = space, in.size = size, in.o[0] = value, in.width[0] = w, in.address[0] = address;
    in.immediate = s64(at) + (step ? b.number(a[1]) * step : 0);
    if (is_shared) b.kernel.grain = std::min(b.kernel.grain, size);
}

static void publish(Warp& w, const Instruction& in, u32 mask) {  // address: to in global memory, from in shared
    u64 to[32], from[32];
    find_addresses(w, in.address[0], to);
    find_addresses(w, in.address[1], from);
    int lane = __builtin_ctz(mask);
    u8* source = w.shared(in, from[lane], 128, lane, Access::load);
    u8* target = w.global(in, to[lane], 128, lane, Access::store);
    if (source && target) std::memcpy(target, source, 128);
}

static void read_tensor_map(Builder& b, Opcode op, Operands a) {
    op.take_first();
    if (op.take("replace")) return read_replace(b, op, a);
    u64 bytes = 0;
    if (!op.take("cp_fenceproxy") || a.size() != 3 || !parse_number(a[2], false, false, bytes) || bytes != 128)
        throw op.unknown();
    op.drop({"global", "shared::cta", "tensormap::generic", "release", "gpu", "cta", "sys", "cluster", "sync", "aligned"});
    op.end();
    Address to = b.address(a[0], Space::global), from = b.address(a[1], Space::shared);
    Instruction& in = b.emit(publish, Class::async);
    in.address[0] = to, in.address[1] = from, in.converged = true;
}

void add_tensor_map(ReadTable& t) { t["tensormap"] = read_tensor_map; }
