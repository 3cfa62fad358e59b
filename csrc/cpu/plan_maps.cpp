// The steps of a plan that go over whole maps, channel by channel: copies in and out, activations, sums.
// kernels/plan/steps.py has the formulas. Compiled once per instruction set.
#include <cstring>

#include <algorithm>

#include "isa.h"
#include "plan_activations.h"
#include "plan_transpose.h"

namespace nascompile::CPU_CAPABILITY {
namespace {

constexpr int kGroup = 4;    // maps that are read at once: their coefficients stay in registers
constexpr int kTerms = 128;  // terms whose places are looked up at once

// ---- sums of maps

struct Source {
  View view;
  const float* coefficient;
};

// The next terms whose flags hold, from `next` on; their number.
int read_terms(const plan::List<plan::Term>& terms, const plan::Image& image, int64_t& next, Source* sources) {
  int count = 0;
  for (; next < terms.count && count < kTerms; ++next) {
    const plan::Term& term = terms.in(image.program)[next];
    if (image.holds(term.flag)) {
      sources[count++] = {View(term.map, image), vector(term.coefficient, image)};
    }
  }
  return count;
}

bool all_flat(const plan::List<plan::Term>& terms, const plan::Image& image) {
  const plan::Term* items = terms.in(image.program);
  return std::all_of(items, items + terms.count, [](const plan::Term& term) { return is_flat(term.map); });
}

// to = from + sum of K coefficient * map, for the channels [channel, channel + N) of a tile's pixels
template <int N, int K>
void add_maps(const Source* sources, const Tile& tile, int64_t channel, const View& from, const View& to) {
  Channels<N> coefficients[K + 1];
  const float* maps[K + 1];
  for (int k = 0; k < K; ++k) {
    coefficients[k] = Channels<N>(sources[k].coefficient, channel, 1.0f);
  }
  for (int64_t y = 0; y < tile.rows; ++y) {
    for (int k = 0; k < K; ++k) {
      maps[k] = sources[k].view.at(tile) + y * sources[k].view.row + channel;
    }
    const float* in = from.data + y * from.row;
    float* out = to.data + y * to.row;
    for (int64_t x = 0; x < tile.width; ++x) {
      Channels<N> sum(in);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        sum = multiply_add(coefficients[k], Channels<N>(maps[k]), sum);
        maps[k] += sources[k].view.pixel;
      }
      sum.store(out);
      in += from.pixel;
      out += to.pixel;
    }
  }
}

template <int N>
void add_group(
    const Source* sources, int count, const Tile& tile, int64_t channel, const View& from, const View& to) {
  switch (count) {
    case 0:
      return add_maps<N, 0>(sources, tile, channel, from, to);
    case 1:
      return add_maps<N, 1>(sources, tile, channel, from, to);
    case 2:
      return add_maps<N, 2>(sources, tile, channel, from, to);
    case 3:
      return add_maps<N, 3>(sources, tile, channel, from, to);
    default:
      return add_maps<N, kGroup>(sources, tile, channel, from, to);
  }
}

// The mean of a row's first pixels as `finish` stores them: sums are taken about it. Of several, for one of them may be
// far from all others: the only one that a ReLU let through.
template <int N, int64_t A>
Channels<N> first_mean(const plan::Combine& step, const Tile& tile, const View& sum, const View& target) {
  const int64_t pixels = std::min<int64_t>(tile.width, 8);
  Channels<N> total;
  for (int64_t x = 0; x < pixels; ++x) {
    total = add(total, activate<A>(Channels<N>(sum.data + x * sum.pixel)));
    if (step.adds) {
      total = add(total, Channels<N>(target.data + x * target.pixel));
    }
  }
  return multiply(total, Channels<N>(1.0f / static_cast<float>(pixels)));
}

// target (+)= activation(sum), with moments
template <int N, int64_t A>
void finish(const plan::Combine& step, const Tile& tile, int64_t channel, const View& sum, const View& target, double* moments) {
  Channels<N> shift;
  Channels<N> total;
  Channels<N> squares;
  if (moments != nullptr) {
    shift = first_mean<N, A>(step, tile, sum, target);
  }
  for (int64_t y = 0; y < tile.rows; ++y) {
    const float* in = sum.data + y * sum.row;
    float* out = target.data + y * target.row;
    for (int64_t x = 0; x < tile.width; ++x) {
      Channels<N> value = activate<A>(Channels<N>(in));
      if (step.adds) {
        value = add(value, Channels<N>(out));
      }
      value.store(out);
      if (moments != nullptr) {
        value = subtract(value, shift);
        total = add(total, value);
        squares = multiply_add(value, value, squares);
      }
      in += sum.pixel;
      out += target.pixel;
    }
  }
  if (moments != nullptr) {
    add_moments(moments + channel, step.target.channels, tile.rows * tile.width, shift, total, squares);
  }
}

// ---- sums over pixels

// sums[k] += sum over a tile's pixels of gradient * map, for K maps; `total` += sum of the gradient where it is there
template <int N, int K, bool about>
void reduce_maps(
    const Source* sources, double* const* sums, double* total, const Tile& tile, int64_t channel, const View& gradient,
    const Channels<N>* shifts) {
  Channels<N> products[K + 1];
  const float* maps[K + 1];
  Channels<N> plain;
  for (int64_t y = 0; y < tile.rows; ++y) {
    for (int k = 0; k < K; ++k) {
      maps[k] = sources[k].view.at(tile) + y * sources[k].view.row + channel;
    }
    const float* in = gradient.at(tile) + y * gradient.row + channel;
    for (int64_t x = 0; x < tile.width; ++x) {
      const Channels<N> value(in);
      plain = add(plain, value);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const Channels<N> read(maps[k]);
        products[k] = multiply_add(value, about ? subtract(read, shifts[k]) : read, products[k]);
        maps[k] += sources[k].view.pixel;
      }
      in += gradient.pixel;
    }
  }
  for (int k = 0; k < K; ++k) {
    if constexpr (about) {
      add_products(sums[k] + channel, shifts[k], plain, products[k]);
    } else {
      add_to(sums[k] + channel, products[k]);
    }
  }
  if (total != nullptr) {
    add_to(total + channel, plain);
  }
}

