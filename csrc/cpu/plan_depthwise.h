// Depthwise convolution of a rectangle of pixels, and the gradient of its weights. Included once per instruction set.
#pragma once

#include "plan_window.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

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
#pragma GCC unroll 48
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

// Pixels of a block, in registers beside the taps of a row. Of sums the more the better: each waits for itself.
template <int kSize>
constexpr int kMostValues = kWide || kSize < 6 ? 8 : 4;
template <int kSize>
constexpr int kMostSums = kWide ? 16 : kMostValues<kSize>;

// `visit(source, target, rows, columns)` for blocks of at most kMost neighbouring pixels of one row or, where rows are short,
// of several; the numbers are constants.
template <int kSize, int kMost, typename Visit>
inline void for_blocks(const Rectangle& all, const Visit& visit) {
  const auto go_over = [&](int64_t row, auto rows, auto most) {
    const float* const source = all.source + row * all.source_row;
    float* const target = all.target + row * all.target_row;
    blocks<decltype(most)::value>(all.columns, [&](int64_t at, auto columns) {
      all.fetch_on(decltype(rows)::value * decltype(columns)::value * kSize * kSize);
      visit(source + at * all.source_pixel, target + at * all.target_pixel, rows, columns);
    });
  };
  int64_t row = 0;
  if constexpr (kMost == 16) {
    for (; all.columns < 8 && row + 4 <= all.rows; row += 4) {
      go_over(row, std::integral_constant<int, 4>(), std::integral_constant<int, 4>());
    }
  }
  if constexpr (kMost >= 8) {
    for (; all.columns < kMost && row + 2 <= all.rows; row += 2) {
      go_over(row, std::integral_constant<int, 2>(), std::integral_constant<int, kMost / 2>());
    }
  }
  for (; row < all.rows; ++row) {
    go_over(row, std::integral_constant<int, 1>(), std::integral_constant<int, kMost>());
  }
}

// target[c] (+)= sum over taps of weights[tap.weight, c] * source[tap.offset + c]. `streams` as in Dense.
struct Depthwise {
  const plan::Tap* taps;
  int64_t count;
  const float* weights;
  int64_t channels;
  bool adds, streams;
};

alignas(64) constexpr float kZeros[kLane] = {};

// How far apart rows and pixels of a block are.
struct Pitch {
  int64_t row, pixel;

  // from the first pixel to pixel p of a block with so many columns
  template <int kColumns>
  NASCOMPILE_INLINE int64_t to(int p) const {
    return p / kColumns * row + p % kColumns * pixel;
  }
};

// Where the results of one vector of channels go: to the target, and to the moments if there are any.
struct Sink {
  const Moments& moments;
  int64_t channel;
  bool has_moments, streams;
  bool first = true;

  // vectors of some rows, one after another
  template <int kRows, int kPixels>
  NASCOMPILE_INLINE void put(const Vecs<kPixels>& sums, float* target, Pitch pitch) {
    const auto put_all = [&](const auto& store) {
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        store(target + pitch.to<kPixels / kRows>(p), sums[p]);
      }
    };
#ifdef CPU_CAPABILITY_AVX512
    if (streams) {
      put_all([](float* to, const Vec& value) { _mm512_stream_ps(to, value); });
    } else
#endif
      put_all([](float* to, const Vec& value) { value.store(to); });
    if (has_moments) {
      moments.add(sums, channel, first);
      first = false;
    }
  }
};

// One vector of channels of kRows times kColumns neighbouring pixels.
template <int kSize, int kStride, int kDilation, int kRows, int kColumns>
NASCOMPILE_INLINE void depthwise_block(
    const Rows& rows, int64_t unit, bool adds, const float* source, int64_t source_row, float* target, Pitch pitch,
    Sink& sink) {
  constexpr int kPixels = kRows * kColumns;
  // no branch: it would take the sums through memory
  const float* const before = adds ? target : kZeros;
  const Pitch steps = adds ? pitch : Pitch{0, 0};
  auto sums = registers<kPixels>([=](int p) { return Vec::loadu(before + steps.to<kColumns>(p)); });
  const float* weights = rows.vectors;
  for (int64_t row = 0; row < rows.count; ++row) {
    const auto weight = load_each<kSize>(weights, kLane);
    weights += kSize * kLane;
    const float* from = source + rows.offsets[row];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for_columns<kSize, kStride, kDilation, kColumns>(from, unit, [&](const Vec& value, int tap, int column) {
        sums[r * kColumns + column] = at::vec::fmadd(weight[tap], value, sums[r * kColumns + column]);
      });
      from += source_row;
    }
  }
  sink.put<kRows>(sums, target, pitch);
}

