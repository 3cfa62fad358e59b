// Vectors of channels, and the order in which convolutions visit pixels. Included once per instruction set.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../plan.h"
#include "../plan_ahead.h"
#include "plan_inline.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLane = Vec::size();
#ifdef CPU_CAPABILITY_AVX512
constexpr bool kWide = true;  // 32 registers
#else
constexpr bool kWide = false;  // 16
#endif

// Vectors in registers. Built all at once: arrays of more than eight that begin as zeros would begin in memory.
template <int kCount>
struct Vecs {
  Vec at[kCount];

  Vec& operator[](int number) {
    return at[number];
  }
  const Vec& operator[](int number) const {
    return at[number];
  }
};

template <typename Make, int... kNumbers>
NASCOMPILE_INLINE Vecs<sizeof...(kNumbers)> make_each(const Make& make, std::integer_sequence<int, kNumbers...>) {
  return {{make(kNumbers)...}};
}

// make(number) for every number
template <int kCount, typename Make>
NASCOMPILE_INLINE Vecs<kCount> registers(const Make& make) {
  return make_each(make, std::make_integer_sequence<int, kCount>());
}

// The vectors that lie `step` floats apart.
template <int kCount>
NASCOMPILE_INLINE Vecs<kCount> load_each(const float* from, int64_t step) {
  return registers<kCount>([=](int number) { return Vec::loadu(from + number * step); });
}

// A tile (a block of rows that later work reads again) stays within the nearest cache: 16 KiB.
constexpr int64_t kTileFloats = 4096;
// Sums of squares are taken in fp32 over so many pixels, then added up in fp64.
constexpr int64_t kTilePixels = 256;

// Rows of a tile: as many as fit `pixels`, at least one, all tiles of an image about equally high.
inline int64_t tile_rows(int64_t pixels, int64_t height, int64_t width) {
  const int64_t most = std::max<int64_t>(pixels / width, 1);
  const int64_t tiles = (height + most - 1) / most;
  return (height + tiles - 1) / tiles;
}

constexpr int64_t kProducts = 16;  // of vectors, in the time of a cache line from memory

// A rectangle of pixels of two maps: what is read and what is written. All distances are in floats.
struct Rectangle {
  const float* source;
  int64_t source_row, source_pixel;
  float* target;
  int64_t target_row, target_pixel;
  int64_t rows, columns;
  plan::Ahead* ahead;

  int64_t pixels() const {
    return rows * columns;
  }
  // After so many products of vectors: fetches what the memory has had time for.
  NASCOMPILE_INLINE void fetch(int64_t products) const {
    ahead->fetch((products + kProducts - 1) / kProducts);
  }
  // The same where no vector has to stay in a register.
  NASCOMPILE_INLINE void fetch_on(int64_t products) const {
    ahead->turn();
    fetch(products);
  }
};

// Zero in one vector of channels of the target.
inline void clear(const Rectangle& all) {
  for (int64_t row = 0; row < all.rows; ++row) {
    for (int64_t column = 0; column < all.columns; ++column) {
      Vec(0.0f).store(all.target + row * all.target_row + column * all.target_pixel);
    }
  }
}

// Visits a rectangle row by row, a few pixels at a time: blocks go on across the ends of rows.
class Walk {
 public:
  explicit Walk(const Rectangle& all)
      : source_(all.source),
        target_(all.target),
        source_pixel_(all.source_pixel),
        target_pixel_(all.target_pixel),
        source_turn_(all.source_row - all.columns * all.source_pixel),
        target_turn_(all.target_row - all.columns * all.target_pixel),
        columns_(all.columns),
        left_(all.columns) {}

  template <int kPixels>
  void next(const float* (&source)[kPixels], float* volatile (&target)[kPixels]) {
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      source[p] = source_;
      target[p] = target_;
      source_ += source_pixel_;
      target_ += target_pixel_;
      if (--left_ == 0) {
        left_ = columns_;
        source_ += source_turn_;
        target_ += target_turn_;
      }
    }
  }

 private:
  const float* source_;
  float* target_;
  int64_t source_pixel_, target_pixel_, source_turn_, target_turn_, columns_, left_;
};

// `visit(first, count)` for blocks of kMost pixels, then for the rest in blocks of 4, 2 and 1; count is a constant.
template <int kMost, typename Visit>
inline void blocks(int64_t pixels, const Visit& visit) {
  int64_t at = 0;
  for (; at + kMost <= pixels; at += kMost) {
    visit(at, std::integral_constant<int, kMost>());
  }
  if constexpr (kMost > 8) {
    if (at + 8 <= pixels) {
      visit(at, std::integral_constant<int, 8>());
      at += 8;
    }
  }
  if constexpr (kMost > 4) {
    if (at + 4 <= pixels) {
      visit(at, std::integral_constant<int, 4>());
      at += 4;
    }
  }
  if (at + 2 <= pixels) {
    visit(at, std::integral_constant<int, 2>());
    at += 2;
  }
  if (at < pixels) {
    visit(at, std::integral_constant<int, 1>());
  }
}

// Sums and sums of squares per channel, over one tile in fp32 and over all in fp64. In a tile they are taken about its
// first pixels, so that a variance much smaller than the mean's square keeps its digits.
class Moments {
 public:
  // `memory`: 3 * channels floats. `sums`: [sum][sum of squares], or null where no moments are wanted.
  Moments(float* memory, double* sums, int64_t channels) : memory_(memory), sums_(sums), channels_(channels) {}

  // Adds kPixels vectors of the channels from `channel` on; `first`: the tile's first block.
  template <int kPixels>
  NASCOMPILE_INLINE void add(const Vecs<kPixels>& values, int64_t channel, bool first) const {
    float* const memory = memory_ + channel;
    const Vec shift = first ? mean(values) : Vec::loadu(memory);
    Vec sum(0.0f);
    Vec square(0.0f);
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      const Vec value = values[p] - shift;
      sum = sum + value;
      square = at::vec::fmadd(value, value, square);
    }
    if (first) {
      shift.store(memory);
    } else {
      sum = sum + Vec::loadu(memory + channels_);
      square = square + Vec::loadu(memory + 2 * channels_);
    }
    sum.store(memory + channels_);
    square.store(memory + 2 * channels_);
  }

  // The end of a tile of so many pixels.
  void finish(int64_t pixels) const {
    if (sums_ == nullptr) {
      return;
    }
    for (int64_t channel = 0; channel < channels_; ++channel) {
      const double shift = memory_[channel];
      const double sum = memory_[channels_ + channel];
      const double whole = sum + static_cast<double>(pixels) * shift;
      sums_[channel] += whole;
      sums_[channels_ + channel] += memory_[2 * channels_ + channel] + shift * (sum + whole);
    }
  }

  explicit operator bool() const {
    return sums_ != nullptr;
  }

 private:
  // of several, for one of them may be far from all others: the only one that a ReLU let through
  template <int kPixels>
  NASCOMPILE_INLINE static Vec mean(const Vecs<kPixels>& values) {
    Vec sum = values[0];
#pragma GCC unroll 16
    for (int p = 1; p < kPixels; ++p) {
      sum = sum + values[p];
    }
    return sum * Vec(1.0f / kPixels);
  }

  float* memory_;
  double* sums_;
  int64_t channels_;
};

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
