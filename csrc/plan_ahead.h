// Reads ahead: while a step computes, what the next ones will read comes from memory into the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"
#include "plan_sequence.h"

namespace nascompile::plan {

// What the steps of a phase are the first to read of an image, in their order: stretches of the slab.
struct Readings {
  struct Stretch {
    int64_t offset, image, floats;  // where it begins, how far apart it is for two images, how long it is
    int64_t before;                 // floats of all stretches before it
  };
  std::vector<Stretch> stretches;
  std::vector<int64_t> starts;  // per step: how many stretches the steps before it read
  int64_t floats = 0;           // of all stretches

  // Of steps whose flags hold.
  Readings(const Operation* begin, const Operation* end, const int64_t* program, const uint8_t* flags);

  // Floats of one image that the steps before this one are the first to read.
  int64_t before(int64_t step) const;

 private:
  void interleave(const std::vector<Stretch>& maps);
};

// The order in which one chunk goes over its images.
struct Turns {
  int64_t first, step, count;

  int64_t image(int64_t turn) const {
    return first + turn * step;
  }
};

// The place up to which one chunk has read ahead. It stays a bounded way before the steps, and never falls behind them.
class Ahead {
 public:
  Ahead(const Readings& readings, const float* slab, const Turns& turns)
      : readings_(readings), slab_(slab), turns_(turns) {}

  // A step begins, of the image whose turn it is.
  void begin(int64_t turn, int64_t step);

  // Of the step that has begun, `done` of `all` equal parts are computed.
  void reach(int64_t done, int64_t all);

  // Between kernels: where a map has been fetched, the next one is begun.
  void turn() {
    if (at_ >= stop_ && is_open_) {
      go_on();
    }
  }

  // Fetches the next cache lines of the map, at most `lines`. In loops that need all registers: it calls nothing.
  [[gnu::always_inline]] void fetch(int64_t lines) {
    constexpr int64_t kLine = 16;
    const float* at = at_;
    const float* const end = lines * kLine < stop_ - at ? at + lines * kLine : stop_;
#pragma GCC unroll 1
    for (; at < end; at += kLine) {
      __builtin_prefetch(at, 0, 2);
    }
    at_ = at;
  }

 private:
  void go_to(int64_t image, int64_t map, int64_t done);
  void go_on();

  const Readings& readings_;
  const float* const slab_;
  const Turns turns_;
  int64_t turn_ = 0, step_ = 0;   // what is being computed
  int64_t image_ = 0, map_ = 0;   // what is being fetched; the image by its turn
  int64_t most_ = 0;              // floats, counted from the first image on, that may be fetched now
  const float* begin_ = nullptr;  // of the map
  const float* at_ = nullptr;     // what is fetched next
  const float* stop_ = nullptr;   // the end of what may be fetched of the map now
  bool is_open_ = false;          // whether there is more after it
};

}  // namespace nascompile::plan
