// The most float32 multiply-adds that this processor makes: independent chains in registers, no memory.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#define CHAINS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)

__attribute__((target("avx512f"))) static float run512(int64_t steps, float a) {
  const __m512 x = _mm512_set1_ps(a), y = _mm512_set1_ps(a);
#define START(i) __m512 s##i = _mm512_set1_ps(a * i);
  CHAINS(START)
#undef START
  for (int64_t n = 0; n < steps; ++n) {
#define STEP(i) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(s##i) : "v"(x), "v"(y));
    CHAINS(STEP) CHAINS(STEP) CHAINS(STEP) CHAINS(STEP)
#undef STEP
  }
  __m512 sum = x;
#define ADD(i) sum = _mm512_add_ps(sum, s##i);
  CHAINS(ADD)
#undef ADD
  return _mm512_reduce_add_ps(sum);
}

__attribute__((target("avx2,fma"))) static float run256(int64_t steps, float a) {
  const __m256 x = _mm256_set1_ps(a), y = _mm256_set1_ps(a);
#define START(i) __m256 s##i = _mm256_set1_ps(a * i);
  CHAINS(START)
#undef START
  for (int64_t n = 0; n < steps; ++n) {
#define STEP(i) asm volatile("vfmadd231ps %1, %2, %0" : "+x"(s##i) : "x"(x), "x"(y));
    CHAINS(STEP) CHAINS(STEP) CHAINS(STEP) CHAINS(STEP)
#undef STEP
  }
  __m256 sum = x;
#define ADD(i) sum = _mm256_add_ps(sum, s##i);
  CHAINS(ADD)
#undef ADD
  return sum[0];
}
#endif

// Works for about `flop` float32 operations on each of `threads` threads; returns how many they were in all.
extern "C" double fma_peak(double flop, int threads, float *sink) {
  double done = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : done)
  for (int t = 0; t < threads; ++t) {
#if defined(__x86_64__)
    const bool wide = __builtin_cpu_supports("avx512f");
    if (!wide && !(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) continue;
    const int64_t per_step = 48 * 2 * (wide ? 16 : 8), steps = static_cast<int64_t>(flop / per_step) + 1;
    sink[t] = wide ? run512(steps, sink[t]) : run256(steps, sink[t]);
    done += static_cast<double>(steps) * per_step;
#endif
  }
  return done;
}
