#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include "avx512_bf16.h"
#include "table.h"

namespace persona {
const Kernels* const avx512_bf16_kernels = &table<Avx512Bf16>;
}  // namespace persona
#else
namespace persona {
const Kernels* const avx512_bf16_kernels = nullptr;
}  // namespace persona
#endif
