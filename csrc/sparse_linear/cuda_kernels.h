// The compressed weight in CUDA, half precision: the kept values of a step are copied to shared memory as they lie, and
// every lane reads its own on through two words of them, two columns at a time, into a fragment of the tensor cores'
// product with few rows of x, or into rows of the dense weight.
#pragma once

#include "../fragments.h"

namespace persona {
namespace {

/// Strides in elements; `values` begin at a multiple of 16 bytes and have `room` elements. `dense`: [N, K], for
/// expansion alone.
struct SparseProduct {
  const void* x;
  const void* values;
  const uint8_t* bits;
  const int64_t* offsets;
  const void* bias;
  void* y;
  void* dense;
  int64_t stride_x, stride_bias, room;
  int32_t M, N, K;
};

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kStages = 2;  // steps of values in shared memory
constexpr int kSlot = 17;   // 16-byte pieces of a row's values of a step: 128 of them that begin anywhere
/// What a block needs, and 16 bytes that the last lane may read behind its values.
constexpr int kSharedBytes = kWarps * kStages * kTileRows * kSlot * 16 + 16;

/// Selectors and counts of the pairs of columns in 16 columns: of even pairs and of odd ones, a byte each.
struct PairTable {
  uint32_t low, high, count;

  /// `fields`: a pair's two bits in every nibble; the lower four nibbles are looked up.
  PairTable() = default;
  __device__ explicit PairTable(uint32_t fields) {
    // Kept of the pair: none, first, second, both. Bytes of the first value 0x10, of the second 0x32, of zero 0x44.
    low = permute(0x10441044u, 0, fields);
    high = permute(0x32104444u, 0, fields);
    count = permute(0x20101000u, 0, fields);
  }

  __device__ uint32_t selectors(int n) const { return permute(low, high, 0x40u + 0x11u * static_cast<uint32_t>(n)); }
};

/// A lane's kept values, read in order.
struct ValueStream {
  uint32_t now, then, next, bits;  // two words of two values, the address of the third, 16 bits for every value passed

  __device__ static uint32_t read(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
  }

  ValueStream() = default;
  /// Begin at value `start` from `slot` on, a shared address.
  __device__ ValueStream(uint32_t slot, int start) {
    const uint32_t address = slot + static_cast<uint32_t>(start >> 1) * 4;
    now = read(address), then = read(address + 4);
    next = address + 8, bits = (start & 1) * 16;
  }

  /// The next pair of columns, 0 where removed.
  __device__ uint32_t take(const PairTable& table, int n) {
    const uint32_t two = permute(__funnelshift_r(now, then, bits), 0, table.selectors(n));
    const uint32_t after = __dp4a(table.count, 1u << (8 * n), bits);
    if ((bits ^ after) & 32) {
      now = then;
      then = read(next);
      next += 4;
    }
    bits = after;
    return two;
  }
};

/// Copies piece `piece` of `pieces`, if there is one.
__device__ inline void copy_piece(uint32_t to, const void* from, int piece, int pieces) {
  asm volatile("{.reg .pred p; setp.lt.s32 p, %2, %3; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to),
               "l"(from), "r"(piece), "r"(pieces));
}

/// A block has 16 rows of the weight, a warp an even part of the columns, a lane a mask word of each of two rows.
/// kTiles 0: the dense weight, otherwise y for up to `8 kTiles` rows of x.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) sparse_rows_kernel(const SparseProduct p) {
  constexpr int kMost = kTiles * kRowsOfTile;
  extern __shared__ uint4 shared[];
  __shared__ int32_t kept[kWarps][kTileRows];
  __shared__ int32_t starts[kWarps][kStages][2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int steps = (p.K + kTileColumns - 1) / kTileColumns, words = p.K / kLaneColumns;
  const int each = (steps + kWarps - 1) / kWarps, begin = warp * each, end = min(begin + each, steps);
  const uint32_t* mask[2];
#pragma unroll
  for (int r = 0; r < 2; ++r)
    mask[r] =
        reinterpret_cast<const uint32_t*>(p.bits) + min(n0 + g + 8 * r, static_cast<int64_t>(p.N) - 1) * words + t;
  const auto word = [&](int r, int step) {
    return step < end && 4 * step + t < words && n0 + g + 8 * r < p.N ? __ldg(mask[r] + 4 * step) : 0u;
  };

  // A warp's values begin behind those of the warps before it.
  uint32_t ahead[2] = {word(0, begin), word(1, begin)};
  int64_t base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    base[r] = p.offsets[min(n0 + g + 8 * r, static_cast<int64_t>(p.N))];
    int count = __popc(ahead[r]);
#pragma unroll 4
    for (int step = begin + 1; step < end; ++step) count += __popc(word(r, step));
    count += __shfl_xor_sync(kAllLanes, count, 1);
    count += __shfl_xor_sync(kAllLanes, count, 2);
    if (t == 0) kept[warp][g + 8 * r] = count;
  }
  __syncthreads();
  int passed[2] = {0, 0};
  for (int before = 0; before < warp; ++before) passed[0] += kept[before][g], passed[1] += kept[before][g + 8];

