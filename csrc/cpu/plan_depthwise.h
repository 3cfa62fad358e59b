// Depthwise convolution of a rectangle of pixels, and the gradient of its weights. Included once per instruction set.
#pragma once

#include <cstdlib>
#include <numeric>

#include "plan_pixels.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

// Taps in one row of a window: their weights, or their sums, are in registers at once.
constexpr int kMostTaps = 7;

// The taps of a kernel as rows of `size`, which read source columns `dilation` units apart; neighbouring pixels read
// `stride` units apart. So a column that is loaded once serves several pixels. `reversed`: the first tap of a row reads
// the last column.
struct Window {
  const plan::Tap* taps;
  int64_t rows;
  int size;
  bool reversed;
  int64_t unit;  // floats
  int stride, dilation;

  const plan::Tap& tap(int64_t row, int number) const {
    return taps[row * size + (reversed ? size - 1 - number : number)];
  }
};

// How many taps from the first on are equally far apart; the whole list is made of such runs, or the answer is one.
inline int64_t run_length(const plan::Tap* taps, int64_t count) {
  if (count < 2) {
    return 1;
  }
  const int64_t step = taps[1].offset - taps[0].offset;
  const auto follows = [&](int64_t k) { return taps[k].offset - taps[k - 1].offset == step; };
  int64_t length = 2;
  while (length < count && follows(length)) {
    ++length;
  }
  if (count % length != 0) {
    return 1;
  }
  for (int64_t k = length; k < count; ++k) {
    if (k % length != 0 && !follows(k)) {
      return 1;
    }
  }
  return length;
}

inline Window find_window(const plan::Tap* taps, int64_t count, int64_t source_pixel) {
  const Window single{taps, count, 1, false, source_pixel, 1, 1};
  int64_t size = run_length(taps, count);
  if (size == 1) {
    return single;
  }
  const int64_t step = taps[1].offset - taps[0].offset;
  const int64_t unit = std::gcd(std::abs(step), source_pixel);
  const int64_t stride = source_pixel / unit;
  const int64_t dilation = std::abs(step) / unit;
  // what has a kernel; 3 x 1 kernels read along columns and have not
  if (stride * dilation < 1 || stride * dilation > 2) {
    return single;
  }
  int64_t part = std::min<int64_t>(size, kMostTaps);
  while (size % part != 0) {
    --part;
  }
  if (part == 1) {
    return single;
  }
  return {taps, count / part, static_cast<int>(part), step < 0, unit, static_cast<int>(stride), static_cast<int>(dilation)};
}

// `run(size, stride, dilation)` with the window's numbers as constants.
template <int kSize, typename Run>
inline void switch_geometry(const Window& window, const Run& run) {
  constexpr std::integral_constant<int, kSize> size;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  if (window.stride == 2) {
    run(size, two, one);
  } else if (window.dilation == 2) {
    run(size, one, two);
  } else {
    run(size, one, one);
  }
}

template <typename Run>
inline void switch_window(const Window& window, const Run& run) {
  constexpr std::integral_constant<int, 1> one;
  switch (window.size) {
    case 2:
      return switch_geometry<2>(window, run);
    case 3:
      return switch_geometry<3>(window, run);
    case 4:
      return switch_geometry<4>(window, run);
    case 5:
      return switch_geometry<5>(window, run);
    case 6:
      return switch_geometry<6>(window, run);
    case 7:
      return switch_geometry<7>(window, run);
    default:
      return run(one, one, one);
  }
}

// Some rows of a window: where each begins to read, and a vector of channels for every tap, one after another.
struct Rows {
  // the longest list at once; 49 taps are the largest kernel in use
  static constexpr int64_t kMost = 64;

  int64_t count;
  int64_t offsets[kMost];
  alignas(64) float vectors[kMost * kLane];
};

