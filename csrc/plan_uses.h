// Which maps a step reads and writes.
#pragma once

#include <cstdint>

#include "plan.h"

namespace nascompile::plan {

// How a step uses a map: what it held before counts, or every pixel of it is written whatever it held.
enum class Use { reads, replaces };

template <typename T>
const T& as(const int64_t* fields) {
  return *reinterpret_cast<const T*>(fields);
}

// visit(map, use) for the maps of a step, in the order in which it goes to them; terms only where their flags hold.
// `begins` as in Image.
template <typename Visit>
void visit_uses(
    int64_t kind, const int64_t* fields, bool begins, const int64_t* program, const uint8_t* flags, const Visit& visit) {
  const auto terms = [&](const List<Term>& list) {
    for (const Term* term = list.in(program); term != list.in(program) + list.count; ++term) {
      if (term->flag < 0 || flags[term->flag] != 0) {
        visit(term->map, Use::reads);
      }
    }
  };
  const auto target = [&](const Map& map, bool adds) { visit(map, adds ? Use::reads : Use::replaces); };
  switch (kind) {
    case kLoad:
      return target(as<Load>(fields).target, as<Load>(fields).adds != 0);
    case kStore:
      return visit(as<Store>(fields).source, Use::reads);
    case kStage:
      visit(as<Stage>(fields).source, Use::reads);
      return target(as<Stage>(fields).target, false);
    case kConvolve:
      visit(as<Convolve>(fields).x, Use::reads);
      return target(as<Convolve>(fields).y, false);
    case kConvolveBackward: {
      const auto& step = as<ConvolveBackward>(fields);
      terms(step.terms);
      visit(step.x, Use::reads);
      if (step.needs_input != 0) {
        target(step.dx, step.adds != 0 && !begins);
      }
      return;
    }
    case kPool:
      visit(as<Pool>(fields).x, Use::reads);
      return target(as<Pool>(fields).y, false);
    case kPoolBackward:
      terms(as<PoolBackward>(fields).terms);
      return target(as<PoolBackward>(fields).dx, true);
    case kCombine:
      terms(as<Combine>(fields).terms);
      return target(as<Combine>(fields).target, as<Combine>(fields).adds != 0);
    case kReduce:
      visit(as<Reduce>(fields).gradient, Use::reads);
      return terms(as<Reduce>(fields).terms);
    case kUnstage:
      visit(as<Unstage>(fields).gradient, Use::reads);
      visit(as<Unstage>(fields).source, Use::reads);
      return target(as<Unstage>(fields).target, as<Unstage>(fields).adds != 0);
    case kMask:
      visit(as<Mask>(fields).value, Use::reads);
      return target(as<Mask>(fields).gradient, true);
    case kPick:
      visit(as<Pick>(fields).source, Use::reads);
      return target(as<Pick>(fields).target, as<Pick>(fields).adds != 0);
    case kGate:
      visit(as<Gate>(fields).image, Use::reads);
      visit(as<Gate>(fields).gate, Use::reads);
      return target(as<Gate>(fields).target, as<Gate>(fields).adds != 0);
    case kGateGradient:
      visit(as<GateGradient>(fields).gradient, Use::reads);
      visit(as<GateGradient>(fields).image, Use::reads);
      return target(as<GateGradient>(fields).target, true);
  }
}

}  // namespace nascompile::plan
