// The instruction sets that the CPU kernels are built for, and the choice among them, made once per process.
#pragma once

#include "../mixed_sum.h"

namespace nascompile {

enum class Isa { plain, avx2, avx512 };

// The best instruction set that is built in and that this processor has, unless a test chose a lesser one.
Isa selected_isa();
bool is_supported(Isa isa);
void select_isa(Isa isa);
const char* isa_name(Isa isa);

// Every kernel once per instruction set: cpu/<kernel>.cpp is compiled into each of these namespaces.
#define NASCOMPILE_CPU_KERNELS                                                              \
  void mixed_sum(const MixedSum& call, int64_t first_block, int64_t last_block);            \
  void mixed_sum_backward(const MixedSumBackward& call, int64_t first_block, int64_t last_block);

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
