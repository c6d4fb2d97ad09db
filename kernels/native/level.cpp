// Which instruction set the kernels use.
#include <atomic>

#include "simd.h"
#if defined(MARS_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mars {
namespace {

#if defined(MARS_X86)
// Linux hands out the tile registers on request, once a process.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

bool supported(int level) {
  if (level == PORTABLE) return true;
#if defined(MARS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (level) {
    case AVX2:
      return avx2;
    case AVX512:
      return avx512;
    case BF16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case VNNI:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    case AMX:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && tiles_granted();
  }
#endif
  return false;
}

int best() {
  int found = PORTABLE;
  for (int level = PORTABLE; level <= AMX; ++level)
    if (supported(level)) found = level;
  return found;
}

std::atomic<int>& active() {
  static std::atomic<int> value{best()};
  return value;
}

}  // namespace

Level level() { return static_cast<Level>(active().load(std::memory_order_relaxed)); }

}  // namespace mars

int mars_abi() { return MARS_ABI; }
int mars_threaded() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
int mars_level() { return mars::level(); }
int mars_level_supported(int level) { return mars::supported(level) ? 1 : 0; }
int mars_set_level(int level) {
  if (!mars::supported(level)) return -1;
  mars::active().store(level);
  return 0;
}
