// A 128-bit code of every row of a matrix, of the cells its numbers fall into or of the numbers themselves: rows are
// equal if and, but for chances of 2^-128, only if their codes are. Cell of v: (number of edges <= v) - 1.
#pragma once

#include "transfuse/parallel.h"
#include "transfuse/types.h"

namespace transfuse {

// The finaliser of splitmix64, a bijection.
inline uint64_t mix_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Column k adds `first` of its symbol to one half of the code, and `second` of that to the other.
inline uint64_t column_key(uint64_t k) { return mix_bits((k + 1) * 0x9e3779b97f4a7c15ull); }
inline uint64_t first_half(uint64_t symbol, uint64_t key) { return mix_bits(symbol ^ key); }
inline uint64_t second_half(uint64_t first) { return (first ^ (first >> 29)) * 0xd6e8feb86659fd93ull; }

struct RowCodesArgs {
  DType dtype = DType::f32;
  const void* x = nullptr;
  int64_t rows = 0, columns = 0, stride[2] = {0, 0};
  const float* edges = nullptr;  // ascending; nullptr: the numbers themselves, as doubles, -0 as 0
  int64_t edge_count = 0;
  bool wrap = false;          // what lies below all edges goes to the last cell, not to the first
  int64_t* codes = nullptr;   // (rows, 2)
  int64_t* counts = nullptr;  // NaNs, numbers below the first edge
};

struct RowCodesKernels {
  void (*run)(const RowCodesArgs&, const Parallel&);
};

// The kernels of the ISA level in use (see isa.h).
const RowCodesKernels& row_codes_kernels();

}  // namespace transfuse
