// The product of rows of x that share masks with gated or compressed weights in bfloat16 on AMX tiles.
//
// The weight is the left factor, y^T = W x^T: its rows lie in memory as a tile wants them, and x, which is small, takes
// the order of the right factor. A strip of columns of 32 rows of the weight is written to the first cache and meets
// all rows of x that have the mask; while the tiles multiply the last of these, the next strip is written, step by
// step, over what they have read. If the rows of x fill more than two tiles, the sums of a panel of the weight wait in
// the second cache for its next strip.
#pragma once

#include <immintrin.h>

#include "../simd/avx512_bf16.h"
#include "arguments.h"

namespace persona {
namespace {

constexpr std::int64_t kTile = 16;       // rows of a tile, of the weight or (as columns) of x
constexpr std::int64_t kTileStep = 32;   // columns of the weight in a tile, kTileStrip of these in a strip
constexpr std::int64_t kTileBlock = 32;  // rows of the weight in a block
constexpr std::int64_t kTileBytes = 64 * kTile;

/// What `_tile_loadconfig` reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

/// Tiles for as long as it lives, 4 and 5 of the weight, 6 and 7 of `width` rows of x, the others of sums; then the
/// configuration of before, which a library may count on.
class Tiles {
 public:
  explicit Tiles(std::int64_t width) {
    _tile_storeconfig(&before_);
    TileConfig config;
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<std::uint16_t>(i == 4 || i == 5 ? 64 : 4 * width);
      config.rows[i] = kTile;
    }
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (before_.palette == 0)
      _tile_release();
    else
      _tile_loadconfig(&before_);
  }

 private:
  TileConfig before_;
};

/// One tile of x for each step: pair i of columns of all its rows side by side, zeros for absent rows and columns. A
/// strip of it lies `apart` bytes behind the one before.
inline void prepare_tile(const TileRows& rows, const Matrix& x, const TileLayout& layout, void* out,
                         std::int64_t apart) {
  const std::uint16_t* data = static_cast<const std::uint16_t*>(x.data);
  const std::int64_t across = x.stride[1];
  for (std::int64_t s = 0; s < tile_steps(x.columns); ++s) {
    auto* target = reinterpret_cast<std::uint32_t*>(static_cast<std::uint8_t*>(out) + s / layout.strip * apart +
                                                    s % layout.strip * 64 * layout.width);
    for (std::int64_t k = s * kTileStep; k < (s + 1) * kTileStep; k += 2)
      for (std::int64_t m = 0; m < layout.width; ++m, ++target) {
        *target = 0;
        if (m >= rows.count || k >= x.columns) continue;
        const std::uint16_t* first = data + rows.row[m] * x.stride[0] + k * across;
        *target = *first | (k + 1 < x.columns ? std::uint32_t{first[across]} << 16 : 0);
      }
  }
}

/// What is written at a time: `count` rows of the weight from row n on, `steps` from step `first` on, for tiles `tile`
/// to `tiles` of x, which share a mask.
struct TilePlace {
  std::int64_t n, count, first, steps, tile, tiles;
};

/// The compiler does not know what a tile reads.
PERSONA_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

/// Sums `[16 of the weight, width of x]` as rows of y.
inline void write_tile(const TileArguments& a, const TileRows& rows, std::int64_t n, std::int64_t count,
                       const float* sum, __m512 bias) {
  const __m512i lane = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(static_cast<int>(a.width)));
  const __mmask16 inside = static_cast<__mmask16>(0xffffu >> (kTile - count));
  for (std::int64_t m = 0; m < rows.count; ++m) {
    const __m512 y = _mm512_add_ps(_mm512_i32gather_ps(lane, sum + m, 4), bias);
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(a.y) + rows.row[m] * a.y_stride + n, inside,
                             (__m256i)_mm512_cvtneps_pbh(y));
  }
}

PERSONA_INLINE __m512 bias_of(const TileArguments& a, std::int64_t n, std::int64_t count) {
  alignas(64) float bias[kTile] = {};
  if (a.bias != nullptr)
    for (std::int64_t i = 0; i < count; ++i)
      bias[i] = to_float(static_cast<const bf16*>(a.bias)[(n + i) * a.bias_stride]);
  return _mm512_load_ps(bias);
}