// the same about numbers near the maps, where they are far from zero
template <int N, int K>
void reduce_some(
    const Source* sources, double* const* sums, double* total, const Tile& tile, int64_t channel, const View& gradient) {
  Channels<N> shifts[K + 1];
  bool is_far = false;
  for (int k = 0; k < K; ++k) {
    const View& map = sources[k].view;
    const Range<N> range(map.at(tile) + channel, map.pixel, tile.width);
    shifts[k] = range.middle;
    is_far |= range.is_far();
  }
  if (is_far) {
    return reduce_maps<N, K, true>(sources, sums, total, tile, channel, gradient, shifts);
  }
  reduce_maps<N, K, false>(sources, sums, total, tile, channel, gradient, shifts);
}

template <int N>
void reduce_group(
    const Source* sources,
    int count,
    double* const* sums,
    double* total,
    const Tile& tile,
    int64_t channel,
    const View& gradient) {
  switch (count) {
    case 0:
      return reduce_some<N, 0>(sources, sums, total, tile, channel, gradient);
    case 1:
      return reduce_some<N, 1>(sources, sums, total, tile, channel, gradient);
    case 2:
      return reduce_some<N, 2>(sources, sums, total, tile, channel, gradient);
    case 3:
      return reduce_some<N, 3>(sources, sums, total, tile, channel, gradient);
    default:
      return reduce_some<N, kGroup>(sources, sums, total, tile, channel, gradient);
  }
}

// ---- torch tensors

template <typename T>
struct Strided {
  T* data;  // the image's
  int64_t channel, row, pixel;

  template <typename Step>
  Strided(const Step& step, const plan::Image& image)
      : data(static_cast<T*>(image.tensors[step.tensor]) + image.number * step.stride_n),
        channel(step.stride_c),
        row(step.stride_h),
        pixel(step.stride_w) {}
};

// visit(segment, y, pixels in the row) for every row of the map and every segment; all rows as one where both allow it
template <typename Step, typename Visit>
void for_rows(const Step& step, const plan::Map& map, const plan::Image& image, const Visit& visit) {
  const bool flat = is_flat(map) && (map.height == 1 || step.stride_h == map.width * step.stride_w);
  const plan::Segment* segments = step.segments.in(image.program);
  for (int64_t y = 0; y < (flat ? 1 : map.height); ++y) {
    for (int64_t k = 0; k < step.segments.count; ++k) {
      visit(segments[k], y, flat ? map.height * map.width : map.width);
    }
  }
}

