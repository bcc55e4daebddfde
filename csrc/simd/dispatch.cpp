#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace persona {
namespace {

bool runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool runs_avx512_bf16() {
#if defined(__x86_64__)
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

/// The processor has the tiles, and Linux grants this process their state, for which it wants to be asked.
bool runs_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return runs_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTile) != 0 &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

struct Available {
  const Kernels* table[6] = {};

  Available() {
    int count = 0;
    if (avx512_bf16_kernels != nullptr && runs_amx_bf16() && amx_bf16_kernels() != nullptr)
      table[count++] = amx_bf16_kernels();
    if (avx512_bf16_kernels != nullptr && runs_avx512_bf16()) table[count++] = avx512_bf16_kernels;
    if (avx512_kernels != nullptr && runs_avx512()) table[count++] = avx512_kernels;
    if (avx2_kernels != nullptr && runs_avx2()) table[count++] = avx2_kernels;
    table[count] = portable_kernels;
  }
};

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{available_kernels()[0]};
  return table;
}

}  // namespace

const Kernels* const* available_kernels() {
  static const Available available;
  return available.table;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  for (const Kernels* const* table = available_kernels(); *table != nullptr; ++table)
    if (std::strcmp((*table)->name, name) == 0) {
      chosen().store(*table, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace persona
