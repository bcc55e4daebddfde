// The masked product on AMX tiles for rows of several personas, at most 16 of each.
//
// Not a pass over the weight for every persona, but one for all: a strip of 32 rows of the weight is copied to the
// first cache once, in the order of tiles, because rows of the weight lie powers of two apart more often than not and
// would drive each other out, and is gated from there for one persona after the other. Tiles of x are as wide as the
// persona with the most rows needs, so that all of them and their sums stay in a cache.
#pragma once

#include "masked_tiles.h"

namespace persona {
namespace {

constexpr std::int64_t kNarrowBytes = 2 * kNarrowStrip * kTileBytes;

/// Step s of a place as it is; zeros for absent rows and columns.
inline void copy_step(const MaskedTiles& a, const TilePlace& p, std::int64_t s, std::uint8_t* plain) {
  const std::int64_t k = (p.first + s) * kTileStep, left = a.weight.columns - k, stride = a.weight.stride[0];
  const __mmask32 inside = left < kTileStep ? 0xffffffffu >> (kTileStep - left) : 0xffffffffu;
  const auto* weight = static_cast<const std::uint16_t*>(a.weight.data) + p.n * stride + k;
  std::uint8_t* out = plain + 2 * kTileBytes * s;
  for (std::int64_t r = 0; r < kTileBlock; ++r, weight += stride, out += 64)
    _mm512_store_si512(out, _mm512_maskz_loadu_epi16(r < p.count ? inside : 0, weight));
}

/// The same, gated for tile t of x.
template <bool soft>
PERSONA_INLINE void gate_plain(const MaskedTiles& a, const TilePlace& p, std::int64_t t, std::int64_t s,
                               const std::uint8_t* plain, std::uint8_t* strip) {
  const MaskRows& mask = a.product.tile[t].mask;
  const std::int64_t k = (p.first + s) * kTileStep, step = 2 * kTileBytes * s;
  gate_step<soft>(reinterpret_cast<const std::uint16_t*>(plain + step), kTileStep,
                  mask.bits + p.n * mask.stride + k / 8, mask.stride, p.count, a.weight.columns - k, a.gamma,
                  strip + step);
}

/// Asks for what tile t of x needs of a place, and for its part of the weight.
PERSONA_INLINE void fetch_narrow(const MaskedTiles& a, const TilePlace& p, std::int64_t t) {
  constexpr std::int64_t kLineSteps = 64 * 8 / kTileStep;
  const std::int64_t stride = a.weight.stride[0], tiles = a.product.tiles;
  const auto* weight = static_cast<const std::uint16_t*>(a.weight.data) + p.n * stride + p.first * kTileStep;
  for (std::int64_t r = kTileBlock * t / tiles; r < kTileBlock * (t + 1) / tiles && r < p.count; ++r)
    for (std::int64_t s = 0; s < p.steps; ++s) _mm_prefetch(weight + r * stride + s * kTileStep, _MM_HINT_T1);
  if (p.first % kLineSteps != 0) return;
  const MaskRows& mask = a.product.tile[t].mask;
  for (std::int64_t r = 0; r < p.count; ++r)
    _mm_prefetch(mask.bits + (p.n + r) * mask.stride + p.first * kTileStep / 8, _MM_HINT_T1);
}

template <bool soft>
void narrow_tiles_of(const MaskedTiles& a, std::int64_t first, std::int64_t last, float* sums) {
  const TileArguments& to = a.product;
  const Tiles config(to.width);
  alignas(64) std::uint8_t plain[2][kNarrowBytes], strip[kNarrowBytes];
  const std::int64_t steps = tile_steps(to.columns), row_bytes = 4 * to.width, step_bytes = kTile * row_bytes;
  const std::int64_t half = kTile * to.width;
  const auto at = [&](std::int64_t n, std::int64_t s) {
    const std::int64_t count = last - n, left = steps - s;
    return TilePlace{n,       count < kTileBlock ? count : kTileBlock, s, left < kNarrowStrip ? left : kNarrowStrip, 0,
                     to.tiles};
  };
  const auto after = [&](const TilePlace& p) {
    if (p.first + kNarrowStrip < steps && p.count > 0) return at(p.n, p.first + kNarrowStrip);
    return p.n + kTileBlock < last && p.count > 0 ? at(p.n + kTileBlock, 0) : TilePlace{};
  };
  TilePlace here = at(first, 0);
  for (std::int64_t s = 0; here.count > 0 && s < here.steps; ++s) {
    copy_step(a, here, s, plain[0]);
    gate_plain<soft>(a, here, 0, s, plain[0], strip);
  }
  for (int turn = 0; here.count > 0; turn = 1 - turn) {
    const TilePlace next = after(here), later = after(next);
    const auto* x = static_cast<const std::uint8_t*>(to.x) + here.first * to.tiles * step_bytes;
    if (here.first == 0) std::memset(sums, 0, static_cast<std::size_t>(2 * half * to.tiles) * sizeof *sums);
    for (std::int64_t t = 0; t < to.tiles; ++t, x += kNarrowStrip * step_bytes) {
      const bool more = t + 1 < to.tiles;
      const TilePlace& gate = more ? here : next;
      const std::uint8_t* from = plain[more ? turn : 1 - turn];
      for (std::int64_t s = 0; !more && s < next.steps; ++s) copy_step(a, next, s, plain[1 - turn]);
      fetch_narrow(a, later, t);
      float* sum = sums + 2 * half * t;
      settle();
      _tile_loadd(0, sum, row_bytes);
      _tile_loadd(1, sum + half, row_bytes);
      for (std::int64_t s = 0; s < here.steps; ++s) {
        _tile_loadd(4, strip + 2 * kTileBytes * s, 64);
        _tile_loadd(5, strip + 2 * kTileBytes * s + kTileBytes, 64);
        _tile_loadd(6, x + s * step_bytes, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        settle();
        if (s < gate.steps) gate_plain<soft>(a, gate, more ? t + 1 : 0, s, from, strip);
      }
      for (std::int64_t s = here.steps; s < gate.steps; ++s)
        gate_plain<soft>(a, gate, more ? t + 1 : 0, s, from, strip);
      _tile_stored(0, sum, row_bytes);
      _tile_stored(1, sum + half, row_bytes);
      if (here.first + here.steps == steps) write_sums(to, here, t, sum);
    }
    here = next;
  }
}

/// As `masked_tiles`, for tiles of different masks.
inline void narrow_tiles(const MaskedTiles& a, std::int64_t first, std::int64_t last, float* sums) {
  a.gamma == 0 ? narrow_tiles_of<false>(a, first, last, sums) : narrow_tiles_of<true>(a, first, last, sums);
}

}  // namespace
}  // namespace persona
