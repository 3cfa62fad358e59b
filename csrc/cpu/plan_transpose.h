// Transposing blocks of floats. Included once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace nascompile::CPU_CAPABILITY {
namespace {

#ifdef CPU_CAPABILITY_AVX512
constexpr int64_t kBlockSide = 16;  // of the squares that are transposed
#else
constexpr int64_t kBlockSide = 8;
#endif

#ifdef CPU_CAPABILITY_AVX512
// to[i * to_row + j] = from[j * from_row + i] for i < rows, j < columns, at most 16 of each.
inline void transpose_square(
    const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  const __mmask16 loaded = static_cast<__mmask16>((1u << rows) - 1);
  const __mmask16 stored = static_cast<__mmask16>((1u << columns) - 1);
  __m512 lines[16];
  __m512 pairs[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    lines[j] = j < columns ? _mm512_maskz_loadu_ps(loaded, from + j * from_row) : _mm512_setzero_ps();
  }
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    pairs[j] = _mm512_unpacklo_ps(lines[j], lines[j + 1]);
    pairs[j + 1] = _mm512_unpackhi_ps(lines[j], lines[j + 1]);
  }
  // lines[4 * k + i] has columns i, i + 4, i + 8, i + 12 of four lines
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d one = _mm512_castps_pd(pairs[j + half]);
      const __m512d other = _mm512_castps_pd(pairs[j + 2 + half]);
      lines[j + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other));
      lines[j + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
    }
  }
  constexpr int kEven = 0x88;
  constexpr int kOdd = 0xdd;
  const auto store = [&](int i, const __m512& line) {
    if (i < rows) {
      _mm512_mask_storeu_ps(to + i * to_row, stored, line);
    }
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(lines[i], lines[i + 4], kEven);
    const __m512 odd = _mm512_shuffle_f32x4(lines[i], lines[i + 4], kOdd);
    const __m512 even_too = _mm512_shuffle_f32x4(lines[i + 8], lines[i + 12], kEven);
    const __m512 odd_too = _mm512_shuffle_f32x4(lines[i + 8], lines[i + 12], kOdd);
    store(i, _mm512_shuffle_f32x4(even, even_too, kEven));
    store(i + 4, _mm512_shuffle_f32x4(odd, odd_too, kEven));
    store(i + 8, _mm512_shuffle_f32x4(even, even_too, kOdd));
    store(i + 12, _mm512_shuffle_f32x4(odd, odd_too, kOdd));
  }
}
#endif

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
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (!adds) {
        transpose_square(source, from_row, target, to_row, height, width);
        continue;
      }
#elif defined(CPU_CAPABILITY_AVX2)
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