  const uint32_t room = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) +
                        static_cast<uint32_t>(warp * kStages * kTileRows * kSlot * 16);
  const T* from[2];
  int lead[2];  // values of an earlier step in front of the next one's, as copies begin at multiples of 16 bytes
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    base[r] += passed[r];
    lead[r] = static_cast<int>(base[r]) & 7;
    from[r] = static_cast<const T*>(p.values) + (base[r] - lead[r]) + 8 * t;
  }
  const T* const behind = static_cast<const T*>(p.values) + p.room / 8 * 8 + 8 * t;

  // Copies the values of a step whose masks are `ahead`, which moves on.
  const auto fetch = [&](int step, int stage) {
    if (step < end) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int count = __popc(ahead[r]);
        int sum = count;
        int other = __shfl_up_sync(kAllLanes, sum, 1, 4);
        if (t >= 1) sum += other;
        other = __shfl_up_sync(kAllLanes, sum, 2, 4);
        if (t >= 2) sum += other;
        const int all = lead[r] + __shfl_sync(kAllLanes, sum, 3, 4);
        starts[warp][stage][r][lane] = lead[r] + sum - count;
        // Never behind the end of the values, whatever the bits say.
        const int pieces = min((all + 7) / 8, static_cast<int>(min((behind - from[r]) / 8, int64_t{kSlot}))) - t;
        const uint32_t to = room + ((stage * kTileRows + g + 8 * r) * kSlot + t) * 16;
#pragma unroll
        for (int i = 0; i < (kSlot + 3) / 4; ++i) copy_piece(to + 64 * i, from[r] + 32 * i, 4 * i, pieces);
        from[r] += all & ~7;
        lead[r] = all & 7;
        ahead[r] = word(r, step + 1);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  uint32_t current[2] = {ahead[0], ahead[1]};
  fetch(begin, 0);
  float sum[kTiles > 0 ? kTiles : 1][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int step = begin; step < end; ++step, stage ^= 1) {
    const int32_t at = step * kTileColumns + t * kLaneColumns;
    uint4 x[kTiles > 0 ? kTiles : 1][4] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int m = tile * kRowsOfTile + g;
        if (at < p.K && m < p.M)
          x[tile][j] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + m * p.stride_x + at) + j);
      }
    // Every lane has read what the stage held before.
    __syncwarp();
    const uint32_t follow[2] = {ahead[0], ahead[1]};
    fetch(step + 1, stage ^ 1);
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    __syncwarp();
    const uint32_t slot = room + ((stage * kTileRows + g) * kSlot) * 16;
    ValueStream stream[2] = {ValueStream(slot, starts[warp][stage][0][lane]),
                             ValueStream(slot + 8 * kSlot * 16, starts[warp][stage][1][lane])};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      PairTable table[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) table[r][odd] = PairTable((current[r] >> 2 * odd & 0x33333333u) >> 16 * half);
#pragma unroll
      for (int byte = 0; byte < 2; ++byte) {
        const int j = 2 * half + byte;
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) a[r][i] = stream[r].take(table[r][i % 2], 2 * byte + i / 2);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply<T>(sum[tile], a[0][0], a[1][0], a[0][1], a[1][1], x[tile][j].x, x[tile][j].y);
          multiply<T>(sum[tile], a[0][2], a[1][2], a[0][3], a[1][3], x[tile][j].z, x[tile][j].w);
        }
        if constexpr (kTiles == 0) {
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (at < p.K && n0 + g + 8 * r < p.N)
              *reinterpret_cast<uint4*>(static_cast<T*>(p.dense) + (n0 + g + 8 * r) * p.K + at + 8 * j) =
                  make_uint4(a[r][0], a[r][1], a[r][2], a[r][3]);
        }
      }
    }
    current[0] = follow[0], current[1] = follow[1];
  }
  if constexpr (kTiles > 0) {
    __shared__ float total[kWarps][kMost][kTileRows + 1];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[warp][tile * kRowsOfTile + 2 * t + i % 2][g + i / 2 * 8] = sum[tile][i];
    __syncthreads();
#pragma unroll 1
    for (int place = threadIdx.x; place < min(p.M, kMost) * kTileRows; place += kThreads) {
      const int m = place / kTileRows, r = place % kTileRows;
      const int64_t n = n0 + r;
      if (n >= p.N) continue;
      float y = 0;
#pragma unroll
      for (int one = 0; one < kWarps; ++one) y += total[one][m][r];
      if (p.bias != nullptr) y += widen(static_cast<const T*>(p.bias)[n * p.stride_bias]);
      static_cast<T*>(p.y)[static_cast<int64_t>(m) * p.N + n] = narrow<T>(y);
    }
  }
}

}  // namespace
}  // namespace persona