/// Adds the products of a strip with one or two tiles of x, `x_apart` bytes from one to the other, and calls `after(s)`
/// when step s of the strip has been read. The sums, two tiles for each of x, are read from `before` and written to
/// `behind`, unless that is null.
template <int X, class F>
PERSONA_INLINE void multiply_strip(const std::uint8_t* weight, const std::uint8_t* x, std::int64_t x_apart,
                                   std::int64_t steps, const float* before, float* behind, const F& after) {
  constexpr std::int64_t kSums = kTile * kTile;
  if (before != nullptr) {
    _tile_loadd(0, before, 64);
    _tile_loadd(1, before + kSums, 64);
    if (X == 2) {
      _tile_loadd(2, before + 2 * kSums, 64);
      _tile_loadd(3, before + 3 * kSums, 64);
    }
  }
  for (std::int64_t s = 0; s < steps; ++s, weight += 2 * kTileBytes, x += kTileBytes) {
    _tile_loadd(4, weight, 64);
    _tile_loadd(5, weight + kTileBytes, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (X == 2) {
      _tile_loadd(7, x + x_apart, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    settle();
    after(s);
  }
  if (behind != nullptr) {
    _tile_stored(0, behind, 64);
    _tile_stored(1, behind + kSums, 64);
    if (X == 2) {
      _tile_stored(2, behind + 2 * kSums, 64);
      _tile_stored(3, behind + 3 * kSums, 64);
    }
  }
}

/// The order of places: panel by panel, mask by mask, strip by strip, block by block.
struct TilePlaces {
  const TileArguments& a;
  std::int64_t first, last, steps;

  TilePlace at(std::int64_t n, std::int64_t s, std::int64_t tile) const {
    std::int64_t tiles = tile + 1;
    while (tiles < a.tiles && a.tile[tiles].mask.bits == a.tile[tile].mask.bits) ++tiles;
    const std::int64_t count = last - n, left = steps - s;
    return {n, count < kTileBlock ? count : kTileBlock, s, left < kTileStrip ? left : kTileStrip, tile, tiles};
  }

  /// Of no rows behind the last.
  TilePlace after(const TilePlace& p) const {
    if (p.count == 0) return p;
    const std::int64_t panel = p.n - (p.n - first) % a.panel_rows, below = p.n + kTileBlock;
    const std::int64_t end = last - panel < a.panel_rows ? last : panel + a.panel_rows;
    if (below < end) return at(below, p.first, p.tile);
    if (p.first + kTileStrip < steps) return at(panel, p.first + kTileStrip, p.tile);
    return p.tiles < a.tiles ? at(panel, 0, p.tiles) : at(end, 0, 0);
  }
};

/// Complete sums of the rows of a place with tile t of x as rows of y. `sums`: of the upper 16 and of the lower 16.
inline void write_sums(const TileArguments& a, const TilePlace& p, std::int64_t t, const float* sums) {
  for (std::int64_t half = 0; half < 2 && half * kTile < p.count; ++half) {
    const std::int64_t n = p.n + half * kTile, left = p.count - half * kTile, count = left < kTile ? left : kTile;
    write_tile(a, a.tile[t], n, count, sums + half * kTile * a.width, bias_of(a, n, count));
  }
}

/// Rows `first` to `last` of the weight, columns `first` to `last` of y. `source` writes step s of a place, two tiles
/// of the weight with zeros for absent rows and columns: `write(place, s, strip)`; and is told what comes after the
/// next place: `fetch(place, first row, last row)` and `fetch(place)`.
template <class Source>
void multiply_places(const TileArguments& a, std::int64_t first, std::int64_t last, float* sums, Source& source) {
  const Tiles tiles(kTile);
  constexpr std::int64_t kSums = 2 * kTile * kTile, kStripBytes = kTileStrip * kTileBytes;
  alignas(64) std::uint8_t strip[2 * kStripBytes];
  const TilePlaces places{a, first, last, tile_steps(a.columns)};
  TilePlace here = places.at(first, 0, 0), next = places.after(here);
  for (std::int64_t s = 0; here.count > 0 && s < here.steps; ++s) source.write(here, s, strip);
  for (; here.count > 0; here = next, next = places.after(here)) {
    const TilePlace later = places.after(next);
    const std::int64_t count = here.tiles - here.tile, next_steps = next.count > 0 ? next.steps : 0;
    // The sums of one or two tiles stay where they are from strip to strip.
    const bool stays = count <= 2 && a.panel_rows == kTileBlock;
    const bool begins = here.first == 0, ends = here.first + here.steps == places.steps;
    const auto* x = static_cast<const std::uint8_t*>(a.x) + here.first / kTileStrip * a.tiles * kStripBytes;
    float* place_sums = sums + (here.n - first) % a.panel_rows / kTileBlock * kSums * count;
    if (begins && stays) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else if (begins) {
      std::memset(place_sums, 0, static_cast<std::size_t>(kSums * count) * sizeof *sums);
    }
    const auto nothing = [](std::int64_t) {};
    const auto replace = [&](std::int64_t s) {
      if (s < next_steps) source.write(next, s, strip);
    };
    source.fetch(later);
    for (std::int64_t t = 0; t < count; t += 2) {
      const std::uint8_t* tile = x + (here.tile + t) * kStripBytes;
      float* sum = place_sums + kSums * t;
      const float* before = stays ? nullptr : sum;
      float* behind = stays && !ends ? nullptr : sum;
      source.fetch(later, kTileBlock * t / count, kTileBlock * (t + 2) / count);
      settle();
      if (t + 2 < count)
        multiply_strip<2>(strip, tile, kStripBytes, here.steps, before, behind, nothing);
      else if (t + 2 == count)
        multiply_strip<2>(strip, tile, kStripBytes, here.steps, before, behind, replace);
      else
        multiply_strip<1>(strip, tile, kStripBytes, here.steps, before, behind, replace);
    }
    for (std::int64_t s = here.steps; s < next_steps; ++s) replace(s);
    for (std::int64_t t = 0; ends && t < count; ++t) write_sums(a, here, here.tile + t, place_sums + kSums * t);
  }
}

}  // namespace
}  // namespace persona
