// The taps of a depthwise kernel as rows, so that a column that is loaded once serves several pixels. Included once per
// instruction set.
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

}  // namespace
}  // namespace nascompile::CPU_CAPABILITY
