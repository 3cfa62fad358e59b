#include "isa.h"

#include <cstdlib>
#include <string>

namespace nascompile {

bool is_supported(Isa isa) {
#ifdef NASCOMPILE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return isa == Isa::plain || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx2 && avx512);
#else
  return isa == Isa::plain;
#endif
}

// torch's own variable: who limits torch's kernels means ours too
static Isa allowed() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = value == nullptr ? "" : value;
  return name == "default" ? Isa::plain : name == "avx2" ? Isa::avx2 : Isa::avx512;
}

static Isa detect() {
  for (const Isa isa : {Isa::avx512, Isa::avx2}) {
    if (isa <= allowed() && is_supported(isa)) {
      return isa;
    }
  }
  return Isa::plain;
}

static Isa& current() {
  static Isa isa = detect();
  return isa;
}

Isa selected_isa() {
  return current();
}

void select_isa(Isa isa) {
  current() = isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "AVX512";
    case Isa::avx2:
      return "AVX2";
    case Isa::plain:
      return "DEFAULT";
  }
  return "DEFAULT";
}

int isa_lane(Isa isa) {
  return isa == Isa::avx512 ? 16 : 8;
}

}  // namespace nascompile
