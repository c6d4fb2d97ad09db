// Instruction sets: which there are, which one is in use, and how a function is compiled for one of them.
#pragma once
#include "mars_native.h"

// Compilers that know all of these instruction sets; others build the portable code.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MARS_X86 1
#include <immintrin.h>
#define MARS_AVX2 __attribute__((target("avx2,fma")))
#define MARS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define MARS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define MARS_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#define MARS_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#endif

#if defined(__GNUC__)
#define MARS_INLINE inline __attribute__((always_inline))  // so that the code takes on its caller's instruction set
#else
#define MARS_INLINE inline
#endif

namespace mars {

// In the order of preference: the last one that is supported is used unless mars_set_level says otherwise.
// They are alternatives, not a ladder: a processor may have VNNI and not BF16. A kernel without a version of its own
// for a level takes that of the widest plain vectors (`vectors`).
enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, BF16 = 3, VNNI = 4, AMX = 5 };

Level level();

// PORTABLE, AVX2 or AVX512: what float32 code has at the level in use.
inline Level vectors() { return level() > AVX512 ? AVX512 : level(); }

}  // namespace mars
