#include "instructions.h"

ReadInstruction reader_of(const string& mnemonic) {
    static const ReadTable TABLE = [] {
        ReadTable t;
        for (auto add : {add_arithmetic, add_bits, add_compare, add_convert, add_access, add_copies, add_mbarrier,
                         add_matrix, add_wgmma, add_tensor_map, add_exchange, add_control})
            add(t);
        return t;
    }();
    auto it = TABLE.find(mnemonic);
    return it == TABLE.end() ? nullptr : it->second;
}
