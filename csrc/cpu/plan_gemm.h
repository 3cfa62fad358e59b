// Dense convolution of a rectangle of pixels, and the gradient of its weights. Included once per instruction set.
#pragma once

#include "plan_pixels.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

// target[o] (+)= sum over taps and channels i of weights[tap.weight, i, o] * source[tap.offset + i]
// `streams`: past the caches, for what nobody reads soon; where a vector is a cache line.
struct Dense {
  const plan::Tap* taps;
  int64_t count;
  const float* weights;
  int64_t in, out;
  bool adds, streams;
};

// more, and gcc 12 runs out of registers
constexpr int kUnroll = 2;
// pixels, between one look ahead and the next
constexpr int64_t kSome = 16;

// Pixels that lie equally far apart.
struct Line {
  const float* source;
  int64_t source_pixel;
  float* target;
  int64_t target_pixel;

  const float* from(int pixel) const {
    return source + pixel * source_pixel;
  }
  float* to(int pixel) const {
    return target + pixel * target_pixel;
  }
};

// The next pixels of a walk, wherever they lie.
template <int kPixels>
struct Steps {
  const float* source[kPixels];
  // volatile: read again when stored to, for the sums need all registers
  float* volatile target[kPixels];

  explicit Steps(Walk& walk) {
    walk.next(source, target);
  }
  const float* from(int pixel) const {
    return source[pixel];
  }
  float* to(int pixel) const {
    return target[pixel];
  }
};

// The weights of one tap from 16 channels to one vector, which stay in registers for all pixels.
struct Held {
  static constexpr int kIn = 16;

  Vec rows[kIn];

  Held(const Dense& call, int64_t channel) {
    const float* const weights = call.weights + call.taps->weight * kIn * call.out + channel;
#pragma GCC unroll 16
    for (int i = 0; i < kIn; ++i) {
      rows[i] = Vec::loadu(weights + i * call.out);
    }
  }
  static bool fits(const Dense& call) {
    return kWide && call.count == 1 && call.in == kIn;
  }

  template <int kPixels, typename Pixels>
  NASCOMPILE_INLINE void multiply(const Dense& call, const Pixels& pixels, int64_t, Vecs<kPixels> (&sums)[1]) const {
    const int64_t offset = call.taps->offset;
#pragma GCC unroll 16
    for (int i = 0; i < kIn; ++i) {
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        sums[0][p] = at::vec::fmadd(Vec(pixels.from(p)[offset + i]), rows[i], sums[0][p]);
      }
    }
  }
};

// Weights that are loaded for every block of pixels: sums[n][p] += sum over taps and channels i of
// weights[tap.weight, i, n-th vector] * source of p[tap.offset + i].
struct Streamed {
  template <int kPixels, int kVecs, typename Pixels>
  NASCOMPILE_INLINE void multiply(
      const Dense& call, const Pixels& pixels, int64_t channel, Vecs<kPixels> (&sums)[kVecs]) const {
    const plan::Tap* const end = call.taps + call.count;
    for (const plan::Tap* tap = call.taps; tap != end; ++tap) {
      const float* weights = call.weights + tap->weight * call.in * call.out + channel;
      const float* values[kPixels];
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        values[p] = pixels.from(p) + tap->offset;
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
#pragma GCC unroll 16
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
  }
};

// kPixels pixels times kVecs vectors of output channels from `channel` on, all in registers.
template <int kPixels, int kVecs, typename Weights, typename Pixels>
NASCOMPILE_INLINE void dense_block(
    const Dense& call, const Weights& weights, const Pixels& pixels, int64_t channel, const Moments& moments,
    bool first) {
  Vecs<kPixels> sums[kVecs];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 3
    for (int n = 0; n < kVecs; ++n) {
      sums[n][p] = call.adds ? Vec::loadu(pixels.to(p) + channel + n * kLane) : Vec(0.0f);
    }
  }
  weights.multiply(call, pixels, channel, sums);
#pragma GCC unroll 3
  for (int n = 0; n < kVecs; ++n) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      float* const to = pixels.to(p) + channel + n * kLane;
#ifdef CPU_CAPABILITY_AVX512
      if (call.streams) {
        _mm512_stream_ps(to, sums[n][p]);
        continue;
      }
#endif
      sums[n][p].store(to);
    }
    if (moments) {
      moments.add(sums[n], channel + n * kLane, first);
    }
  }
}

template <int kPixels, int kVecs, typename Weights>
NASCOMPILE_APART void dense_channels(
    const Dense& call, const Weights& weights, const Rectangle& all, int64_t channel, const Moments& moments) {
  all.ahead->turn();
  const bool is_flat =
      all.source_row == all.columns * all.source_pixel && all.target_row == all.columns * all.target_pixel;
  const int64_t products = kVecs * call.count * call.in;
  // with 16 registers the addresses of a line are one thing too many
  if (!kWide || (!is_flat && all.columns % kPixels != 0)) {
    Walk walk(all);
    blocks<kPixels>(all.pixels(), [&](int64_t at, auto count) {
      const Steps<decltype(count)::value> pixels(walk);
      all.fetch_on(decltype(count)::value * products);
      dense_block<decltype(count)::value, kVecs>(call, weights, pixels, channel, moments, at == 0);
    });
    return;
  }
  const int64_t rows = is_flat ? 1 : all.rows;
  const int64_t columns = is_flat ? all.pixels() : all.columns;
  for (int64_t row = 0; row < rows; ++row) {
    Line pixels{
        all.source + row * all.source_row, all.source_pixel, all.target + row * all.target_row, all.target_pixel};
    blocks<kPixels>(columns, [&](int64_t at, auto count) {
      if constexpr (std::is_same_v<Weights, Held>) {
        all.fetch(decltype(count)::value * products);
      } else {
        all.fetch_on(decltype(count)::value * products);
      }
      dense_block<decltype(count)::value, kVecs>(call, weights, pixels, channel, moments, row == 0 && at == 0);
      pixels.source += decltype(count)::value * pixels.source_pixel;
      pixels.target += decltype(count)::value * pixels.target_pixel;
    });
  }
}

inline void dense(const Dense& call, const Rectangle& all, const Moments& moments) {
  int64_t channel = 0;
  for (; channel + 2 * kLane <= call.out; channel += 2 * kLane) {
    dense_channels<kWide ? 8 : 6, 2>(call, Streamed(), all, channel, moments);
  }
  if (channel < call.out && Held::fits(call)) {
    dense_channels<8, 1>(call, Held(call, channel), all, channel, moments);
  } else if (channel < call.out) {
    dense_channels<8, 1>(call, Streamed(), all, channel, moments);
  }
  moments.finish(all.pixels());
}

// gradient[i, o] += sum over pixels of source[i] * target[o], for kRows channels i and kVecs vectors of channels o;
// here both maps are read.
template <int kRows, int kVecs>
NASCOMPILE_APART void dense_gradient_block(const Rectangle& all, int64_t out, float* gradient) {
  all.ahead->turn();
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
      if (column % kSome == 0) {
        all.fetch(kSome * kRows * kVecs);
      }
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
