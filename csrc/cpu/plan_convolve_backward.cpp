// A plan's convolutions, backward, one image at a time. Compiled once per instruction set.
#include <algorithm>

#include "../plan.h"
#include "isa.h"
#include "plan_depthwise.h"
#include "plan_gemm.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

// One term of dy: coefficient * map, from one row on.
struct Part {
  const float* map;
  int64_t row, pixel;
  const float* coefficient;  // or null for one
};

constexpr int kParts = 4;

// target (+)= constant + sum of kCount terms, over a rectangle of pixels.
template <int kCount>
void sum_parts(const Part* parts, const float* constant, bool adds, const Rectangle& all, int64_t channels) {
  // pixel after pixel: what comes from memory is read in its order there
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* maps[kCount + 1];
    for (int k = 0; k < kCount; ++k) {
      maps[k] = parts[k].map + row * parts[k].row;
    }
    float* target = all.target + row * all.target_row;
    for (int64_t column = 0; column < all.columns; ++column) {
      for (int64_t channel = 0; channel < channels; channel += kLane) {
        Vec sum = constant == nullptr ? Vec(0.0f) : Vec::loadu(constant + channel);
        if (adds) {
          sum = sum + Vec::loadu(target + channel);
        }
        for (int k = 0; k < kCount; ++k) {
          const Vec factor = parts[k].coefficient == nullptr ? Vec(1.0f) : Vec::loadu(parts[k].coefficient + channel);
          sum = at::vec::fmadd(factor, Vec::loadu(maps[k] + channel), sum);
        }
        sum.store(target + channel);
      }
      for (int k = 0; k < kCount; ++k) {
        maps[k] += parts[k].pixel;
      }
      target += all.target_pixel;
    }
  }
}

// The same where all kVecs vectors of channels have their coefficients in registers, and nothing is added to.
template <int kCount, int kVecs>
NASCOMPILE_APART void sum_held_parts(const Part* parts, const float* constant, const Rectangle& all) {
  const auto load = [](const float* from, float otherwise) {
    return registers<kVecs>(
        [=](int n) { return from == nullptr ? Vec(otherwise) : Vec::loadu(from + n * kLane); });
  };
  const auto first = load(constant, 0.0f);
  Vecs<kVecs> factors[kCount];
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) {
    factors[k] = load(parts[k].coefficient, 1.0f);
  }
  for (int64_t row = 0; row < all.rows; ++row) {
    const float* maps[kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      maps[k] = parts[k].map + row * parts[k].row;
    }
    float* target = all.target + row * all.target_row;
#pragma GCC unroll 2
    for (int64_t column = 0; column < all.columns; ++column) {
      auto sums = first;
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 4
        for (int n = 0; n < kVecs; ++n) {
          sums[n] = at::vec::fmadd(factors[k][n], Vec::loadu(maps[k] + n * kLane), sums[n]);
        }
        maps[k] += parts[k].pixel;
      }
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) {
        sums[n].store(target + n * kLane);
      }
      target += all.target_pixel;
    }
  }
}

// Two terms, g and y, are what a BatchNorm makes of dy; with up to four vectors of channels the coefficients fit.
bool sum_two_parts(const Part* parts, const float* constant, const Rectangle& all, int64_t channels) {
  if (channels == kLane) {
    sum_held_parts<2, 1>(parts, constant, all);
  } else if (channels == 2 * kLane) {
    sum_held_parts<2, 2>(parts, constant, all);
  } else if (kWide && channels == 4 * kLane) {
    sum_held_parts<2, 4>(parts, constant, all);
  } else {
    return false;
  }
  return true;
}

// dy of `all.rows` rows from row `row` on, into the rectangle's target.
void make_dy(const plan::ConvolveBackward& step, const plan::Image& image, int64_t row, const Rectangle& all) {
  const plan::Term* const terms = step.terms.in(image.program);
  const float* constant = step.constant == plan::kNone ? nullptr : image.slab + step.constant;
  bool adds = false;
  int64_t next = 0;
  do {
    Part parts[kParts];
    int count = 0;
    for (; next < step.terms.count && count < kParts; ++next) {
      const plan::Term& term = terms[next];
      if (image.holds(term.flag)) {
        parts[count++] = {
            image.at(term.map) + row * term.map.row,
            term.map.row,
            term.map.pixel,
            term.coefficient == plan::kNone ? nullptr : image.slab + term.coefficient};
      }
    }
    constexpr decltype(&sum_parts<0>) kSums[] = {
        sum_parts<0>, sum_parts<1>, sum_parts<2>, sum_parts<3>, sum_parts<4>};
    static_assert(sizeof(kSums) / sizeof(kSums[0]) == kParts + 1);
    if (count != 2 || adds || !sum_two_parts(parts, constant, all, step.y_channels)) {
      kSums[count](parts, constant, adds, all, step.y_channels);
    }
    constant = nullptr;
    adds = true;
  } while (next < step.terms.count);
}

