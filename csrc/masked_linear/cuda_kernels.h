// The masked product in CUDA, half precision: rows of x with a persona each, or of one, on tensor cores. A weight is
// loaded once into registers and gated there for every persona among a block's rows.
#pragma once

#include "../fragments.h"

namespace persona {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kAbsent = -2;  // a row whose persona does not exist, or no row at all
constexpr int kRing = 8;     // mask words of a lane that are on their way, a power of two
constexpr int kChunk = 256;  // columns of x in shared memory, of which there are two such parts

/// Where the 16 bytes of a slot begin: 64 bytes more than the columns take, so that the lanes of two rows that read
/// together use other banks.
constexpr int kStride = kChunk / 8 + 4;
constexpr int shared_bytes(int tiles) { return 2 * tiles * kRowsOfTile * kStride * 16; }

/// Blocks that a multiprocessor has room for.
constexpr int blocks_at_once(int tiles) { return tiles == 8 ? 1 : 2; }

/// Strides in elements, those of the masks in bytes. `parts`: sums [splits, M, N], or null, and y is written at once.
struct MaskedProduct {
  const void* x;
  const void* weight;
  const uint8_t* bits;
  const int32_t* persona;
  const void* bias;
  void* y;
  float* parts;
  int64_t stride_x, stride_weight, stride_persona_bits, stride_row_bits, stride_persona, stride_bias;
  int32_t M, N, K, P;
  int32_t span, splits;
  float gamma;
};

/// gamma w of two weights, rounded once.
template <class T>
__device__ inline uint32_t scaled(uint32_t pair, float gamma) {
  T two[2];
  memcpy(two, &pair, 4);
  two[0] = narrow<T>(widen(two[0]) * gamma);
  two[1] = narrow<T>(widen(two[1]) * gamma);
  memcpy(&pair, two, 4);
  return pair;
}

/// A pair of weights under the mask `keep`.
template <class T, bool kSoft>
__device__ inline uint32_t gated(uint32_t w, uint32_t keep, float gamma) {
  return kSoft ? (w & keep) | (scaled<T>(w, gamma) & ~keep) : w & keep;
}

/// Two rows' 32 columns of a lane.
struct LaneWeights {
  uint32_t row[2][16];

  template <class T>
  __device__ void load(const T* first, const T* second, bool inside) {
    const T* rows[2] = {first, second};
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 v = inside ? __ldg(reinterpret_cast<const uint4*>(rows[r]) + j) : make_uint4(0, 0, 0, 0);
        row[r][4 * j] = v.x, row[r][4 * j + 1] = v.y, row[r][4 * j + 2] = v.z, row[r][4 * j + 3] = v.w;
      }
  }
};

__device__ inline void copy_async(void* to, const void* from, bool read) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = read ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}

__device__ inline void copy_word_async(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}

/// Where the 16 bytes of columns 8 c to 8 c + 7 of a row of x lie: the four lanes' parts of a step beside each other.
__device__ inline int place_of_chunk(int c) { return c / 16 * 16 + c % 4 * 4 + c / 4 % 4; }

/// The rows of x that a block multiplies, in order of their personas.
template <int kSlots>
struct SortedRows {
  int32_t given[kSlots], persona[kSlots + 1], row[kSlots], groups;
  int32_t group[kSlots];      // that of a slot, -1 without one
  int64_t masks[kSlots + 1];  // where a group's masks begin
  bool plain;                 // whether the first group has no persona

  /// Called by all threads of a block; `count` rows from `m` on are there.
  __device__ void sort(const MaskedProduct& p, int m, int count) {
    const int thread = threadIdx.x, lane = thread % 32;
    if (p.stride_persona == 0) {
      // One persona: the rows as they come.
      const int32_t one = p.persona[0];
      const bool exists = one >= -1 && one < p.P;
      if (thread < kSlots) persona[thread] = exists ? one : kAbsent, row[thread] = thread, group[thread] = exists - 1;
      if (thread == 0) {
        groups = exists;
        masks[0] = max(one, 0) * p.stride_persona_bits, plain = one == -1;
      }
      __syncthreads();
      return;
    }
    if (thread < kSlots) {
      int32_t one = kAbsent;
      if (thread < count) {
        one = p.persona[(m + thread) * p.stride_persona];
        if (one < -1 || one >= p.P) one = kAbsent;
      }
      given[thread] = one;
    }
    __syncthreads();
    if (thread < kSlots) {
      const int32_t one = given[thread];
      int rank = 0;
#pragma unroll 8
      for (int other = 0; other < kSlots; ++other)
        rank += given[other] < one || (given[other] == one && other < thread);
      persona[rank] = one;
      row[rank] = thread;
    }
    __syncthreads();
    if (thread < 32) {
      int found = 0;
#pragma unroll
      for (int slot = lane; slot < (kSlots + 31) / 32 * 32; slot += 32) {
        const bool starts =
            slot < kSlots && persona[slot] != kAbsent && (slot == 0 || persona[slot - 1] != persona[slot]);
        const unsigned all = __ballot_sync(kAllLanes, starts);
        const int own = found + __popc(all & ((2u << lane) - 1)) - 1;
        if (slot < kSlots) group[slot] = persona[slot] == kAbsent ? -1 : own;
        if (starts) {
          masks[own] = max(persona[slot], 0) * p.stride_persona_bits;
          if (own == 0) plain = persona[slot] == -1;
        }
        found += __popc(all);
      }
      if (lane == 0) groups = found;
    }
    __syncthreads();
  }
};

