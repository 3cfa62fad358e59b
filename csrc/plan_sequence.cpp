#include "plan_sequence.h"

#include "plan_uses.h"

namespace nascompile::plan {
namespace {

template <typename T>
const T* only(const Operation& op, int64_t kind) {
  return op.kind == kind ? &as<T>(op.fields) : nullptr;
}

// Whether an operation only sets a map to zero.
bool is_zero(const Operation& op) {
  const auto* step = only<Combine>(op, kCombine);
  return step != nullptr && step->terms.count == 0 && step->constant == kNone && step->adds == 0 &&
      step->activation == kIdentity && step->moments == kNone;
}

bool is_same(const Map& one, const Map& other) {
  return one.space == other.space && one.offset == other.offset && one.row == other.row && one.pixel == other.pixel &&
      one.channels == other.channels && one.height == other.height && one.width == other.width;
}

// Whether an operation adds to every pixel of what another one sets to zero.
bool adds_to_all(const Operation& op, const Operation& zero, const int64_t* program) {
  const auto* step = only<ConvolveBackward>(op, kConvolveBackward);
  if (step == nullptr || step->needs_input == 0 || step->adds == 0) {
    return false;
  }
  int64_t pixels = 0;
  for (int64_t k = 0; k < step->grids.count; ++k) {
    const Grid& grid = step->grids.in(program)[k];
    pixels += grid.rows * grid.columns;
  }
  return is_same(step->dx, as<Combine>(zero.fields).target) && pixels == step->dx.height * step->dx.width;
}

}  // namespace

void Sequence::add(const Operation& operation, const int64_t* program) {
  const std::size_t first = ends_.empty() ? 0 : ends_.back();
  operations_.push_back(operation);
  if (operations_.size() > first + 1) {
    Operation& before = operations_[operations_.size() - 2];
    if (is_zero(before) && adds_to_all(operation, before, program)) {
      // what would be added to zeros is written, and the zeros are not
      before = operation;
      before.begins = true;
      operations_.pop_back();
    }
  }
}

}  // namespace nascompile::plan