template <bool adds>
void load_rows(const plan::Load& step, const plan::Image& image) {
  const Strided<const float> tensor(step, image);
  const plan::Map& map = step.target;
  for_rows(step, map, image, [&](const plan::Segment& segment, int64_t y, int64_t width) {
    const float* from = tensor.data + y * tensor.row + segment.logical * tensor.channel;
    float* to = image.at(map) + y * map.row + segment.padded;
    if (tensor.pixel == 1 && tensor.channel != 1) {
      return transpose_all<adds>(from, tensor.channel, to, map.pixel, width, segment.count);
    }
    for (int64_t x = 0; x < width; ++x, from += tensor.pixel, to += map.pixel) {
      for (int64_t c = 0; c < segment.count; ++c) {
        const float value = from[c * tensor.channel];
        to[c] = adds ? to[c] + value : value;
      }
    }
  });
}

}  // namespace

void plan_load(const plan::Load& step, const plan::Image& image) {
  if (step.adds) {
    return load_rows<true>(step, image);
  }
  const plan::Map& map = step.target;
  const plan::Segment* segments = step.segments.in(image.program);
  int64_t covered = 0;
  for (int64_t k = 0; k < step.segments.count; ++k) {
    covered += segments[k].count;
  }
  if (covered < map.channels) {
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x) {
        std::fill_n(image.at(map) + y * map.row + x * map.pixel, map.channels, 0.0f);
      }
    }
  }
  load_rows<false>(step, image);
}

void plan_store(const plan::Store& step, const plan::Image& image) {
  const Strided<float> tensor(step, image);
  const plan::Map& map = step.source;
  for_rows(step, map, image, [&](const plan::Segment& segment, int64_t y, int64_t width) {
    const float* from = image.at(map) + y * map.row + segment.padded;
    float* to = tensor.data + y * tensor.row + segment.logical * tensor.channel;
    if (tensor.pixel == 1 && tensor.channel != 1) {
      return transpose_all<false>(from, map.pixel, to, tensor.channel, segment.count, width);
    }
    for (int64_t x = 0; x < width; ++x, from += map.pixel, to += tensor.pixel) {
      for (int64_t c = 0; c < segment.count; ++c) {
        to[c * tensor.channel] = from[c];
      }
    }
  });
}

void plan_stage(const plan::Stage& step, const plan::Image& image) {
  const float* scale = vector(step.scale, image);
  const float* shift = vector(step.shift, image);
  const View source(step.source, image);
  const View target(step.target, image);
  const bool flat = is_flat(step.source) && is_flat(step.target);
  switch_activation(step.activation, [&](auto activation) {
    if (is_in_turn(step.source)) {
      const auto visit = [&](const Tile& tile) {
        for_pixels(tile, [&](int64_t y, int64_t x) {
          const float* const in = source.at(tile, y, x);
          float* const out = target.at(tile, y, x);
          for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
            const Channels<n> factor(scale, channel, 1.0f);
            const Channels<n> offset(shift, channel, 0.0f);
            activate<activation>(multiply_add(factor, Channels<n>(in + channel), offset)).store(out + channel);
          });
        });
      };
      return for_tiles(step.source, flat, visit, kInTurn);
    }
    for_tiles(step.source, flat, [&](const Tile& tile) {
      for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
        const Channels<n> factor(scale, channel, 1.0f);
        const Channels<n> offset(shift, channel, 0.0f);
        for (int64_t y = 0; y < tile.rows; ++y) {
          const float* in = source.at(tile) + y * source.row + channel;
          float* out = target.at(tile) + y * target.row + channel;
          for (int64_t x = 0; x < tile.width; ++x) {
            activate<activation>(multiply_add(factor, Channels<n>(in), offset)).store(out);
            in += source.pixel;
            out += target.pixel;
          }
        }
      });
    });
  });
}

