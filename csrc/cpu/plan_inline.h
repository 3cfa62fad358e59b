// What the compiler is told about the kernels of a plan.
#pragma once

// for what works on registers: a call would put them into memory
#define NASCOMPILE_INLINE [[gnu::always_inline]] inline
// for loops that need all registers: inside of a larger function they would share them
#define NASCOMPILE_APART [[gnu::noinline]] inline
