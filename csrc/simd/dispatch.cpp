#include <atomic>
#include <cstring>

#include "kernels.h"

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

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

struct Available {
  const Kernels* table[5] = {};

  Available() {
    int count = 0;
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
