#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "../masked_linear/narrow_tiles.h"
#include "../sparse_linear/sparse_tiles.h"

namespace persona {
const Kernels* amx_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels with_tiles = *avx512_bf16_kernels;
    with_tiles.name = "amx_bf16";
    with_tiles.prepare_tile = prepare_tile;
    with_tiles.masked_tiles = masked_tiles;
    with_tiles.narrow_tiles = narrow_tiles;
    with_tiles.sparse_tiles = sparse_tiles;
    return with_tiles;
  }();
  return &kernels;
}
}  // namespace persona
#else
namespace persona {
const Kernels* amx_bf16_kernels() { return nullptr; }
}  // namespace persona
#endif
