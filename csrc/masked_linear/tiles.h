// The masked product of a few dozen rows of x in bfloat16 on AMX tiles.
//
// The weight is the left factor, y^T = (W * G) x^T: its rows lie in memory as a tile wants them, so that gating is all
// that happens to them, and x, which is small, takes the order of the right factor. A few steps of 32 rows of the
// weight are gated at a time, into a buffer in the first cache, while the tiles multiply those of before.
#pragma once

#include <immintrin.h>

#include "../simd/avx512_bf16.h"
#include "arguments.h"

namespace persona {
namespace {

constexpr std::int64_t kTile = 16;       // rows of a tile, of the weight or (as columns) of x
constexpr std::int64_t kTileStep = 32;   // columns of the weight in a tile
constexpr std::int64_t kTileBlock = 32;  // rows of the weight in a block
constexpr std::int64_t kTileBytes = 64 * kTile;
constexpr std::int64_t kTileSteps = 4;  // that are gated together

/// What `_tile_loadconfig` reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

/// Whole tiles for as long as it lives; then the configuration of before, which a library may count on.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    TileConfig whole;
    whole.palette = 1;
    for (int i = 0; i < 8; ++i) whole.row_bytes[i] = 64, whole.rows[i] = kTile;
    _tile_loadconfig(&whole);
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

/// One tile of x for each step: pair i of columns of all 16 rows side by side, zeros for absent rows and columns.
inline void prepare_tile(const TileRows& rows, const Matrix& x, void* out) {
  std::uint32_t* target = static_cast<std::uint32_t*>(out);
  const std::uint16_t* data = static_cast<const std::uint16_t*>(x.data);
  const std::int64_t across = x.stride[1];
  for (std::int64_t k = 0; k < x.columns; k += 2)
    for (std::int64_t m = 0; m < kTile; ++m, ++target) {
      *target = 0;
      if (m >= rows.count) continue;
      const std::uint16_t* first = data + rows.row[m] * x.stride[0] + k * across;
      *target = *first | (k + 1 < x.columns ? std::uint32_t{first[across]} << 16 : 0);
    }
  const std::int64_t pairs = (x.columns + 1) / 2, padded = tile_steps(x.columns) * kTile;
  std::memset(target, 0, static_cast<std::size_t>((padded - pairs) * kTile) * sizeof *target);
}

/// 32 gated weights; those past the last of `width` columns are zeros.
template <bool soft>
PERSONA_INLINE __m512i gated(const std::uint16_t* weight, const std::uint8_t* bits, std::int64_t width, float gamma) {
  std::uint32_t kept = 0, inside = 0xffffffffu;
  if (width >= kTileStep) {
    std::memcpy(&kept, bits, sizeof kept);
  } else {
    inside >>= kTileStep - width;
    std::memcpy(&kept, bits, static_cast<std::size_t>((width + 7) / 8));
    kept &= inside;
  }
  if constexpr (!soft) return _mm512_maskz_loadu_epi16(kept, weight);
  const __m512i w = _mm512_maskz_loadu_epi16(inside, weight);
  const __m512i removed = Product<Avx512Bf16, bf16>::scale(w, gamma);
  return _mm512_mask_mov_epi16(removed, kept, w);
}

/// Gated weights of `count` rows from row n on as the tiles of the steps `first` to `last`, two a step; zeros for
/// absent rows.
template <bool soft>
PERSONA_INLINE void gate_steps(const TileArguments& a, const MaskRows& mask, std::int64_t n, std::int64_t count,
                               std::int64_t first, std::int64_t last, std::uint8_t* out) {
  const std::int64_t stride = a.weight.stride[0], left = a.weight.columns - first * kTileStep;
  const std::uint16_t* weight = static_cast<const std::uint16_t*>(a.weight.data) + n * stride + first * kTileStep;
  const std::uint8_t* bits = mask.bits + n * mask.stride + first * kTileStep / 8;
  if (count == kTileBlock && left >= kTileSteps * kTileStep)
    for (std::int64_t r = 0; r < kTileBlock; ++r, weight += stride, bits += mask.stride, out += 64)
      for (int s = 0; s < kTileSteps; ++s)
        _mm512_store_si512(out + 2 * kTileBytes * s,
                           gated<soft>(weight + s * kTileStep, bits + s * kTileStep / 8, kTileStep, a.gamma));
  else
    for (std::int64_t r = 0; r < kTileBlock; ++r, weight += stride, bits += mask.stride, out += 64)
      for (std::int64_t s = 0; s < last - first; ++s)
        _mm512_store_si512(
            out + 2 * kTileBytes * s,
            r < count ? gated<soft>(weight + s * kTileStep, bits + s * kTileStep / 8, left - s * kTileStep, a.gamma)
                      : _mm512_setzero_si512());
}

/// Asks for the bits of 32 rows that are needed next, one behind the other in `stride` bytes: a line holds those of 16
/// steps, in each of which some rows have their turn. The processor foresees the weight by itself.
PERSONA_INLINE void fetch_bits_of(const std::uint8_t* bits, std::int64_t stride, std::int64_t first,
                                  std::int64_t last) {
  constexpr std::int64_t kSteps = 64 * 8 / kTileStep, kRows = kTileBlock / kSteps;
  for (std::int64_t s = first; s < last; ++s)
    for (std::int64_t r = s % kSteps * kRows; r < (s % kSteps + 1) * kRows; ++r)
      _mm_prefetch(bits + r * stride + s / kSteps * 64, _MM_HINT_T1);
}

/// Sums `[16 of the weight, 16 of x]` as rows of y.
inline void write_tile(const TileArguments& a, const TileRows& rows, std::int64_t n, std::int64_t count,
                       const float* sum, __m512 bias) {
  const __m512i lane = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(static_cast<int>(kTile)));
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

/// The products of a block of the weight, gated for them, with one or two tiles of x. `next`: the bits that are needed
/// after these, or null.
template <int X, bool soft>
void multiply_block(const TileArguments& a, std::int64_t tile, std::int64_t n, std::int64_t count,
                    const std::uint8_t* next, std::int64_t next_stride) {
  const std::int64_t steps = tile_steps(a.weight.columns);
  const std::uint8_t* x = static_cast<const std::uint8_t*>(a.x) + tile * steps * kTileBytes;
  const MaskRows& mask = a.tile[tile].mask;
  alignas(64) std::uint8_t block[2][2 * kTileSteps * kTileBytes];
  const auto end = [&](std::int64_t first) { return first + kTileSteps < steps ? first + kTileSteps : steps; };
  _tile_zero(0);
  _tile_zero(1);
  if (X == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  gate_steps<soft>(a, mask, n, count, 0, end(0), block[0]);
  for (std::int64_t first = 0, turn = 0; first < steps; first = end(first), turn = 1 - turn) {
    const std::int64_t last = end(first);
    // The next steps while the tiles multiply these.
    if (last < steps) gate_steps<soft>(a, mask, n, count, last, end(last), block[1 - turn]);
    if (next != nullptr) fetch_bits_of(next, next_stride, first, last);
    const std::uint8_t* weight = block[turn];
    for (std::int64_t s = first; s < last; ++s, weight += 2 * kTileBytes, x += kTileBytes) {
      _tile_loadd(4, weight, 64);
      _tile_loadd(5, weight + kTileBytes, 64);
      _tile_loadd(6, x, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (X == 2) {
        _tile_loadd(7, x + steps * kTileBytes, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  alignas(64) float sum[4][kTile * kTile];
  _tile_stored(0, sum[0], 64);
  _tile_stored(1, sum[1], 64);
  if (X == 2) {
    _tile_stored(2, sum[2], 64);
    _tile_stored(3, sum[3], 64);
  }
  for (std::int64_t half = 0; half < 2 && half * kTile < count; ++half) {
    const std::int64_t first = n + half * kTile, left = count - half * kTile, width = left < kTile ? left : kTile;
    const __m512 bias = bias_of(a, first, width);
    for (int i = 0; i < X; ++i) write_tile(a, a.tile[tile + i], first, width, sum[2 * i + half], bias);
  }
}

template <bool soft>
void masked_tiles_of(const TileArguments& a, std::int64_t first, std::int64_t last) {
  const Tiles tiles;
  const auto pair = [&](std::int64_t t) { return t + 1 < a.tiles && a.tile[t + 1].mask.bits == a.tile[t].mask.bits; };
  for (std::int64_t n = first; n < last; n += kTileBlock) {
    const std::int64_t count = last - n < kTileBlock ? last - n : kTileBlock, below = n + kTileBlock;
    const bool more = below + kTileBlock <= last;
    for (std::int64_t t = 0; t < a.tiles;) {
      const std::int64_t after = t + (pair(t) ? 2 : 1);
      const bool here = after < a.tiles;
      const MaskRows& mask = a.tile[here ? after : 0].mask;
      // Of whole blocks alone: what lies behind a mask must not even be asked for.
      const std::uint8_t* next = nullptr;
      if (here ? count == kTileBlock : more) next = mask.bits + (here ? n : below) * mask.stride;
      pair(t) ? multiply_block<2, soft>(a, t, n, count, next, mask.stride)
              : multiply_block<1, soft>(a, t, n, count, next, mask.stride);
      t = after;
    }
  }
}

/// Rows `first` to `last` of the weight, columns `first` to `last` of y.
inline void masked_tiles(const TileArguments& a, std::int64_t first, std::int64_t last) {
  a.gamma == 0 ? masked_tiles_of<false>(a, first, last) : masked_tiles_of<true>(a, first, last);
}

}  // namespace
}  // namespace persona
