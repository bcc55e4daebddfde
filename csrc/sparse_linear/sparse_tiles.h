// The product with a compressed weight on AMX tiles: weights are expanded on their way to the tiles.
#pragma once

#include "../masked_linear/tiles.h"
#include "arguments.h"

namespace persona {
namespace {

struct ExpandedTiles {
  const SparseTiles& a;
  std::int64_t first;
  const std::uint16_t** next;  // of each row of a panel: steps come in order

  void write(const TilePlace& p, std::int64_t s, std::uint8_t* strip) {
    const std::int64_t k = (p.first + s) * kTileStep, width = a.weight.columns - k;
    if (k == 0)
      for (std::int64_t r = 0; r < p.count; ++r)
        next[panel_row(p) + r] = static_cast<const std::uint16_t*>(a.weight.values) + a.weight.offsets[p.n + r];
    width < kTileStep ? write_step<false>(p, k, strip + 2 * kTileBytes * s)
                      : write_step<true>(p, k, strip + 2 * kTileBytes * s);
  }

  /// The values of the strip after the one that is written now.
  void fetch(const TilePlace& p, std::int64_t begin, std::int64_t stop) const {
    constexpr std::int64_t kAhead = kTileStrip * kTileStep;
    if (p.first == 0) return;
    for (std::int64_t r = begin; r < stop && r < p.count; ++r)
      for (std::int64_t i = 0; i < kAhead; i += kTileStep) _mm_prefetch(next[panel_row(p) + r] + i, _MM_HINT_T1);
  }

  void fetch(const TilePlace&) const {}

 private:
  /// `whole`: there are 32 columns.
  template <bool whole>
  void write_step(const TilePlace& p, std::int64_t k, std::uint8_t* out) {
    const std::int64_t row_bytes = (a.weight.columns + 7) / 8, width = a.weight.columns - k;
    const std::uint16_t* end = static_cast<const std::uint16_t*>(a.weight.values) + a.weight.offsets[a.weight.rows];
    const std::uint16_t** value = next + panel_row(p);
    const std::uint8_t* bits = a.weight.bits + p.n * row_bytes + k / 8;
    for (std::int64_t r = 0; r < p.count; ++r, bits += row_bytes, out += 64) {
      std::uint32_t kept = 0;
      if constexpr (whole) {
        std::memcpy(&kept, bits, sizeof kept);
      } else {
        std::memcpy(&kept, bits, static_cast<std::size_t>((width + 7) / 8));
        kept &= 0xffffffffu >> (kTileStep - width);
      }
      const std::uint16_t *from = value[r], *to = from + __builtin_popcount(kept);
      _mm512_store_si512(out, _mm512_maskz_expand_epi16(kept, _mm512_loadu_si512(from)));
      // A mask with more bits than the weight has values reads the padding, never what lies behind it.
      value[r] = to < end ? to : end;
    }
    for (std::int64_t r = p.count; r < kTileBlock; ++r, out += 64) _mm512_store_si512(out, _mm512_setzero_si512());
  }

  std::int64_t panel_row(const TilePlace& p) const { return (p.n - first) % a.product.panel_rows; }
};

/// As `masked_tiles`. `next`: room for `panel_rows`.
inline void sparse_tiles(const SparseTiles& a, std::int64_t first, std::int64_t last, float* sums,
                         const std::uint16_t** next) {
  ExpandedTiles source{a, first, next};
  multiply_places(a.product, first, last, sums, source);
}

}  // namespace
}  // namespace persona
