#include "plan_ahead.h"

#include <algorithm>
#include <unordered_set>

#include "plan_uses.h"

namespace nascompile::plan {
namespace {

// Floats, all of them. How far to be ahead: a part of the second-level cache.
constexpr int64_t kAhead = int64_t{1} << 16;
constexpr int64_t kPart = 2048;  // of a map at a time
constexpr int64_t kLine = 16;

}  // namespace

Readings::Readings(const Operation* begin, const Operation* end, const int64_t* program, const uint8_t* flags) {
  std::unordered_set<int64_t> known;  // offsets of maps that were read or written
  for (const Operation* step = begin; step != end; ++step) {
    starts.push_back(static_cast<int64_t>(stretches.size()));
    std::vector<Stretch> maps;
    visit_uses(step->kind, step->fields, step->begins, program, flags, [&](const Map& map, Use use) {
      if (map.space != kSlab || !known.insert(map.offset).second || use != Use::reads || 2 * map.channels < map.pixel) {
        return;
      }
      const int64_t count = (map.height - 1) * map.row + (map.width - 1) * map.pixel + map.channels;
      maps.push_back({map.offset, map.image, count, 0});
    });
    interleave(maps);
  }
}

// A step reads its maps side by side: a few rows of each at a time.
void Readings::interleave(const std::vector<Stretch>& maps) {
  int64_t longest = 0;
  for (const Stretch& map : maps) {
    longest = std::max(longest, map.floats);
  }
  const int64_t parts = (longest + kPart - 1) / kPart;
  for (int64_t part = 0; part < parts; ++part) {
    for (const Stretch& map : maps) {
      const auto end = [&](int64_t number) { return map.floats * number / parts / kLine * kLine; };
      const int64_t begin = end(part);
      const int64_t count = (part + 1 == parts ? map.floats : end(part + 1)) - begin;
      if (count > 0) {
        stretches.push_back({map.offset + begin, map.image, count, floats});
        floats += count;
      }
    }
  }
}

int64_t Readings::before(int64_t step) const {
  const auto end = static_cast<int64_t>(stretches.size());
  const int64_t next = step < static_cast<int64_t>(starts.size()) ? starts[step] : end;
  return next < end ? stretches[next].before : floats;
}

void Ahead::begin(int64_t turn, int64_t step) {
  turn_ = turn;
  step_ = step;
  reach(0, 1);
}

void Ahead::reach(int64_t done, int64_t all) {
  const auto count = static_cast<int64_t>(readings_.stretches.size());
  if (count == 0) {
    return;
  }
  const int64_t first = readings_.before(step_);
  const int64_t now = first + (readings_.before(step_ + 1) - first) * done / all;
  const int64_t before = turn_ * readings_.floats;
  most_ = before + now + kAhead;
  if (image_ * readings_.floats + readings_.stretches[map_].before + (at_ - begin_) >= before + now) {
    go_to(image_, map_, at_ - begin_);
    return;
  }
  // what the step has read by itself is left out
  int64_t map = readings_.starts[step_];
  while (map < count && readings_.stretches[map].before + readings_.stretches[map].floats <= now) {
    ++map;
  }
  if (map == count) {
    go_to(turn_ + 1, 0, 0);
  } else {
    go_to(turn_, map, (now - readings_.stretches[map].before) / kLine * kLine);
  }
}

void Ahead::go_to(int64_t image, int64_t map, int64_t done) {
  image_ = image;
  map_ = map;
  if (image >= turns_.count) {
    begin_ = at_ = stop_ = nullptr;
    is_open_ = false;
    return;
  }
  const Readings::Stretch& found = readings_.stretches[map];
  const int64_t most = most_ - image * readings_.floats - found.before;
  begin_ = slab_ + found.offset + turns_.image(image) * found.image;
  at_ = begin_ + done;
  stop_ = begin_ + std::clamp<int64_t>(most, 0, found.floats);
  is_open_ = most > found.floats;
}

void Ahead::go_on() {
  const bool is_last = map_ + 1 == static_cast<int64_t>(readings_.stretches.size());
  is_last ? go_to(image_ + 1, 0, 0) : go_to(image_, map_ + 1, 0);
}

}  // namespace nascompile::plan
