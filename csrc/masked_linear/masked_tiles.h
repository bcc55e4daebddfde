// The masked product on AMX tiles: weights are gated on their way to the tiles.
#pragma once

#include "tiles.h"

namespace persona {
namespace {

/// `width` gated weights, at most 32, and zeros behind them.
template <bool soft>
PERSONA_INLINE __m512i gated(const std::uint16_t* weight, const std::uint8_t* bits, std::int64_t width, float gamma) {
  std::uint32_t kept = 0, inside = 0xffffffffu;
  if (width == kTileStep) {
    std::memcpy(&kept, bits, sizeof kept);
  } else {
    inside >>= kTileStep - width;
    std::memcpy(&kept, bits, static_cast<std::size_t>((width + 7) / 8));
    kept &= inside;
  }
  if constexpr (!soft) return _mm512_maskz_loadu_epi16(kept, weight);
  const __m512i w = _mm512_maskz_loadu_epi16(inside, weight);
  return _mm512_mask_mov_epi16(Product<Avx512Bf16, bf16>::scale(w, gamma), kept, w);
}

/// One step of a place, two tiles of the weight: `count` rows of it and of the mask's bits, `stride` and `bits_stride`
/// apart, `left` columns from here on; zeros for absent rows and columns.
template <bool soft>
PERSONA_INLINE void gate_step(const std::uint16_t* weight, std::int64_t stride, const std::uint8_t* bits,
                              std::int64_t bits_stride, std::int64_t count, std::int64_t left, float gamma,
                              std::uint8_t* out) {
  if (count == kTileBlock && left >= kTileStep) {
    for (std::int64_t r = 0; r < kTileBlock; ++r, weight += stride, bits += bits_stride, out += 64)
      _mm512_store_si512(out, gated<soft>(weight, bits, kTileStep, gamma));
  } else {
    const std::int64_t inside = left < kTileStep ? left : kTileStep;
    for (std::int64_t r = 0; r < kTileBlock; ++r, weight += stride, bits += bits_stride, out += 64)
      _mm512_store_si512(out, r < count ? gated<soft>(weight, bits, inside, gamma) : _mm512_setzero_si512());
  }
}

template <bool soft>
struct GatedTiles {
  const MaskedTiles& a;

  void write(const TilePlace& p, std::int64_t s, std::uint8_t* strip) const {
    const MaskRows& mask = a.product.tile[p.tile].mask;
    const std::int64_t k = (p.first + s) * kTileStep;
    gate_step<soft>(weight_at(p) + s * kTileStep, a.weight.stride[0], mask.bits + p.n * mask.stride + k / 8,
                    mask.stride, p.count, a.weight.columns - k, a.gamma, strip + 2 * kTileBytes * s);
  }

  /// Weights that the mask before has not just read.
  void fetch(const TilePlace& p, std::int64_t first, std::int64_t last) const {
    if (p.tile > 0) return;
    for (std::int64_t r = first; r < last && r < p.count; ++r)
      for (std::int64_t s = 0; s < p.steps; ++s)
        _mm_prefetch(weight_at(p) + r * a.weight.stride[0] + s * kTileStep, _MM_HINT_T1);
  }

  /// Bits, a line of which serves two strips.
  void fetch(const TilePlace& p) const {
    if (p.first / kTileStrip % 2 != 0) return;
    const MaskRows& mask = a.product.tile[p.tile].mask;
    const std::uint8_t* bits = mask.bits + p.n * mask.stride + p.first * kTileStep / 8;
    for (std::int64_t r = 0; r < p.count; ++r) _mm_prefetch(bits + r * mask.stride, _MM_HINT_T1);
  }

 private:
  const std::uint16_t* weight_at(const TilePlace& p) const {
    return static_cast<const std::uint16_t*>(a.weight.data) + p.n * a.weight.stride[0] + p.first * kTileStep;
  }
};

/// Rows `first` to `last` of the weight, columns `first` to `last` of y. `sums`: room for `tile_sums`.
inline void masked_tiles(const MaskedTiles& a, std::int64_t first, std::int64_t last, float* sums) {
  if (a.gamma == 0) {
    GatedTiles<false> source{a};
    multiply_places(a.product, first, last, sums, source);
  } else {
    GatedTiles<true> source{a};
    multiply_places(a.product, first, last, sums, source);
  }
}

}  // namespace
}  // namespace persona
