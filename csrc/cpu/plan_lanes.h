// What the map kernels of a plan share: a line of channels in registers, and the order in which maps are gone over.
// Included once per instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../plan.h"
#include "plan_inline.h"

// distinct in every object file: two instruction sets must never share one compiled function
namespace nascompile::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLine = 16;          // floats in a cache line: the channels that are gone over at once
constexpr int64_t kTileFloats = 2048;  // of one map, so that a few maps' tiles stay in the first-level cache
constexpr int64_t kSumPixels = 256;    // that fp32 sums go over before they are added in fp64

// N channels of one pixel.
template <int N>
struct Channels {
  static constexpr int kCount = N / Vec::size();
  Vec part[kCount];

  Channels() : Channels(0.0f) {}
  explicit Channels(float value) {
    for (int i = 0; i < kCount; ++i) {
      part[i] = Vec(value);
    }
  }
  explicit Channels(const float* from) {
    for (int i = 0; i < kCount; ++i) {
      part[i] = Vec::loadu(from + i * Vec::size());
    }
  }
  // of a per-channel vector that may be absent
  Channels(const float* vector, int64_t channel, float otherwise)
      : Channels(vector == nullptr ? Channels(otherwise) : Channels(vector + channel)) {}

  void store(float* to) const {
    for (int i = 0; i < kCount; ++i) {
      part[i].store(to + i * Vec::size());
    }
  }
  // past the caches, for what nobody reads soon
  void stream(float* to) const {
#ifdef CPU_CAPABILITY_AVX512
    for (int i = 0; i < kCount; ++i) {
      _mm512_stream_ps(to + i * Vec::size(), part[i]);
    }
#else
    store(to);
#endif
  }
  template <typename Function, typename... Others>
  NASCOMPILE_INLINE friend Channels each(const Function& function, const Channels& first, const Others&... others) {
    Channels result;
    for (int i = 0; i < kCount; ++i) {
      result.part[i] = function(first.part[i], others.part[i]...);
    }
    return result;
  }
};

template <int N>
NASCOMPILE_INLINE Channels<N> add(const Channels<N>& a, const Channels<N>& b) {
  return each([](const Vec& x, const Vec& y) { return x + y; }, a, b);
}

template <int N>
NASCOMPILE_INLINE Channels<N> subtract(const Channels<N>& a, const Channels<N>& b) {
  return each([](const Vec& x, const Vec& y) { return x - y; }, a, b);
}

template <int N>
NASCOMPILE_INLINE Channels<N> multiply(const Channels<N>& a, const Channels<N>& b) {
  return each([](const Vec& x, const Vec& y) { return x * y; }, a, b);
}

// a * b + c
template <int N>
NASCOMPILE_INLINE Channels<N> multiply_add(const Channels<N>& a, const Channels<N>& b, const Channels<N>& c) {
  return each([](const Vec& x, const Vec& y, const Vec& z) { return at::vec::fmadd(x, y, z); }, a, b, c);
}

template <int N>
NASCOMPILE_INLINE void add_to(double* sums, const Channels<N>& values) {
  float lanes[N];
  values.store(lanes);
  for (int i = 0; i < N; ++i) {
    sums[i] += lanes[i];
  }
}

// Sums of values about a shift, and of their squares, go to the sums of the values themselves: in fp64, for where the
// mean is much larger than the deviation the squares would cancel.
template <int N>
NASCOMPILE_INLINE void add_moments(
    double* sums, int64_t channels, int64_t pixels, const Channels<N>& shift, const Channels<N>& total,
    const Channels<N>& squares) {
  float shifts[N];
  float totals[N];
  float products[N];
  shift.store(shifts);
  total.store(totals);
  squares.store(products);
  for (int i = 0; i < N; ++i) {
    const double whole = totals[i] + static_cast<double>(pixels) * shifts[i];
    sums[i] += whole;
    sums[channels + i] += products[i] + shifts[i] * (totals[i] + whole);
  }
}

// Differences from what is larger may have no place in fp32.
constexpr float kFarthest = 1e30f;

// The range of a row's first pixels: its middle, near all others, is what products are summed about; zero where it is
// nan, infinite or too large.
template <int N>
struct Range {
  Channels<N> middle, width;