// `visit(first)` for the rows of a window, as many at a time as `rows` holds; their offsets are filled in.
template <typename Visit>
inline void for_rows(const Window& window, Rows& rows, const Visit& visit) {
  const int64_t most = Rows::kMost / window.size;
  for (int64_t first = 0; first < window.rows; first += most) {
    rows.count = std::min(most, window.rows - first);
    for (int64_t row = 0; row < rows.count; ++row) {
      rows.offsets[row] = window.tap(first + row, 0).offset;
    }
    visit(first);
  }
}

// `visit(vector, weight)` for every tap of the rows from `first` on.
template <typename Visit>
inline void for_taps(const Window& window, Rows& rows, int64_t first, const Visit& visit) {
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int tap = 0; tap < window.size; ++tap) {
      visit(rows.vectors + (row * window.size + tap) * kLane, window.tap(first + row, tap).weight);
    }
  }
}

// `visit(value, tap, pixel)` for all that meet, column by column; the numbers are constants once the loops are unrolled.
template <int kSize, int kStride, int kDilation, int kPixels, typename Visit>
NASCOMPILE_INLINE void for_columns(const float* source, int64_t unit, const Visit& visit) {
  constexpr int kColumns = kStride * (kPixels - 1) + kDilation * (kSize - 1) + 1;
#pragma GCC unroll 32
  for (int column = 0; column < kColumns; ++column) {
    const Vec value = Vec::loadu(source);
    source += unit;
#pragma GCC unroll 7
    for (int tap = 0; tap < kSize; ++tap) {
      const int reach = column - kDilation * tap;
      if (reach >= 0 && reach % kStride == 0 && reach / kStride < kPixels) {
        visit(value, tap, reach / kStride);
      }
    }
  }
}

// 16 registers hold fewer pixels beside seven weights
template <int kSize>
constexpr int kPixelsOf = kWide || kSize < 6 ? 8 : 4;

// `visit(source, target, count)` for blocks of neighbouring pixels; count is a constant.
template <int kSize, typename Visit>
inline void for_blocks(const Rectangle& all, const Visit& visit) {
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* const source = all.source + row * all.source_row;
    float* const target = all.target + row * all.target_row;
    blocks<kPixelsOf<kSize>>(all.columns, [&](int64_t at, auto count) {
      visit(source + at * all.source_pixel, target + at * all.target_pixel, count);
    });
  }
}

// target[c] (+)= sum over taps of weights[tap.weight, c] * source[tap.offset + c]
struct Depthwise {
  const plan::Tap* taps;
  int64_t count;
  const float* weights;
  int64_t channels;
  bool adds;
};

// One vector of channels of kPixels neighbouring pixels.
template <int kSize, int kStride, int kDilation, int kPixels>
NASCOMPILE_INLINE void depthwise_block(
    const Rows& rows, int64_t unit, bool adds, const float* source, float* target, int64_t target_pixel) {
  Vec sums[kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    sums[p] = adds ? Vec::loadu(target + p * target_pixel) : Vec(0.0f);
  }
  const float* weights = rows.vectors;
  for (int64_t row = 0; row < rows.count; ++row) {
    Vec weight[kSize];
#pragma GCC unroll 7
    for (int t = 0; t < kSize; ++t) {
      weight[t] = Vec::loadu(weights + t * kLane);
    }
    weights += kSize * kLane;
    for_columns<kSize, kStride, kDilation, kPixels>(
        source + rows.offsets[row], unit, [&](const Vec& value, int tap, int pixel) {
          sums[pixel] = at::vec::fmadd(weight[tap], value, sums[pixel]);
        });
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    sums[p].store(target + p * target_pixel);
  }
}

