// What reads each instruction, by its mnemonic.
#pragma once

#include "builder.h"

using ReadTable = std::map<string, ReadInstruction>;

void add_arithmetic(ReadTable& table);  // add fma ex2 ...       arithmetic.cpp
void add_bits(ReadTable& table);        // and shl prmt ...      bits.cpp
void add_compare(ReadTable& table);     // setp selp ...         compare.cpp
void add_convert(ReadTable& table);     // cvt mov cvta ...      convert.cpp
void add_access(ReadTable& table);      // ld st atom red        access.cpp
void add_copies(ReadTable& table);      // cp.async, bulk copies copies.cpp, bulk.cpp
void add_mbarrier(ReadTable& table);    // mbarrier              mbarrier.cpp
void add_matrix(ReadTable& table);      // mma ldmatrix ...      matrix.cpp
void add_wgmma(ReadTable& table);       // wgmma                 wgmma.cpp
void add_tensor_map(ReadTable& table);  // tensormap             tensor_map.cpp
void add_exchange(ReadTable& table);    // shfl vote redux ...   exchange.cpp
void add_control(ReadTable& table);     // bra bar fence ...     control.cpp
