#include "plan_ahead.h"

#include <algorithm>
#include <cstdlib>

namespace nascompile::plan {
namespace {

// How far to be ahead, in floats: a part of the second-level cache.
constexpr int64_t kLine = 16;
int64_t kPart = std::getenv("PART") ? std::atoll(std::getenv("PART")) : 2048;
int64_t kAhead = std::getenv("AHEAD") ? std::atoll(std::getenv("AHEAD")) : int64_t{1} << 16;

template <typename T>
const T& as(const int64_t* fields) {
  return *reinterpret_cast<const T*>(fields);
}

}  // namespace

void Readings::add(const Map& map, bool is_read) {
  if (map.space != kSlab || !known_.insert(map.offset).second || !is_read || 2 * map.channels < map.pixel) {
    return;
  }
  const int64_t count = (map.height - 1) * map.row + (map.width - 1) * map.pixel + map.channels;
  step_.push_back({map.offset, map.image, count, 0});
}

// A step reads its maps side by side: a few rows of each at a time.
void Readings::interleave() {
  int64_t longest = 0;
  for (const Stretch& map : step_) {
    longest = std::max(longest, map.floats);
  }
  const int64_t parts = (longest + kPart - 1) / kPart;
  for (int64_t part = 0; part < parts; ++part) {
    for (const Stretch& map : step_) {
      const auto end = [&](int64_t number) { return map.floats * number / parts / kLine * kLine; };
      const int64_t begin = end(part);
      const int64_t count = (part + 1 == parts ? map.floats : end(part + 1)) - begin;
      if (count > 0) {
        stretches.push_back({map.offset + begin, map.image, count, floats});
        floats += count;
      }
    }
  }
  step_.clear();
}

void Readings::add(int64_t kind, const int64_t* fields, const int64_t* program, const uint8_t* flags) {
  starts.push_back(static_cast<int64_t>(stretches.size()));
  look(kind, fields, program, flags);
  interleave();
}

void Readings::look(int64_t kind, const int64_t* fields, const int64_t* program, const uint8_t* flags) {
  const auto terms = [&](const List<Term>& list) {
    for (const Term* term = list.in(program); term != list.in(program) + list.count; ++term) {
      if (term->flag < 0 || flags[term->flag] != 0) {
        add(term->map, true);
      }
    }
  };
  switch (kind) {
    case kLoad:
      return add(as<Load>(fields).target, as<Load>(fields).adds != 0);
    case kStore:
      return add(as<Store>(fields).source, true);
    case kStage:
      add(as<Stage>(fields).source, true);
      return add(as<Stage>(fields).target, false);
    case kConvolve:
      add(as<Convolve>(fields).x, true);
      return add(as<Convolve>(fields).y, false);
    case kConvolveBackward: {
      const auto& step = as<ConvolveBackward>(fields);
      terms(step.terms);
      add(step.x, true);
      if (step.needs_input != 0) {
        add(step.dx, step.adds != 0);
      }
      return;
    }
    case kPool:
      add(as<Pool>(fields).x, true);
      return add(as<Pool>(fields).y, false);
    case kPoolBackward:
      terms(as<PoolBackward>(fields).terms);
      return add(as<PoolBackward>(fields).dx, true);
    case kCombine:
      terms(as<Combine>(fields).terms);
      return add(as<Combine>(fields).target, as<Combine>(fields).adds != 0);
    case kReduce:
      add(as<Reduce>(fields).gradient, true);
      return terms(as<Reduce>(fields).terms);
    case kUnstage:
      add(as<Unstage>(fields).gradient, true);
      add(as<Unstage>(fields).source, true);
      return add(as<Unstage>(fields).target, as<Unstage>(fields).adds != 0);
    case kMask:
      add(as<Mask>(fields).value, true);
      return add(as<Mask>(fields).gradient, true);
    case kPick:
      add(as<Pick>(fields).source, true);
      return add(as<Pick>(fields).target, as<Pick>(fields).adds != 0);
    case kGate:
      add(as<Gate>(fields).image, true);
      return add(as<Gate>(fields).target, as<Gate>(fields).adds != 0);
    case kGateGradient:
      add(as<GateGradient>(fields).gradient, true);
      return add(as<GateGradient>(fields).image, true);
  }
}

void Ahead::begin(int64_t image, int64_t step) {
  const int64_t count = static_cast<int64_t>(readings_.stretches.size());
  if (count == 0) {
    return;
  }
  const int64_t map = readings_.starts[step];
  const int64_t now = image * readings_.floats + (map == count ? readings_.floats : readings_.stretches[map].before);
  const int64_t reached = image_ * readings_.floats + readings_.stretches[map_].before + (at_ - begin_);
  most_ = now + kAhead;
  if (reached > now) {
    go_to(image_, map_, at_ - begin_);
  } else if (map == count) {
    go_to(image + 1, 0, 0);
  } else {
    go_to(image, map, 0);
  }
}

void Ahead::go_to(int64_t image, int64_t map, int64_t done) {
  image_ = image;
  map_ = map;
  if (image >= images_) {
    begin_ = at_ = stop_ = nullptr;
    is_open_ = false;
    return;
  }
  const Readings::Stretch& found = readings_.stretches[map];
  const int64_t most = most_ - image * readings_.floats - found.before;
  begin_ = slab_ + found.offset + image * found.image;
  at_ = begin_ + done;
  stop_ = begin_ + std::clamp<int64_t>(most, 0, found.floats);
  is_open_ = most > found.floats;
}

void Ahead::go_on() {
  const bool is_last = map_ + 1 == static_cast<int64_t>(readings_.stretches.size());
  is_last ? go_to(image_ + 1, 0, 0) : go_to(image_, map_ + 1, 0);
}

}  // namespace nascompile::plan
