// Dense convolution of a rectangle of pixels, and the gradient of its weights. Included once per instruction set.
#pragma once

#include "plan_pixels.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

// target[o] (+)= sum over taps and channels i of weights[tap.weight, i, o] * source[tap.offset + i]
struct Dense {
  const plan::Tap* taps;
  int64_t count;
  const float* weights;
  int64_t in, out;
  bool adds;
};

// more, and gcc 12 runs out of registers
constexpr int kUnroll = 2;

// kPixels pixels times kVecs vectors of output channels from `channel` on, all in registers.
template <int kPixels, int kVecs>
inline void dense_block(const Dense& call, Walk& walk, int64_t channel, const Moments& moments, bool first) {
  const float* source[kPixels];
  // volatile: read again when stored to, for the sums need all registers
  float* volatile target[kPixels];
  walk.next(source, target);
  Vec sums[kVecs][kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 3
    for (int n = 0; n < kVecs; ++n) {
      sums[n][p] = call.adds ? Vec::loadu(target[p] + channel + n * kLane) : Vec(0.0f);
    }
  }
  const plan::Tap* const end = call.taps + call.count;
  for (const plan::Tap* tap = call.taps; tap != end; ++tap) {
    const float* weights = call.weights + tap->weight * call.in * call.out + channel;
    const float* values[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      values[p] = source[p] + tap->offset;
    }
    for (int64_t i = 0; i < call.in; i += kUnroll) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        Vec weight[kVecs];
#pragma GCC unroll 3
        for (int n = 0; n < kVecs; ++n) {
          weight[n] = Vec::loadu(weights + n * kLane);
        }
        weights += call.out;
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) {
          const Vec value(values[p][i + u]);
#pragma GCC unroll 3
          for (int n = 0; n < kVecs; ++n) {
            sums[n][p] = at::vec::fmadd(value, weight[n], sums[n][p]);
          }
        }
      }
    }
  }
#pragma GCC unroll 3
  for (int n = 0; n < kVecs; ++n) {
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      sums[n][p].store(target[p] + channel + n * kLane);
    }
    if (moments) {
      moments.add(sums[n], channel + n * kLane, first);
    }
  }
}

template <int kPixels, int kVecs>
inline void dense_channels(const Dense& call, const Rectangle& all, int64_t channel, const Moments& moments) {
  Walk walk(all);
  blocks<kPixels>(all.pixels(), [&](int64_t at, auto count) {
    dense_block<decltype(count)::value, kVecs>(call, walk, channel, moments, at == 0);
  });
}

inline void dense(const Dense& call, const Rectangle& all, const Moments& moments) {
  int64_t channel = 0;
  for (; channel + 2 * kLane <= call.out; channel += 2 * kLane) {
    dense_channels<kWide ? 8 : 6, 2>(call, all, channel, moments);
  }
  if (channel < call.out) {
    dense_channels<8, 1>(call, all, channel, moments);
  }
  moments.finish(all.pixels());
}

// gradient[i, o] += sum over pixels of source[i] * target[o], for kRows channels i and kVecs vectors of channels o;
// here both maps are read.
template <int kRows, int kVecs>
inline void dense_gradient_block(const Rectangle& all, int64_t out, float* gradient) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kVecs; ++n) {
      sums[r][n] = Vec::loadu(gradient + r * out + n * kLane);
    }
  }
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* source = all.source + row * all.source_row;
    const float* target = all.target + row * all.target_row;
    for (int64_t column = 0; column < all.columns; ++column) {
      Vec values[kVecs];
#pragma GCC unroll 2
      for (int n = 0; n < kVecs; ++n) {
        values[n] = Vec::loadu(target + n * kLane);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec value(source[r]);
#pragma GCC unroll 2
        for (int n = 0; n < kVecs; ++n) {
          sums[r][n] = at::vec::fmadd(value, values[n], sums[r][n]);
        }
      }
      source += all.source_pixel;
      target += all.target_pixel;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < kVecs; ++n) {
      sums[r][n].store(gradient + r * out + n * kLane);
    }
  }
}

template <int kVecs>
inline void dense_gradient_channels(const Rectangle& all, int64_t in, int64_t out, int64_t channel, float* gradient) {
  const auto run = [&](int64_t i, auto rows) {
    Rectangle part = all;
    part.source += i;
    part.target += channel;
    dense_gradient_block<decltype(rows)::value, kVecs>(part, out, gradient + i * out + channel);
  };
  int64_t i = 0;
  if constexpr (!kWide && kVecs == 2) {
    // sixes as far as fours can fill up the rest
    for (; in - i >= 6 && in - i != 8; i += 6) {
      run(i, std::integral_constant<int, 6>());
    }
    for (; i < in; i += 4) {
      run(i, std::integral_constant<int, 4>());
    }
  } else {
    for (; i < in; i += 8) {
      run(i, std::integral_constant<int, 8>());
    }
  }
}

inline void dense_gradient(const Rectangle& all, int64_t in, int64_t out, float* gradient) {
  int64_t channel = 0;
  for (; channel + 2 * kLane <= out; channel += 2 * kLane) {
    dense_gradient_channels<2>(all, in, out, channel, gradient);
  }
  if (channel < out) {
    dense_gradient_channels<1>(all, in, out, channel, gradient);
  }
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
