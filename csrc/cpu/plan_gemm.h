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

// pixels, between one look ahead and the next
constexpr int64_t kSome = 16;

// Pixels that lie equally far apart.
struct Line {
  const float* source;
  int64_t source_pixel;
  float* target;
  int64_t target_pixel;

  // visit(where, pixel) for the targets of the first pixels
  template <int kPixels, typename Visit>
  NASCOMPILE_INLINE void for_targets(const Visit& visit) const {
    const int64_t pitch = target_pixel;
    float* four = hidden(target);
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      visit(four + p % 4 * pitch, p);
      if (p % 4 == 3) {
        four = hidden(four + 4 * pitch);
      }
    }
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
  template <int kCount, typename Visit>
  NASCOMPILE_INLINE void for_targets(const Visit& visit) const {
#pragma GCC unroll 8
    for (int p = 0; p < kCount; ++p) {
      visit(target[p], p);
    }
  }
};

// sums[n][p] += sum over taps and channels i of weights[tap.weight, i, n-th vector] * source of p[tap.offset + i]. An address
// for four pixels each: one for every pixel would not leave registers for the others.
template <int kPixels, int kVecs>
NASCOMPILE_INLINE void multiply(const Dense& call, const Line& pixels, int64_t channel, Vecs<kPixels> (&sums)[kVecs]) {
  constexpr int kFours = (kPixels + 3) / 4;
  const int64_t pitch = pixels.source_pixel;
  const plan::Tap* const end = call.taps + call.count;
  for (const plan::Tap* tap = call.taps; tap != end; ++tap) {
    const float* weights = call.weights + tap->weight * call.in * call.out + channel;
    const float* values[kFours];
#pragma GCC unroll 4
    for (int four = 0; four < kFours; ++four) {
      values[four] = pixels.source + tap->offset + 4 * four * pitch;
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < call.in; i += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const auto weight = load_each<kVecs>(weights, kLane);
        weights += call.out;
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
          const Vec value(values[p / 4][p % 4 * pitch + u]);
#pragma GCC unroll 3
          for (int n = 0; n < kVecs; ++n) {
            sums[n][p] = at::vec::fmadd(value, weight[n], sums[n][p]);
          }
        }
      }
#pragma GCC unroll 4
      for (int four = 0; four < kFours; ++four) {
        values[four] = hidden(values[four] + 4);
      }
    }
  }
}