// `visit(source, target, count)` for blocks of at most kMost neighbouring pixels of all rows, in one function, so that
// what lies in registers stays there.
template <int kMost, typename Visit>
NASCOMPILE_INLINE void square_blocks(const Rectangle& all, const Visit& visit) {
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* source = all.source + row * all.source_row;
    float* target = all.target + row * all.target_row;
    int64_t left = all.columns;
    for (; left >= kMost; left -= kMost) {
      visit(source, target, std::integral_constant<int, kMost>());
      source += kMost * all.source_pixel;
      target += kMost * all.target_pixel;
    }
    for (; left > 0; --left) {
      visit(source, target, std::integral_constant<int, 1>());
      source += all.source_pixel;
      target += all.target_pixel;
    }
  }
}

// The same for all blocks, with the weights of all kSize rows in registers. Of a 5x5 kernel they leave too few for pixels.
template <int kSize, int kStride, int kDilation, bool kAdds>
NASCOMPILE_APART void square_depthwise(const Rectangle& all, int64_t unit, const Rows& rows) {
  int64_t offsets[kSize];
  Vec weights[kSize * kSize];
#pragma GCC unroll 5
  for (int row = 0; row < kSize; ++row) {
    offsets[row] = rows.offsets[row];
  }
#pragma GCC unroll 25
  for (int t = 0; t < kSize * kSize; ++t) {
    weights[t] = Vec::loadu(rows.vectors + t * kLane);
  }
  const int64_t target_pixel = all.target_pixel;
  square_blocks<4>(all, [&](const float* source, float* target, auto count) {
    constexpr int kPixels = decltype(count)::value;
    Vec sums[kPixels];
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      sums[p] = kAdds ? Vec::loadu(target + p * target_pixel) : Vec(0.0f);
    }
#pragma GCC unroll 5
    for (int row = 0; row < kSize; ++row) {
      for_columns<kSize, kStride, kDilation, kPixels>(
          source + offsets[row], unit, [&](const Vec& value, int tap, int pixel) {
            sums[pixel] = at::vec::fmadd(weights[row * kSize + tap], value, sums[pixel]);
          });
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      sums[p].store(target + p * target_pixel);
    }
  });
}

template <int kSize, int kStride, int kDilation>
inline void depthwise_rows(const Rectangle& all, int64_t unit, bool adds, const Rows& rows) {
  if constexpr (kSize == 3) {
    if (rows.count == kSize) {
      return adds ? square_depthwise<kSize, kStride, kDilation, true>(all, unit, rows)
                  : square_depthwise<kSize, kStride, kDilation, false>(all, unit, rows);
    }
  }
  for_blocks<kSize>(all, [&](const float* source, float* target, auto count) {
    depthwise_block<kSize, kStride, kDilation, decltype(count)::value>(
        rows, unit, adds, source, target, all.target_pixel);
  });
}

// The rectangle is one tile for the moments.
inline void depthwise(const Depthwise& call, const Rectangle& all, const Moments& moments) {
  const Window window = find_window(call.taps, call.count, all.source_pixel);
  Rows rows;
  Rectangle part = all;
  for (int64_t channel = 0; channel < call.channels; channel += kLane) {
    if (call.count == 0 && !call.adds) {
      clear(part);
    }
    for_rows(window, rows, [&](int64_t first) {
      for_taps(window, rows, first, [&](float* vector, int64_t weight) {
        Vec::loadu(call.weights + weight * call.channels + channel).store(vector);
      });
      const bool adds = call.adds || first > 0;
      switch_window(window, [&](auto size, auto stride, auto dilation) {
        depthwise_rows<decltype(size)::value, decltype(stride)::value, decltype(dilation)::value>(
            part, window.unit, adds, rows);
      });
    });
    if (moments) {
      moments.add(part, channel, true);
    }
    part.source += kLane;
    part.target += kLane;
  }
  moments.finish(all.pixels());
}

