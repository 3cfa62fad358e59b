// Depthwise convolution of a rectangle of pixels, and the gradient of its weights. Included once per instruction set.
#pragma once

#include "plan_pixels.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

// Taps whose weights, or whose sums, are kept in registers at once.
constexpr int64_t kTaps = 9;

// `run(first, size)` for the taps in groups of at most kTaps, about equally large; size is a constant.
template <typename Run>
inline void tap_groups(int64_t count, const Run& run) {
  const int64_t groups = (count + kTaps - 1) / kTaps;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * count / groups;
    switch ((group + 1) * count / groups - first) {
#define CASE(size)                                       \
  case size:                                             \
    run(first, std::integral_constant<int, size>());     \
    break;
      CASE(1)
      CASE(2)
      CASE(3)
      CASE(4)
      CASE(5)
      CASE(6)
      CASE(7)
      CASE(8)
      CASE(9)
#undef CASE
    }
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

// kCount taps of one vector of channels. Pixel after pixel, for the weights are what stays in registers: as many loads
// as multiplications, and no width is awkward. Two sums a pixel halve the chain of additions.
template <int kCount, bool kAdds>
inline void depthwise_taps(
    const plan::Tap* taps, const float* weights, int64_t channels, const Rectangle& all) {
  int64_t offsets[kCount];
  Vec weight[kCount];
#pragma GCC unroll 9
  for (int t = 0; t < kCount; ++t) {
    offsets[t] = taps[t].offset;
    weight[t] = Vec::loadu(weights + taps[t].weight * channels);
  }
  const int64_t source_pixel = all.source_pixel;
  const int64_t target_pixel = all.target_pixel;
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* source = all.source + row * all.source_row;
    float* target = all.target + row * all.target_row;
    for (int64_t left = all.columns; left > 0; --left) {
      Vec sum = kAdds ? at::vec::fmadd(weight[0], Vec::loadu(source + offsets[0]), Vec::loadu(target))
                      : weight[0] * Vec::loadu(source + offsets[0]);
      if constexpr (kCount > 1) {
        Vec other = weight[1] * Vec::loadu(source + offsets[1]);
#pragma GCC unroll 9
        for (int t = 2; t < kCount; ++t) {
          Vec& to = t % 2 == 0 ? sum : other;
          to = at::vec::fmadd(weight[t], Vec::loadu(source + offsets[t]), to);
        }
        sum = sum + other;
      }
      sum.store(target);
      source += source_pixel;
      target += target_pixel;
    }
  }
}

// The rectangle is one tile for the moments.
inline void depthwise(const Depthwise& call, const Rectangle& all, const Moments& moments) {
  bands(all, [&](Rectangle part, bool first_rows) {
    for (int64_t channel = 0; channel < call.channels; channel += kLane) {
      tap_groups(call.count, [&](int64_t first, auto size) {
        constexpr int kCount = decltype(size)::value;
        const plan::Tap* const taps = call.taps + first;
        const float* const weights = call.weights + channel;
        if (call.adds || first > 0) {
          depthwise_taps<kCount, true>(taps, weights, call.channels, part);
        } else {
          depthwise_taps<kCount, false>(taps, weights, call.channels, part);
        }
      });
      if (call.count == 0 && !call.adds) {
        clear(part);
      }
      if (moments) {
        moments.add(part, channel, first_rows);
      }
      part.source += kLane;
      part.target += kLane;
    }
  });
  moments.finish(all.pixels());
}

// gradient[tap.weight, c] += sum over pixels of source[tap.offset + c] * target[c], for kCount taps and one vector of
// channels; here both maps are read.
template <int kCount>
inline void depthwise_gradient_taps(const plan::Tap* taps, const Rectangle& all, int64_t channels, float* gradient) {
  int64_t offsets[kCount];
  Vec sums[kCount];
#pragma GCC unroll 9
  for (int t = 0; t < kCount; ++t) {
    offsets[t] = taps[t].offset;
    sums[t] = Vec::loadu(gradient + taps[t].weight * channels);
  }
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* source = all.source + row * all.source_row;
    const float* target = all.target + row * all.target_row;
    for (int64_t column = 0; column < all.columns; ++column) {
      const Vec value = Vec::loadu(target);
#pragma GCC unroll 9
      for (int t = 0; t < kCount; ++t) {
        sums[t] = at::vec::fmadd(value, Vec::loadu(source + offsets[t]), sums[t]);
      }
      source += all.source_pixel;
      target += all.target_pixel;
    }
  }
#pragma GCC unroll 9
  for (int t = 0; t < kCount; ++t) {
    sums[t].store(gradient + taps[t].weight * channels);
  }
}

inline void depthwise_gradient(
    const plan::Tap* taps, int64_t count, const Rectangle& all, int64_t channels, float* gradient) {
  Rectangle part = all;
  for (int64_t channel = 0; channel < channels; channel += kLane) {
    tap_groups(count, [&](int64_t first, auto size) {
      depthwise_gradient_taps<decltype(size)::value>(taps + first, part, channels, gradient + channel);
    });
    part.source += kLane;
    part.target += kLane;
  }
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