// The same for pixels anywhere.
template <int kPixels, int kVecs>
NASCOMPILE_INLINE void multiply(
    const Dense& call, const Steps<kPixels>& pixels, int64_t channel, Vecs<kPixels> (&sums)[kVecs]) {
  const plan::Tap* const end = call.taps + call.count;
  for (const plan::Tap* tap = call.taps; tap != end; ++tap) {
    const float* weights = call.weights + tap->weight * call.in * call.out + channel;
    const float* values[kPixels];
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      values[p] = pixels.source[p] + tap->offset;
    }
    // more than two at once, and gcc 12 runs out of registers
    for (int64_t i = 0; i < call.in; i += 2) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        const auto weight = load_each<kVecs>(weights, kLane);
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

// loads before the products that need them, as far as there are registers: gcc does so by itself for other processors only
#pragma GCC push_options
#pragma GCC optimize("schedule-insns", "sched-pressure")

// kPixels pixels times kVecs vectors of output channels from `channel` on, all in registers.
template <bool kAdds, int kPixels, int kVecs, typename Pixels>
NASCOMPILE_INLINE void dense_block(
    const Dense& call, const Pixels& pixels, int64_t channel, const Moments& moments, bool first) {
  Vecs<kPixels> sums[kVecs];
#pragma GCC unroll 3
  for (int n = 0; n < kVecs; ++n) {
    sums[n] = registers<kPixels>([](int) { return Vec(0.0f); });
    if constexpr (kAdds) {
      pixels.template for_targets<kPixels>(
          [&](const float* from, int p) { sums[n][p] = Vec::loadu(from + channel + n * kLane); });
    }
  }
  multiply(call, pixels, channel, sums);
  const auto put = [&](const auto& store) {
    pixels.template for_targets<kPixels>([&](float* to, int p) {
#pragma GCC unroll 3
      for (int n = 0; n < kVecs; ++n) {
        store(to + channel + n * kLane, sums[n][p]);
      }
    });
  };
#ifdef CPU_CAPABILITY_AVX512
  if (call.streams) {
    put([](float* to, const Vec& value) { _mm512_stream_ps(to, value); });
  } else
#endif
    put([](float* to, const Vec& value) { value.store(to); });
  if (moments) {
#pragma GCC unroll 3
    for (int n = 0; n < kVecs; ++n) {
      moments.add(sums[n], channel + n * kLane, first);
    }
  }
}

template <bool kAdds, int kPixels, int kVecs>
NASCOMPILE_APART void dense_channels(
    const Dense& call, const Rectangle& all, int64_t channel, const Moments& moments) {
  all.ahead->turn();
  const bool is_flat =
      all.source_row == all.columns * all.source_pixel && all.target_row == all.columns * all.target_pixel;
  const int64_t products = kVecs * call.count * call.in;
  // with 16 registers the addresses of a line are one thing too many
  if (!kWide || (!is_flat && all.columns % 8 != 0)) {
    Walk walk(all);
    blocks<std::min(kPixels, 8)>(all.pixels(), [&](int64_t at, auto count) {
      const Steps<decltype(count)::value> pixels(walk);
      all.fetch_on(decltype(count)::value * products);
      dense_block<kAdds, decltype(count)::value, kVecs>(call, pixels, channel, moments, at == 0);
    });
    return;
  }
  const int64_t rows = is_flat ? 1 : all.rows;
  const int64_t columns = is_flat ? all.pixels() : all.columns;
  for (int64_t row = 0; row < rows; ++row) {
    Line pixels{
        all.source + row * all.source_row, all.source_pixel, all.target + row * all.target_row, all.target_pixel};
    blocks<kPixels>(columns, [&](int64_t at, auto count) {
      all.fetch_on(decltype(count)::value * products);
      dense_block<kAdds, decltype(count)::value, kVecs>(call, pixels, channel, moments, row == 0 && at == 0);
      pixels.source += decltype(count)::value * pixels.source_pixel;
      pixels.target += decltype(count)::value * pixels.target_pixel;
    });
  }
}

#pragma GCC pop_options

template <bool kAdds>
inline void dense_all(const Dense& call, const Rectangle& all, const Moments& moments) {
  int64_t channel = 0;
  for (; channel + 2 * kLane <= call.out; channel += 2 * kLane) {
    dense_channels<kAdds, kWide ? 8 : 6, 2>(call, all, channel, moments);
  }
  if (channel < call.out) {
    dense_channels<kAdds, kWide ? 16 : 8, 1>(call, all, channel, moments);
  }
}

inline void dense(const Dense& call, const Rectangle& all, const Moments& moments) {
  // a branch before the sums would put them into memory
  call.adds ? dense_all<true>(call, all, moments) : dense_all<false>(call, all, moments);
  moments.finish(all.pixels());
}

// gradient[i, o] += sum over pixels of source[i] * target[o], for kRows channels i and kVecs vectors of channels o;
// here both maps are read.
template <int kRows, int kVecs>
NASCOMPILE_APART void dense_gradient_block(const Rectangle& all, int64_t out, float* gradient) {
  all.ahead->turn();
  // row by row: they may come from afar
  const auto place = [=](int k) { return gradient + k / kVecs * out + k % kVecs * kLane; };
  auto sums = registers<kRows * kVecs>([=](int k) { return Vec::loadu(place(k)); });
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* source = all.source + row * all.source_row;
    const float* target = all.target + row * all.target_row;
    for (int64_t column = 0; column < all.columns; ++column) {
      if (column % kSome == 0) {
        all.fetch(kSome * kRows * kVecs);
      }
      const auto values = load_each<kVecs>(target, kLane);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value(source[r]);
#pragma GCC unroll 2
        for (int n = 0; n < kVecs; ++n) {
          sums[r * kVecs + n] = at::vec::fmadd(value, values[n], sums[r * kVecs + n]);
        }
      }
      source += all.source_pixel;
      target += all.target_pixel;
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kRows * kVecs; ++k) {
    sums[k].store(place(k));
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
    // as many sums as there are registers for: the more of them, the fewer loads for each product
    constexpr int kMost = kWide && kVecs == 1 ? 16 : 8;
    for (; i + kMost <= in; i += kMost) {
      run(i, std::integral_constant<int, kMost>());
    }
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
