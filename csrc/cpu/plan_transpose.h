// Transposing blocks of floats. Included once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace nascompile::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockSide = 8;  // of the squares that are transposed

// to[i * to_row + j] (+)= from[j * from_row + i] for i < rows, j < columns
template <bool adds>
void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const float value = from[j * from_row + i];
      to[i * to_row + j] = adds ? to[i * to_row + j] + value : value;
    }
  }
}

// The same, in squares: the vectors of one are transposed in registers.
template <bool adds>
void transpose_all(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kBlockSide) {
    for (int64_t i = 0; i < rows; i += kBlockSide) {
      const float* source = from + j * from_row + i;
      float* target = to + i * to_row + j;
      const int64_t height = std::min(kBlockSide, rows - i);
      const int64_t width = std::min(kBlockSide, columns - j);
#if defined(CPU_CAPABILITY_AVX2)
      if (!adds && height == kBlockSide && width == kBlockSide) {
        at::vec::transpose_mxn<float, kBlockSide, kBlockSide>(source, from_row, target, to_row);
        continue;
      }
#endif
      transpose<adds>(source, from_row, target, to_row, height, width);
    }
  }
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