bool adds(const plan::ConvolveBackward& step, const plan::Image& image) {
  return step.adds != 0 && !image.begins;
}

bool is_separable(const plan::ConvolveBackward& step) {
  return step.depthwise_taps.count > 0 && step.taps.count > 0;
}

// A pointwise convolution by itself: the gradient of a pixel of x depends on that pixel of y alone, so that dy is never
// stored whole.
bool is_pointwise(const plan::ConvolveBackward& step) {
  return step.depthwise_taps.count == 0 && step.taps.count == 1 && step.stride_h == 1 && step.stride_w == 1 &&
      step.x.height == step.y_height && step.x.width == step.y_width;
}

// The rows of a tile. The gradients of the weights are read and written once for each tile: it should be large, and dy of it
// fit the near caches.
int64_t backward_rows(const plan::ConvolveBackward& step) {
  const int64_t channels = std::max(step.x.channels, step.y_channels);
  int64_t pixels = 0;
  if (is_separable(step)) {
    pixels = kTileFloats / channels;
  } else if (is_pointwise(step)) {
    pixels = std::clamp<int64_t>(16384 / channels, 32, kTilePixels);
  } else if (step.taps.count == 0) {
    pixels = std::clamp<int64_t>(16384 / channels, 64, kTilePixels);
  } else {
    // the channels of x are gone over again and again
    pixels = std::clamp<int64_t>(6144 / step.x.channels, 32, kTilePixels);
  }
  return tile_rows(pixels, step.y_height, step.y_width);
}

// Pixel (top, left) of the gradient on, every step_h-th row and step_w-th column.
Rectangle grid_rectangle(
    const plan::Grid& grid, const plan::Map& padded, const plan::Map& dx, const plan::Image& image) {
  return {
      image.at(padded),
      padded.row,
      padded.pixel,
      image.at(dx) + grid.top * dx.row + grid.left * dx.pixel,
      grid.step_h * dx.row,
      grid.step_w * dx.pixel,
      grid.rows,
      grid.columns,
      image.ahead};
}

void make_dx(const plan::ConvolveBackward& step, const plan::Image& image) {
  const plan::Grid* const grids = step.grids.in(image.program);
  const Moments none(nullptr, nullptr, 0);
  for (int64_t number = 0; number < step.grids.count; ++number) {
    const plan::Grid& grid = grids[number];
    const Rectangle all = grid_rectangle(grid, step.padded, step.dx, image);
    const plan::Tap* const taps = grid.taps.in(image.program);
    if (step.depthwise_taps.count > 0) {
      const float* const weights = image.slab + step.depthwise_weights;
      depthwise({taps, grid.taps.count, weights, step.x.channels, adds(step, image), false}, all, none);
    } else {
      const float* const weights = image.slab + step.weights_transposed;
      dense({taps, grid.taps.count, weights, step.y_channels, step.x.channels, adds(step, image), false}, all, none);
    }
  }
}

// All gradients of the rows of `part`, whose source is x.
void pointwise_tile(
    const plan::ConvolveBackward& step, const plan::Image& image, int64_t row, const Rectangle& part) {
  const plan::Tap& tap = *step.taps.in(image.program);
  const plan::Map& dx = step.dx;
  Rectangle tile = part;
  tile.source += tap.offset;
  tile.target = image.tile;
  tile.target_row = step.y_width * step.y_channels;
  tile.target_pixel = step.y_channels;
  make_dy(step, image, row, tile);
  const int64_t size = tap.weight * step.x.channels * step.y_channels;
  if (step.gradient != plan::kNone) {
    dense_gradient(tile, step.x.channels, step.y_channels, image.gradients + step.gradient + size);
  }
  if (step.needs_input != 0) {
    const Rectangle back{
        tile.target,
        tile.target_row,
        tile.target_pixel,
        image.at(dx) + row * dx.row,
        dx.row,
        dx.pixel,
        part.rows,
        part.columns,
        image.ahead};
    const plan::Tap same{0, tap.weight};
    const float* const weights = image.slab + step.weights_transposed;
    const Moments none(nullptr, nullptr, 0);
    dense({&same, 1, weights, step.y_channels, step.x.channels, adds(step, image), false}, back, none);
  }
}

}  // namespace