void plan_combine(const plan::Combine& step, const plan::Image& image) {
  Source sources[kTerms];
  alignas(64) float buffer[kTileFloats];
  alignas(64) float first[kLine];
  const float* constant = vector(step.constant, image);
  const View target(step.target, image);
  const bool flat = is_flat(step.target) && all_flat(step.terms, image);
  const bool is_plain = step.activation == plan::kIdentity && !step.adds && step.moments < 0;
  double* moments = step.moments < 0 ? nullptr : image.sums + step.moments;
  int64_t next = 0;
  int count = read_terms(step.terms, image, next, sources);
  const bool fits = next == step.terms.count;
  for_tiles(step.target, flat, [&](const Tile& tile) {
    // partial sums lie channel line by channel line
    const auto partial = [&](int64_t channel) {
      const int64_t width = std::min(kLine, tile.end - channel);
      return View(buffer + (channel - tile.begin) * tile.rows * tile.width, tile.width * width, width);
    };
    if (!fits) {
      next = 0;
      count = read_terms(step.terms, image, next, sources);
    }
    bool is_first = true;
    bool is_last = false;
    while (!is_last) {
      for (int k = 0; k == 0 || k < count; k += kGroup) {
        const int group = std::min(kGroup, count - k);
        is_last = next == step.terms.count && k + kGroup >= count;
        for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
          const View sum = partial(channel);
          View from = sum;
          if (is_first) {
            Channels<n>(constant, channel, 0.0f).store(first);
            from = View(first, 0, 0);
          }
          if (is_last && is_plain) {
            return add_group<n>(
                sources + k, group, tile, channel, from, View(target.at(tile) + channel, target.row, target.pixel));
          }
          add_group<n>(sources + k, group, tile, channel, from, sum);
        });
        is_first = false;
      }
      if (!is_last) {
        count = read_terms(step.terms, image, next, sources);
      }
    }
    if (is_plain) {
      return;
    }
    switch_activation(step.activation, [&](auto activation) {
      for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
        const View out(target.at(tile) + channel, target.row, target.pixel);
        finish<n, activation>(step, tile, channel, partial(channel), out, moments);
      });
    });
  });
}

void plan_reduce(const plan::Reduce& step, const plan::Image& image) {
  Source sources[kGroup];
  double* sums[kGroup];
  const View gradient(step.gradient, image);
  const plan::Term* terms = step.terms.in(image.program);
  const bool flat = is_flat(step.gradient) && all_flat(step.terms, image);
  for_tiles(step.gradient, flat, [&](const Tile& tile) {
    double* total = step.total < 0 ? nullptr : image.sums + step.total;
    int64_t next = 0;
    while (next < step.terms.count || total != nullptr) {
      int count = 0;
      for (; next < step.terms.count && count < kGroup; ++next) {
        if (image.holds(terms[next].flag)) {
          sources[count] = {View(terms[next].map, image), nullptr};
          sums[count++] = image.sums + terms[next].coefficient;
        }
      }
      for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
        reduce_group<n>(sources, count, sums, total, tile, channel, gradient);
      });
      total = nullptr;
    }
  });
}

namespace {

// What is the same for all channels of an Unstage.
struct Unstaging {
  const plan::Unstage& step;
  const float* scale;
  const float* shift;
  View gradient, source, target;
  bool streams;

  // One pixel's channels: adds the gradient that is passed on to `total`, times the source about a number to `products`.
  template <int64_t A, int N>
  NASCOMPILE_INLINE void pass(
      const float* in, const float* value, float* out, const Channels<N>& factor, const Channels<N>& offset,
      const Channels<N>& about, Channels<N>& total, Channels<N>& products) const {
    const Channels<N> read(value);
    Channels<N> passed = hand_back<A>(Channels<N>(in), multiply_add(factor, read, offset));
    total = add(total, passed);
    products = multiply_add(passed, subtract(read, about), products);
    if (step.adds) {
      passed = add(passed, Channels<N>(out));
    }
    if (streams) {
      passed.stream(out);
    } else {
      passed.store(out);
    }
  }

