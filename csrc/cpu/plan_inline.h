// What the compiler is told about the kernels of a plan.
#pragma once

// for what works on registers: a call would put them into memory
#define NASCOMPILE_INLINE [[gnu::always_inline]] inline
// for loops that need all registers: inside of a larger function they would share them
#define NASCOMPILE_APART [[gnu::noinline]] inline

namespace nascompile {

// The address, and the compiler does not know from what it was computed: of what it knows it makes many constants of a loop
// and spills them.
template <typename T>
[[gnu::always_inline]] inline T* hidden(T* address) {
#ifdef __GNUC__
  asm("" : "+r"(address));
#endif
  return address;
}

}  // namespace nascompile