/// A block has 128 rows of the weight, 16 a warp, `span` columns and up to `8 kTiles` rows of x.
template <class T, int kTiles, bool kSoft>
__global__ void __launch_bounds__(kThreads, kTiles == 8 ? 1 : 2) masked_rows_kernel(const MaskedProduct p) {
  constexpr int kSlots = kTiles * kRowsOfTile, kBuffer = kSlots * kStride;
  // Weights of the next step while those of this one are used: as far as the registers go.
  constexpr bool kAhead = kTiles == 1;
  extern __shared__ uint4 shared[];
  __shared__ SortedRows<kSlots> rows;
  __shared__ uint4 zeros[kTileColumns / 8];
  __shared__ uint32_t ring[kWarps][kRing][2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t n0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kTileRows;
  const int64_t last = p.N - 1, row0 = min(n0 + g, last), row1 = min(n0 + g + 8, last);
  const int32_t begin = blockIdx.y * p.span, end = min(begin + p.span, p.K);
  const int m_first = blockIdx.z * kSlots, count = min(kSlots, p.M - m_first);
  const T* w0 = static_cast<const T*>(p.weight) + row0 * p.stride_weight + t * kLaneColumns;
  const T* w1 = static_cast<const T*>(p.weight) + row1 * p.stride_weight + t * kLaneColumns;
  const uint8_t* bits0 = p.bits + row0 * p.stride_row_bits;
  const auto between = static_cast<int32_t>((row1 - row0) * p.stride_row_bits);  // eight rows at most

  LaneWeights w, next;
  w.load(w0 + begin, w1 + begin, begin + t * kLaneColumns < end);
  if (threadIdx.x < kTileColumns / 8) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
  rows.sort(p, m_first, count);

  const auto stage = [&](int32_t from, int buffer) {
    if (from < end) {
#pragma unroll 2
      for (int slot = warp; slot < kSlots; slot += kWarps) {
        const int m = rows.row[slot];
        const T* source = static_cast<const T*>(p.x) + (m_first + m) * p.stride_x + from + 8 * lane;
        uint4* target = shared + buffer * kBuffer + slot * kStride + place_of_chunk(lane);
#pragma unroll
        for (int c = 0; c < kChunk / 8; c += 32) {
          const bool read = m < count && from + 8 * (c + lane) < end;
          copy_async(target + c, read ? source + 8 * c : static_cast<const T*>(p.x), read);
        }
      }
    }
  };
  stage(begin, 0);

  float sum[kTiles][4] = {};
  const int groups = rows.groups;
  // Mask words are asked for `kRing - 1` personas ahead: they come from memory, a few bytes of a row at a time.
  const uint32_t ring_begin = static_cast<uint32_t>(__cvta_generic_to_shared(&ring[warp][0][0][lane]));
  int fetched_group = 0, fetched_step = begin;
  uint32_t filled = 0;
  // Lanes behind the last column have no weights, whatever their mask is.
  const auto words_of = [&](int32_t step) { return min(step + t * kLaneColumns, p.K - kLaneColumns) / 8; };
  const uint8_t* words = bits0 + words_of(begin);
  const auto fetch = [&] {
    if (fetched_step >= end) {
      asm volatile("cp.async.commit_group;" ::: "memory");
      return;
    }
    const uint8_t* source = words + rows.masks[fetched_group];
    const uint32_t target = ring_begin + filled;
    if (fetched_group == 0 && rows.plain) {
      asm volatile("st.shared.u32 [%0], %1; st.shared.u32 [%0 + 128], %1;" ::"r"(target), "r"(kAllLanes));
    } else {
      copy_word_async(target, source);
      copy_word_async(target + 128, source + between);
    }
    if (++fetched_group == groups) {
      fetched_group = 0, fetched_step += kTileColumns;
      words = bits0 + words_of(fetched_step);
    }
    filled = (filled + 256) % (256 * kRing);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  // Which groups a tile's rows have, and the lane's own row.
  int own_group[kTiles], tile_first[kTiles], tile_last[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    own_group[tile] = rows.group[tile * kRowsOfTile + g];
    const int group = own_group[tile];
    tile_last[tile] = static_cast<int>(__reduce_max_sync(kAllLanes, group));
    tile_first[tile] = static_cast<int>(__reduce_min_sync(kAllLanes, group < 0 ? kSlots : group));
  }
  if (groups > 0) {
#pragma unroll 1
    for (int i = 0; i < kRing - 1; ++i) fetch();
  }
  uint32_t taken = 0, now0, now1;
  const auto take = [&] {
    asm volatile("ld.shared.u32 %0, [%2]; ld.shared.u32 %1, [%2 + 128];"
                 : "=r"(now0), "=r"(now1)
                 : "r"(ring_begin + taken));
    taken = (taken + 256) % (256 * kRing);
  };
  int buffer = 0;
#pragma unroll 1
  for (int32_t chunk = begin; chunk < end; chunk += kChunk, buffer ^= 1) {
    asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    if (chunk == begin) take();
    stage(chunk + kChunk, buffer ^ 1);
#pragma unroll 1
    for (int32_t step = chunk; step < min(chunk + kChunk, end); step += kTileColumns) {
      const int32_t ahead = step + kTileColumns;
      if constexpr (kAhead) next.load(w0 + ahead, w1 + ahead, ahead + t * kLaneColumns < end);
      const uint4* own = shared + buffer * kBuffer + g * kStride + (step - chunk) / 8 + t;
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        fetch();
        const uint32_t mask0 = now0, mask1 = now1;
        asm volatile("cp.async.wait_group %0;" ::"n"(kRing - 2) : "memory");
        take();
        const uint4* place[kTiles];
        bool used[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          used[tile] = kTiles == 1 || (tile_first[tile] <= group && group <= tile_last[tile]);
          place[tile] = own_group[tile] == group ? own + tile * kRowsOfTile * kStride : zeros + t;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t m0[4], m1[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) m0[i] = mask0 << (7 - 4 * half - i), m1[i] = mask1 << (7 - 4 * half - i);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t select = 0xcc88u + 0x1111u * static_cast<uint32_t>(j);
            const int i = 4 * j + 2 * half;
            const uint32_t f0 = gated<T, kSoft>(w.row[0][i], permute(m0[0], m0[1], select), p.gamma);
            const uint32_t f1 = gated<T, kSoft>(w.row[1][i], permute(m1[0], m1[1], select), p.gamma);
            const uint32_t f2 = gated<T, kSoft>(w.row[0][i + 1], permute(m0[2], m0[3], select), p.gamma);
            const uint32_t f3 = gated<T, kSoft>(w.row[1][i + 1], permute(m1[2], m1[3], select), p.gamma);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
              if (used[tile]) {
                const uint2 x = reinterpret_cast<const uint2*>(place[tile] + 4 * j)[half];
                multiply<T>(sum[tile], f0, f1, f2, f3, x.x, x.y);
              }
          }
        }
      }
      if constexpr (kAhead)
        w = next;
      else
        w.load(w0 + ahead, w1 + ahead, ahead + t * kLaneColumns < end);
    }
    __syncthreads();
  }

  float* parts = p.parts + static_cast<int64_t>(blockIdx.y) * p.M * p.N;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = tile * kRowsOfTile + 2 * t + i % 2, m = rows.row[slot];
      const int64_t n = n0 + g + i / 2 * 8, place = static_cast<int64_t>(m_first + m) * p.N + n;
      if (m >= count || n >= p.N) continue;
      float y = rows.persona[slot] == kAbsent ? __int_as_float(0x7fffffff) : sum[tile][i];
      if (p.parts != nullptr) {
        parts[place] = y;
      } else {
        if (p.bias != nullptr) y += widen(static_cast<const T*>(p.bias)[n * p.stride_bias]);
        static_cast<T*>(p.y)[place] = narrow<T>(y);
      }
    }
}

/// y from the sums of the splits, in one order, and the bias.
template <class T>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const MaskedProduct p) {
  const int64_t count = static_cast<int64_t>(p.M) * p.N;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= count) return;
  float y = 0;
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) y += p.parts[split * count + place];
  if (p.bias != nullptr) y += widen(static_cast<const T*>(p.bias)[place % p.N * p.stride_bias]);
  static_cast<T*>(p.y)[place] = narrow<T>(y);
}

}  // namespace
}  // namespace persona