// `visit(source, target, count)` for blocks of at most kMost neighbouring pixels of all rows, in one function, so that
// what lies in registers stays there.
template <int kSize, int kMost, typename Visit>
NASCOMPILE_INLINE void square_blocks(const Rectangle& all, const Visit& visit) {
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* source = all.source + row * all.source_row;
    float* target = all.target + row * all.target_row;
    int64_t left = all.columns;
    for (; left >= kMost; left -= kMost) {
      all.fetch(kMost * kSize * kSize);
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

#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "sched-pressure")

// The same for all blocks, with the weights of all kSize rows in registers. Of a 5x5 kernel they leave too few for pixels.
template <int kSize, int kStride, int kDilation, bool kAdds>
NASCOMPILE_APART void square_depthwise(const Rectangle& all, int64_t unit, const Rows& rows, Sink& sink) {
  int64_t offsets[kSize];
  const auto weights = load_each<kSize * kSize>(rows.vectors, kLane);
#pragma GCC unroll 5
  for (int row = 0; row < kSize; ++row) {
    offsets[row] = rows.offsets[row];
  }
  const int64_t target_pixel = all.target_pixel;
  square_blocks<kSize, 4>(all, [&](const float* source, float* target, auto count) {
    constexpr int kPixels = decltype(count)::value;
    auto sums = kAdds ? load_each<kPixels>(target, target_pixel) : Vecs<kPixels>();
#pragma GCC unroll 5
    for (int row = 0; row < kSize; ++row) {
      for_columns<kSize, kStride, kDilation, kPixels>(
          source + offsets[row], unit, [&](const Vec& value, int tap, int pixel) {
            sums[pixel] = at::vec::fmadd(weights[row * kSize + tap], value, sums[pixel]);
          });
    }
    sink.put<1>(sums, target, {0, target_pixel});
  });
}

#pragma GCC pop_options

// The same for all blocks.
template <int kSize, int kStride, int kDilation>
NASCOMPILE_APART void depthwise_blocks(const Rectangle& all, int64_t unit, bool adds, const Rows& rows, Sink& sink) {
  for_blocks<kSize, kMostSums<kSize>>(all, [&](const float* source, float* target, auto height, auto width) {
    depthwise_block<kSize, kStride, kDilation, decltype(height)::value, decltype(width)::value>(
        rows, unit, adds, source, all.source_row, target, {all.target_row, all.target_pixel}, sink);
  });
}

template <int kSize, int kStride, int kDilation>
inline void depthwise_rows(const Rectangle& all, int64_t unit, bool adds, const Rows& rows, Sink& sink) {
  if constexpr (kSize == 3) {
    if (rows.count == kSize) {
      return adds ? square_depthwise<kSize, kStride, kDilation, true>(all, unit, rows, sink)
                  : square_depthwise<kSize, kStride, kDilation, false>(all, unit, rows, sink);
    }
  }
  depthwise_blocks<kSize, kStride, kDilation>(all, unit, adds, rows, sink);
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
      const bool is_last = first + rows.count == window.rows;
      Sink sink{moments, channel, is_last && moments, is_last && call.streams};
      all.ahead->turn();
      switch_window(window, [&](auto size, auto stride, auto dilation) {
        depthwise_rows<decltype(size)::value, decltype(stride)::value, decltype(dilation)::value>(
            part, window.unit, adds, rows, sink);
      });
    });
    part.source += kLane;
    part.target += kLane;
  }
  moments.finish(all.pixels());
}

// sums[tap] += sum over kRows times kColumns pixels of source[tap.offset] * target, for one vector of channels; both maps
// are read.
template <int kSize, int kStride, int kDilation, int kRows, int kColumns>
NASCOMPILE_INLINE void depthwise_gradient_block(
    Rows& rows, int64_t unit, const float* source, int64_t source_row, const float* target, Pitch pitch) {
  const auto values = registers<kRows * kColumns>([=](int p) { return Vec::loadu(target + pitch.to<kColumns>(p)); });
  float* vectors = rows.vectors;
  for (int64_t row = 0; row < rows.count; ++row) {
    auto sums = load_each<kSize>(vectors, kLane);
    const float* from = source + rows.offsets[row];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for_columns<kSize, kStride, kDilation, kColumns>(from, unit, [&](const Vec& value, int tap, int column) {
        sums[tap] = at::vec::fmadd(values[r * kColumns + column], value, sums[tap]);
      });
      from += source_row;
    }
#pragma GCC unroll 7
    for (int t = 0; t < kSize; ++t) {
      sums[t].store(vectors + t * kLane);
    }
    vectors += kSize * kLane;
  }
}

#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "sched-pressure")

// The same for all blocks, with the sums of all kSize rows in registers.
template <int kSize, int kStride, int kDilation>
NASCOMPILE_APART void square_gradient(const Rectangle& all, int64_t unit, Rows& rows) {
  int64_t offsets[kSize];
  auto sums = load_each<kSize * kSize>(rows.vectors, kLane);
#pragma GCC unroll 5
  for (int row = 0; row < kSize; ++row) {
    offsets[row] = rows.offsets[row];
  }
  const int64_t target_pixel = all.target_pixel;
  square_blocks<kSize, 4>(all, [&](const float* source, const float* target, auto count) {
    constexpr int kPixels = decltype(count)::value;
    const auto values = load_each<kPixels>(target, target_pixel);
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

#pragma GCC pop_options

template <int kSize, int kStride, int kDilation>
inline void gradient_rows(const Rectangle& all, int64_t unit, Rows& rows) {
  if constexpr (kSize == 3 || (kSize == 5 && kWide)) {
    if (rows.count == kSize) {
      return square_gradient<kSize, kStride, kDilation>(all, unit, rows);
    }
  }
  for_blocks<kSize, kMostValues<kSize>>(all, [&](const float* source, float* target, auto height, auto width) {
    depthwise_gradient_block<kSize, kStride, kDilation, decltype(height)::value, decltype(width)::value>(
        rows, unit, source, all.source_row, target, {all.target_row, all.target_pixel});
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
      all.ahead->turn();
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