  // A tile pixel after pixel: the sums of all channels wait in memory.
  template <int64_t A>
  void in_turn(const Tile& tile, double* moments) const {
    alignas(64) float totals[kTileFloats / 2];
    alignas(64) float products[kTileFloats / 2];
    alignas(64) float abouts[kTileFloats / 2];
    for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
      const Range<n> range(source.at(tile) + channel, source.pixel, tile.width);
      range.middle.store(abouts + channel - tile.begin);
    });
    std::fill_n(totals, tile.end - tile.begin, 0.0f);
    std::fill_n(products, tile.end - tile.begin, 0.0f);
    for_pixels(tile, [&](int64_t y, int64_t x) {
      const float* const in = gradient.at(tile, y, x);
      const float* const value = source.at(tile, y, x);
      float* const out = target.at(tile, y, x);
      for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
        const int64_t at = channel - tile.begin;
        Channels<n> total(totals + at);
        Channels<n> product(products + at);
        const Channels<n> factor(scale, channel, 1.0f);
        const Channels<n> offset(shift, channel, 0.0f);
        const Channels<n> about(abouts + at);
        pass<A>(in + channel, value + channel, out + channel, factor, offset, about, total, product);
        total.store(totals + at);
        product.store(products + at);
      });
    });
    if (moments != nullptr) {
      for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
        const int64_t at = channel - tile.begin;
        const Channels<n> total(totals + at);
        add_to(moments + channel, total);
        add_products(
            moments + step.source.channels + channel, Channels<n>(abouts + at), total, Channels<n>(products + at));
      });
    }
  }

  // A tile channel after channel: their numbers stay in registers.
  template <int64_t A>
  void by_channel(const Tile& tile, double* moments) const {
    for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
      const Channels<n> factor(scale, channel, 1.0f);
      const Channels<n> offset(shift, channel, 0.0f);
      Channels<n> total;
      Channels<n> products;
      const Channels<n> about = Range<n>(source.at(tile) + channel, source.pixel, tile.width).middle;
      for_pixels(tile, [&](int64_t y, int64_t x) {
        const float* const in = gradient.at(tile, y, x) + channel;
        const float* const value = source.at(tile, y, x) + channel;
        pass<A>(in, value, target.at(tile, y, x) + channel, factor, offset, about, total, products);
      });
      if (moments != nullptr) {
        add_to(moments + channel, total);
        add_products(moments + step.source.channels + channel, about, total, products);
      }
    });
  }
};

}  // namespace

void plan_unstage(const plan::Unstage& step, const plan::Image& image) {
  double* moments = step.moments < 0 ? nullptr : image.sums + step.moments;
  const Unstaging unstaging{
      step,
      vector(step.scale, image),
      vector(step.shift, image),
      View(step.gradient, image),
      View(step.source, image),
      View(step.target, image),
      // what has moments waits for those of the whole batch before anyone reads it
      image.streams && moments != nullptr && step.target.space == plan::kSlab};
  const bool flat = is_flat(step.gradient) && is_flat(step.source) && is_flat(step.target);
  switch_activation(step.activation, [&](auto activation) {
    if (is_in_turn(step.source)) {
      for_tiles(
          step.source, flat, [&](const Tile& tile) { unstaging.in_turn<activation>(tile, moments); }, kInTurn);
    } else {
      for_tiles(step.source, flat, [&](const Tile& tile) { unstaging.by_channel<activation>(tile, moments); });
    }
  });
}

void plan_mask(const plan::Mask& step, const plan::Image& image) {
  const View gradient(step.gradient, image);
  const View value(step.value, image);
  const bool flat = is_flat(step.gradient) && is_flat(step.value);
  switch_mask(step.activation, [&](auto activation) {
    for_tiles(step.gradient, flat, [&](const Tile& tile) {
      for_channels(tile.begin, tile.end, [&](int64_t channel, auto n) {
        for (int64_t y = 0; y < tile.rows; ++y) {
          const float* in = value.at(tile) + y * value.row + channel;
          float* out = gradient.at(tile) + y * gradient.row + channel;
          for (int64_t x = 0; x < tile.width; ++x) {
            hand_back<activation>(Channels<n>(out), Channels<n>(in)).store(out);
            in += value.pixel;
            out += gradient.pixel;
          }
        }
      });
    });
  });
}

void plan_pick(const plan::Pick& step, const plan::Image& image) {
  for (int64_t y = 0; y < step.target.height; ++y) {
    const float* in = image.at(step.source) + y * step.source.row + step.first_source;
    float* out = image.at(step.target) + y * step.target.row;
    for (int64_t x = 0; x < step.target.width; ++x) {
      float* to = out + step.first_target;
      if (step.adds != 0) {
        for (int64_t i = 0; i < step.count; ++i) {
          to[i * step.step_target] += in[i * step.step_source];
        }
      } else {
        std::fill_n(out, step.target.channels, 0.0f);
        for (int64_t i = 0; i < step.count; ++i) {
          to[i * step.step_target] = in[i * step.step_source];
        }
      }
      in += step.source.pixel;
      out += step.target.pixel;
    }
  }
}

}  // namespace nascompile::CPU_CAPABILITY
