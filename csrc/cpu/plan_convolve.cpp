// A plan's convolutions, forward, one image at a time. Compiled once per instruction set.
#include "../plan.h"
#include "isa.h"
#include "plan_depthwise.h"
#include "plan_gemm.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

int64_t forward_rows(const plan::Convolve& step) {
  const bool through_tile = step.depthwise_taps.count > 0 && step.taps.count > 0;
  return tile_rows(through_tile ? kTileFloats / step.x.channels : kTilePixels, step.y.height, step.y.width);
}

// What has moments waits for those of the whole batch before anyone reads it.
bool streams(const plan::Convolve& step, const plan::Image& image) {
  return image.streams && step.moments != plan::kNone && step.y.space == plan::kSlab;
}

}  // namespace

int64_t plan_convolve_tile(const plan::Convolve& step, const int64_t*) {
  const bool through_tile = step.depthwise_taps.count > 0 && step.taps.count > 0;
  return 3 * step.y.channels + (through_tile ? forward_rows(step) * step.y.width * step.x.channels : 0);
}

void plan_convolve(const plan::Convolve& step, const plan::Image& image) {
  const plan::Map& x = step.x;
  const plan::Map& y = step.y;
  const Depthwise spatial{
      step.depthwise_taps.in(image.program),
      step.depthwise_taps.count,
      image.slab + step.depthwise_weights,
      x.channels,
      false,
      step.taps.count == 0 && streams(step, image)};
  const Dense mixing{
      step.taps.in(image.program), step.taps.count, image.slab + step.weights, x.channels, y.channels, false, streams(step, image)};
  const Moments none(nullptr, nullptr, 0);
  const Moments moments(image.tile, step.moments == plan::kNone ? nullptr : image.sums + step.moments, y.channels);
  float* const tile = image.tile + 3 * y.channels;
  const int64_t tile_row = y.width * x.channels;
  const int64_t rows = forward_rows(step);
  for (int64_t row = 0; row < y.height; row += rows) {
    image.ahead->reach(row, y.height);
    Rectangle part;
    part.rows = y.height - row < rows ? y.height - row : rows;
    part.columns = y.width;
    part.source = image.at(x) + row * step.stride_h * x.row;
    part.source_row = step.stride_h * x.row;
    part.source_pixel = step.stride_w * x.pixel;
    part.target = image.at(y) + row * y.row;
    part.target_row = y.row;
    part.target_pixel = y.pixel;
    part.ahead = image.ahead;
    if (spatial.count == 0) {
      dense(mixing, part, moments);
    } else if (mixing.count == 0) {
      depthwise(spatial, part, moments);
    } else {
      Rectangle between = part;
      between.target = tile;
      between.target_row = tile_row;
      between.target_pixel = x.channels;
      depthwise(spatial, between, none);
      part.source = tile;
      part.source_row = tile_row;
      part.source_pixel = x.channels;
      dense(mixing, part, moments);
    }
  }
}

}  // namespace nascompile::CPU_CAPABILITY
