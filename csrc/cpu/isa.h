// The instruction sets that the CPU kernels are built for, and the choice among them, made once per process.
#pragma once

#include "../mixed_sum.h"
#include "../plan.h"

namespace nascompile {

namespace plan {
struct Run;
}

enum class Isa { plain, avx2, avx512 };

// The best instruction set that is built in and that this processor has, unless a test chose a lesser one.
Isa selected_isa();
bool is_supported(Isa isa);
void select_isa(Isa isa);
const char* isa_name(Isa isa);
// floats in a vector, at least 8: what the kernels want channels padded to
int isa_lane(Isa isa);

// Every kernel once per instruction set: cpu/<kernel>.cpp is compiled into each of these namespaces.
#define NASCOMPILE_CPU_KERNELS                                                                       \
  void mixed_sum(const MixedSum& call, int64_t first_block, int64_t last_block);                     \
  void mixed_sum_backward(const MixedSumBackward& call, int64_t first_block, int64_t last_block);    \
                                                                                                     \
  /* a step of a plan for one image, and the floats of Image.tile that it needs */                   \
  void plan_step(int64_t kind, const int64_t* fields, const plan::Image& image);                     \
  int64_t plan_tile(int64_t kind, const int64_t* fields, const int64_t* program);                    \
                                                                                                     \
  /* barrier operations that go over whole weights */                                                \
  void plan_pack_dense(const plan::PackDense& op, const plan::Run& run);                             \
  void plan_unpack_dense(const plan::UnpackDense& op, const plan::Run& run);                         \
                                                                                                     \
  void plan_load(const plan::Load& step, const plan::Image& image);                                  \
  void plan_store(const plan::Store& step, const plan::Image& image);                                \
  void plan_stage(const plan::Stage& step, const plan::Image& image);                                \
  void plan_convolve(const plan::Convolve& step, const plan::Image& image);                          \
  void plan_convolve_backward(const plan::ConvolveBackward& step, const plan::Image& image);         \
  void plan_pool(const plan::Pool& step, const plan::Image& image);                                  \
  void plan_pool_backward(const plan::PoolBackward& step, const plan::Image& image);                 \
  void plan_combine(const plan::Combine& step, const plan::Image& image);                            \
  void plan_reduce(const plan::Reduce& step, const plan::Image& image);                              \
  void plan_unstage(const plan::Unstage& step, const plan::Image& image);                            \
  void plan_mask(const plan::Mask& step, const plan::Image& image);                                  \
  void plan_pick(const plan::Pick& step, const plan::Image& image);                                  \
  void plan_gate(const plan::Gate& step, const plan::Image& image);                                  \
  void plan_gate_gradient(const plan::GateGradient& step, const plan::Image& image);                 \
  int64_t plan_convolve_tile(const plan::Convolve& step, const int64_t* program);                    \
  int64_t plan_convolve_backward_tile(const plan::ConvolveBackward& step, const int64_t* program);   \
  int64_t plan_pool_tile(const plan::Pool& step);                                                    \
  int64_t plan_pool_backward_tile(const plan::PoolBackward& step);

namespace DEFAULT {
NASCOMPILE_CPU_KERNELS
}
namespace AVX2 {
NASCOMPILE_CPU_KERNELS
}
namespace AVX512 {
NASCOMPILE_CPU_KERNELS
}

// pick(kernel): the variant of a kernel for this processor.
#ifdef NASCOMPILE_X86
#define NASCOMPILE_PICK(kernel)                                                        \
  (::nascompile::selected_isa() == ::nascompile::Isa::avx512 ? &::nascompile::AVX512::kernel \
   : ::nascompile::selected_isa() == ::nascompile::Isa::avx2 ? &::nascompile::AVX2::kernel   \
                                                             : &::nascompile::DEFAULT::kernel)
#else
#define NASCOMPILE_PICK(kernel) (&::nascompile::DEFAULT::kernel)
#endif

}  // namespace nascompile
