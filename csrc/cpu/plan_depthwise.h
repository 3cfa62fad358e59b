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
      all.fetch_on(decltype(count)::value * kSize * kSize);
      visit(source + at * all.source_pixel, target + at * all.target_pixel, count);
    });
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

// Where the results of one vector of channels go: to the target, and to the moments if there are any.
struct Sink {
  const Moments& moments;
  int64_t channel;
  bool has_moments, streams;
  bool first = true;

  template <int kPixels>
  NASCOMPILE_INLINE void put(const Vec (&sums)[kPixels], float* target, int64_t target_pixel) {
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
#ifdef CPU_CAPABILITY_AVX512
      if (streams) {
        _mm512_stream_ps(target + p * target_pixel, sums[p]);
        continue;
      }
#endif
      sums[p].store(target + p * target_pixel);
    }
    if (has_moments) {
      moments.add(sums, channel, first);
      first = false;
    }
  }
};

// One vector of channels of kPixels neighbouring pixels.
template <int kSize, int kStride, int kDilation, int kPixels>
NASCOMPILE_INLINE void depthwise_block(
    const Rows& rows, int64_t unit, bool adds, const float* source, float* target, int64_t target_pixel, Sink& sink) {
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
  sink.put(sums, target, target_pixel);
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

// The same for all blocks, with the weights of all kSize rows in registers. Of a 5x5 kernel they leave too few for pixels.
template <int kSize, int kStride, int kDilation, bool kAdds>
NASCOMPILE_APART void square_depthwise(const Rectangle& all, int64_t unit, const Rows& rows, Sink& sink) {
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
  square_blocks<kSize, 4>(all, [&](const float* source, float* target, auto count) {
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
    sink.put(sums, target, target_pixel);
  });
}

// The same for all blocks.
template <int kSize, int kStride, int kDilation>
NASCOMPILE_APART void depthwise_blocks(const Rectangle& all, int64_t unit, bool adds, const Rows& rows, Sink& sink) {
  for_blocks<kSize>(all, [&](const float* source, float* target, auto count) {
    depthwise_block<kSize, kStride, kDilation, decltype(count)::value>(
        rows, unit, adds, source, target, all.target_pixel, sink);
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
  square_blocks<kSize, 4>(all, [&](const float* source, const float* target, auto count) {
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