  NASCOMPILE_INLINE Range(const float* row, int64_t pixel, int64_t pixels) {
    Channels<N> low(row);
    Channels<N> high(row);
    for (int64_t x = 1; x < std::min<int64_t>(pixels, 4); ++x) {
      const Channels<N> value(row + x * pixel);
      low = each([](const Vec& a, const Vec& b) { return at::vec::minimum(a, b); }, low, value);
      high = each([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, high, value);
    }
    middle = each(
        [](const Vec& a, const Vec& b) {
          const Vec half = (a + b) * Vec(0.5f);
          return (half.abs() < Vec(kFarthest)) & half;
        },
        low, high);
    width = subtract(high, low);
  }

  // Whether a channel lies so far from zero that products with it lose digits.
  NASCOMPILE_INLINE bool is_far() const {
    Vec far(0.0f);
    for (int i = 0; i < Channels<N>::kCount; ++i) {
      far = at::vec::maximum(far, middle.part[i].abs() - width.part[i] * Vec(3.0f));
    }
    return far.zero_mask() != (1 << Vec::size()) - 1;
  }
};

// Sums of gradients times values about a shift, given those of the gradients, go to the sums of gradients times the
// values themselves: in fp64, for BatchNorm subtracts the mean of the values from them again.
template <int N>
NASCOMPILE_INLINE void add_products(
    double* sums, const Channels<N>& shift, const Channels<N>& total, const Channels<N>& products) {
  float shifts[N];
  float totals[N];
  float about[N];
  shift.store(shifts);
  total.store(totals);
  products.store(about);
  for (int i = 0; i < N; ++i) {
    sums[i] += about[i] + static_cast<double>(shifts[i]) * totals[i];
  }
}

// visit(channel, N) for every N = 16 channels, then for the last 8 of them
template <typename Visit>
void for_channels(int64_t begin, int64_t end, const Visit& visit) {
  int64_t channel = begin;
  for (; channel + kLine <= end; channel += kLine) {
    visit(channel, std::integral_constant<int, kLine>{});
  }
  if constexpr (Vec::size() < kLine) {
    if (channel < end) {
      visit(channel, std::integral_constant<int, kLine / 2>{});
    }
  }
}

// A part of an image: rows [y, y + rows), pixels [x, x + width) of each, channels [begin, end).
struct Tile {
  int64_t y, x, rows, width, begin, end;
};

// Whether a map's rows follow one another like the pixels of one long row.
inline bool is_flat(const plan::Map& map) {
  return map.row == map.width * map.pixel || map.height == 1;
}

// visit(tile) for tiles of at most `most` floats of a map; `flat` where all maps gone over are.
template <typename Visit>
void for_tiles(const plan::Map& map, bool flat, const Visit& visit, int64_t most = kTileFloats) {
  const int64_t height = flat ? 1 : map.height;
  const int64_t width = flat ? map.height * map.width : map.width;
  for (int64_t begin = 0; begin < map.channels; begin += kTileFloats / 2) {
    const int64_t end = std::min(begin + kTileFloats / 2, map.channels);
    const int64_t pixels = std::min(std::max<int64_t>(most / (end - begin), 1), kSumPixels);
    const int64_t columns = std::min(pixels, width);
    const int64_t rows = std::max<int64_t>(pixels / width, 1);
    for (int64_t y = 0; y < height; y += rows) {
      for (int64_t x = 0; x < width; x += columns) {
        visit(Tile{y, x, std::min(rows, height - y), std::min(columns, width - x), begin, end});
      }
    }
  }
}

// visit(y, x) for the pixels of a tile.
template <typename Visit>
void for_pixels(const Tile& tile, const Visit& visit) {
  for (int64_t y = 0; y < tile.rows; ++y) {
    for (int64_t x = 0; x < tile.width; ++x) {
      visit(y, x);
    }
  }
}

// for_tiles for steps that go over the pixels in turn, all channels of each: maps that lie in memory, and not in a cache,
// are read in their order there. Of narrow maps every channel's numbers stay in registers instead.
constexpr int64_t kInTurn = kTileFloats / 2 * kSumPixels;

inline bool is_in_turn(const plan::Map& map) {
  return map.channels > kLine;
}

// Where a map, or a buffer that is gone over with maps, lies for one image.
struct View {
  float* data;
  int64_t row, pixel;

  View() = default;
  View(float* data, int64_t row, int64_t pixel) : data(data), row(row), pixel(pixel) {}
  View(const plan::Map& map, const plan::Image& image) : View(image.at(map), map.row, map.pixel) {}
  float* at(const Tile& tile) const {
    return data + tile.y * row + tile.x * pixel;
  }
  float* at(const Tile& tile, int64_t y, int64_t x) const {
    return at(tile) + y * row + x * pixel;
  }
};

inline const float* vector(int64_t offset, const plan::Image& image) {
  return offset < 0 ? nullptr : image.slab + offset;
}

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