int64_t plan_convolve_backward_tile(const plan::ConvolveBackward& step, const int64_t*) {
  const int64_t channels = step.x.channels + step.y_channels;
  return is_separable(step) || is_pointwise(step) ? backward_rows(step) * step.y_width * channels : 0;
}

void plan_convolve_backward(const plan::ConvolveBackward& step, const plan::Image& image) {
  const plan::Map& x = step.x;
  const plan::Map& padded = step.padded;
  const bool separable = is_separable(step);
  const bool needs_gradient = step.gradient != plan::kNone;
  const bool needs_depthwise_gradient = step.depthwise_gradient != plan::kNone;
  float* const gradient = needs_gradient ? image.gradients + step.gradient : nullptr;
  float* const spatial_gradient = needs_depthwise_gradient ? image.gradients + step.depthwise_gradient : nullptr;
  const plan::Tap* const depthwise_taps = step.depthwise_taps.in(image.program);
  const plan::Tap* const taps = step.taps.in(image.program);
  const Moments none(nullptr, nullptr, 0);
  const int64_t rows = backward_rows(step);
  float* const dy_tile = image.tile;
  float* const d_tile = dy_tile + rows * step.y_width * step.y_channels;

  for (int64_t row = 0; row < step.y_height; row += rows) {
    image.ahead->reach(row, step.y_height);
    // x as the forward taps read it, and the same pixels of the padded image
    const Rectangle part{
        image.at(x) + row * step.stride_h * x.row,
        step.stride_h * x.row,
        step.stride_w * x.pixel,
        image.at(padded) + row * padded.row,
        padded.row,
        padded.pixel,
        std::min(rows, step.y_height - row),
        step.y_width,
        image.ahead};
    if (is_pointwise(step)) {
      pointwise_tile(step, image, row, part);
    } else if (!separable) {
      make_dy(step, image, row, part);
      for (int64_t tap = 0; needs_gradient && tap < step.taps.count; ++tap) {
        Rectangle shifted = part;
        shifted.source += taps[tap].offset;
        const int64_t at = taps[tap].weight * x.channels * step.y_channels;
        dense_gradient(shifted, x.channels, step.y_channels, gradient + at);
      }
    } else {
      Rectangle tile = part;
      tile.target = dy_tile;
      tile.target_row = step.y_width * step.y_channels;
      tile.target_pixel = step.y_channels;
      make_dy(step, image, row, tile);
      if (needs_gradient) {
        Rectangle between = part;
        between.target = d_tile;
        between.target_row = step.y_width * x.channels;
        between.target_pixel = x.channels;
        const float* const weights = image.slab + step.depthwise_weights;
        depthwise({depthwise_taps, step.depthwise_taps.count, weights, x.channels, false, false}, between, none);
        // both lie without gaps
        const Rectangle flat{d_tile, 0, x.channels, dy_tile, 0, step.y_channels, 1, part.pixels(), image.ahead};
        const int64_t at = taps->weight * x.channels * step.y_channels;
        dense_gradient(flat, x.channels, step.y_channels, gradient + at);
      }
      if (step.needs_input != 0 || needs_depthwise_gradient) {
        Rectangle back = part;
        back.source = dy_tile;
        back.source_row = tile.target_row;
        back.source_pixel = step.y_channels;
        const float* const weights = image.slab + step.weights_transposed;
        dense({taps, 1, weights, step.y_channels, x.channels, false, false}, back, none);
      }
    }
    if (needs_depthwise_gradient) {
      depthwise_gradient(depthwise_taps, step.depthwise_taps.count, part, x.channels, spatial_gradient);
    }
  }
  image.ahead->reach(1, 1);
  if (step.needs_input != 0 && !is_pointwise(step)) {
    make_dx(step, image);
  }
}

}  // namespace nascompile::CPU_CAPABILITY