// sums[tap] += sum over kPixels pixels of source[tap.offset] * target, for one vector of channels; both maps are read.
template <int kSize, int kStride, int kDilation, int kPixels>
NASCOMPILE_INLINE void depthwise_gradient_block(
    Rows& rows, int64_t unit, const float* source, const float* target, int64_t target_pixel) {
  Vec values[kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    values[p] = Vec::loadu(target + p * target_pixel);
  }
  float* vectors = rows.vectors;
  for (int64_t row = 0; row < rows.count; ++row) {
    Vec sums[kSize];
#pragma GCC unroll 7
    for (int t = 0; t < kSize; ++t) {
      sums[t] = Vec::loadu(vectors + t * kLane);
    }
    for_columns<kSize, kStride, kDilation, kPixels>(
        source + rows.offsets[row], unit, [&](const Vec& value, int tap, int pixel) {
          sums[tap] = at::vec::fmadd(values[pixel], value, sums[tap]);
        });
#pragma GCC unroll 7
    for (int t = 0; t < kSize; ++t) {
      sums[t].store(vectors + t * kLane);
    }
    vectors += kSize * kLane;
  }
}

// The same for all blocks, with the sums of all kSize rows in registers.
template <int kSize, int kStride, int kDilation>
NASCOMPILE_APART void square_gradient(const Rectangle& all, int64_t unit, Rows& rows) {
  int64_t offsets[kSize];
  Vec sums[kSize * kSize];
#pragma GCC unroll 5
  for (int row = 0; row < kSize; ++row) {
    offsets[row] = rows.offsets[row];
  }
#pragma GCC unroll 25
  for (int t = 0; t < kSize * kSize; ++t) {
    sums[t] = Vec::loadu(rows.vectors + t * kLane);
  }
  const int64_t target_pixel = all.target_pixel;
  square_blocks<4>(all, [&](const float* source, const float* target, auto count) {
    constexpr int kPixels = decltype(count)::value;
    Vec values[kPixels];
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      values[p] = Vec::loadu(target + p * target_pixel);
    }
#pragma GCC unroll 5
    for (int row = 0; row < kSize; ++row) {
      for_columns<kSize, kStride, kDilation, kPixels>(
          source + offsets[row], unit, [&](const Vec& value, int tap, int pixel) {
            Vec& sum = sums[row * kSize + tap];
            sum = at::vec::fmadd(values[pixel], value, sum);
          });
    }
  });
#pragma GCC unroll 25
  for (int t = 0; t < kSize * kSize; ++t) {
    sums[t].store(rows.vectors + t * kLane);
  }
}

template <int kSize, int kStride, int kDilation>
inline void gradient_rows(const Rectangle& all, int64_t unit, Rows& rows) {
  if constexpr (kSize == 3 || (kSize == 5 && kWide)) {
    if (rows.count == kSize) {
      return square_gradient<kSize, kStride, kDilation>(all, unit, rows);
    }
  }
  for_blocks<kSize>(all, [&](const float* source, float* target, auto count) {
    depthwise_gradient_block<kSize, kStride, kDilation, decltype(count)::value>(
        rows, unit, source, target, all.target_pixel);
  });
}

// gradient[tap.weight, c] += sum over pixels of source[tap.offset + c] * target[c]
inline void depthwise_gradient(
    const plan::Tap* taps, int64_t count, const Rectangle& all, int64_t channels, float* gradient) {
  const Window window = find_window(taps, count, all.source_pixel);
  Rows rows;
  Rectangle part = all;
  for (int64_t channel = 0; channel < channels; channel += kLane) {
    for_rows(window, rows, [&](int64_t first) {
      for_taps(window, rows, first, [&](float* vector, int64_t weight) {
        Vec::loadu(gradient + weight * channels + channel).store(vector);
      });
      switch_window(window, [&](auto size, auto stride, auto dilation) {
        gradient_rows<decltype(size)::value, decltype(stride)::value, decltype(dilation)::value>(
            part, window.unit, rows);
      });
      for_taps(window, rows, first, [&](float* vector, int64_t weight) {
        Vec::loadu(vector).store(gradient + weight * channels + channel);
      });
    });
    part.source += kLane;
    part.target += kLane;
  }
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
