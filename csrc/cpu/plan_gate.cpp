// Products of images: with another, or with one number a channel. Compiled once per instruction set.
#include "isa.h"
#include "plan_lanes.h"

namespace nascompile::CPU_CAPABILITY {

void plan_gate(const plan::Gate& step, const plan::Image& image) {
  const View source(step.image, image);
  const View target(step.target, image);
  View gate(step.gate, image);
  // the one pixel of a gate is read again and again
  const bool is_single = step.gate.height == 1 && step.gate.width == 1;
  if (is_single) {
    gate.row = gate.pixel = 0;
  }
  const bool flat = is_flat(step.image) && is_flat(step.target) && (is_single || is_flat(step.gate));
  double* moments = step.moments < 0 ? nullptr : image.sums + step.moments;
  for_tiles(step.target, flat, [&](const Tile& tile) {
    for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
      Channels<n> shift;
      Channels<n> total;
      Channels<n> squares;
      for (int64_t y = 0; y < tile.rows; ++y) {
        const float* in = source.at(tile) + y * source.row + channel;
        const float* factor = gate.at(tile) + y * gate.row + channel;
        float* out = target.at(tile) + y * target.row + channel;
        for (int64_t x = 0; x < tile.width; ++x) {
          Channels<n> value = multiply(Channels<n>(in), Channels<n>(factor));
          if (step.adds != 0) {
            value = add(value, Channels<n>(out));
          }
          value.store(out);
          if (moments != nullptr) {
            if (y == 0 && x == 0) {
              shift = value;
            }
            value = subtract(value, shift);
            total = add(total, value);
            squares = multiply_add(value, value, squares);
          }
          in += source.pixel;
          factor += gate.pixel;
          out += target.pixel;
        }
      }
      if (moments != nullptr) {
        add_moments(moments + channel, step.target.channels, tile.rows * tile.width, shift, total, squares);
      }
    });
  });
}

void plan_gate_gradient(const plan::GateGradient& step, const plan::Image& image) {
  const View gradient(step.gradient, image);
  const View source(step.image, image);
  float* target = image.at(step.target);
  const bool flat = is_flat(step.gradient) && is_flat(step.image);
  for_tiles(step.image, flat, [&](const Tile& tile) {
    for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
      Channels<n> products;
      for (int64_t y = 0; y < tile.rows; ++y) {
        const float* g = gradient.at(tile) + y * gradient.row + channel;
        const float* in = source.at(tile) + y * source.row + channel;
        for (int64_t x = 0; x < tile.width; ++x) {
          products = multiply_add(Channels<n>(g), Channels<n>(in), products);
          g += gradient.pixel;
          in += source.pixel;
        }
      }
      add(Channels<n>(target + channel), products).store(target + channel);
    });
  });
}

}  // namespace nascompile::CPU_CAPABILITY
