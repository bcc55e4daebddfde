// Kernels of the activation statistics in CUDA: the sums of kernels/ops/activation_stats/triton.py, in the same order,
// so that both give the same bits. A sum has eight lanes, element i in lane i mod 8; then the upper half of them is
// added to the lower, three times. No atomics. Written without a GPU at hand: compiled and read, not run.
#pragma once

#include "../cuda.h"

namespace persona {
namespace {

constexpr int kSplit = 256;  // tokens a block sums in the working precision
constexpr int kLanes = 8;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMoments = 3;
constexpr int kFields = 8;
constexpr uint8_t kCounted = 1, kSink = 2;
/// Of the split kernel on a multiprocessor: left to itself, ptxas spills a few bytes on sm_80 and sm_100. On sm_90,
/// where it has been timed, it does not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kLeastBlocks = 0;
#else
constexpr int kLeastBlocks = 3;
#endif

/// S sequences of at most T tokens.
struct Shape {
  int64_t S, T, K, P, splits;
};

struct Strides {
  int64_t xb, xt, xk, rb, rt, ps, sp, sf, sk;
};

/// One warp's 16 bytes a thread of one token; zeros where `read` is false or the row ends.
template <class T, bool kVector>
__device__ Pack<T> load(const T* token, int64_t column, int64_t K, int64_t stride, bool read) {
  Pack<T> pack{};
  if constexpr (kVector) {
    if (read && column < K) pack = *reinterpret_cast<const Pack<T>*>(token + column);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i)
      if (read && column + i < K) pack.value[i] = token[(column + i) * stride];
  }
  return pack;
}

template <class W, int kSize>
struct Sums {
  W square[kSize] = {}, magnitude[kSize] = {}, signed_[kSize] = {};

  template <class T>
  __device__ void add(const Pack<T>& pack) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const W x = widen(pack.value[i]);
      square[i] += x * x;
      magnitude[i] += x < 0 ? -x : x;
      signed_[i] += x;
    }
  }
};

/// Stage 1: moments [S, splits, 6, K] and counts [S, splits, 2] of one split and 32 packs of channels. Warp w has the
/// lanes w and w + 4. Sequences are rows of x where `span` is null.
template <class T, class W, bool kVector>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    split_kernel(const T* __restrict__ x, const uint8_t* __restrict__ role, const int64_t* __restrict__ persona,
                 const int64_t* __restrict__ span, W* __restrict__ moments, int32_t* __restrict__ counts,
                 bool* __restrict__ bad, Shape shape, Strides stride) {
  constexpr int kSize = Pack<T>::size, kChannels = 32 * kSize;
  __shared__ uint8_t roles[kSplit];
  __shared__ W half[kWarps][kMoments][kChannels];

  const int64_t blocks = (shape.K + kChannels - 1) / kChannels;
  const int64_t block = blockIdx.x % blocks, item = blockIdx.x / blocks;
  const int64_t s = item / shape.splits, row = span == nullptr ? s : span[3 * s];
  const int64_t start = span == nullptr ? 0 : span[3 * s + 1], stop = span == nullptr ? shape.T : span[3 * s + 2];
  const int64_t first = start + item % shape.splits * kSplit, left = stop - first;
  const int tokens = static_cast<int>(left < 0 ? 0 : left < kSplit ? left : kSplit);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = block * kChannels + lane * kSize;
  x += row * stride.xb + first * stride.xt;
  role += row * stride.rb + first * stride.rt;

  int counted = 0, sinks = 0;
  for (int t = threadIdx.x; t < kSplit; t += kThreads) {
    roles[t] = t < tokens ? role[t * stride.rt] : 0;
    // Also the barrier behind which every role is visible. kSplit is a multiple of the threads.
    counted += __syncthreads_count(roles[t] == kCounted);
    sinks += __syncthreads_count(roles[t] == kSink);
  }
  if (block == 0 && threadIdx.x == 0) {
    counts[2 * item] = counted;
    counts[2 * item + 1] = sinks;
  }
  bool overflow = false;
  for (int kind = 0; kind < (sinks > 0 ? 2 : 1); ++kind) {
    const uint8_t wanted = kind == 0 ? kCounted : kSink;
    Sums<W, kSize> low, high;
#pragma unroll 2
    for (int t = warp; t < tokens; t += kLanes) {
      const int u = t + kWarps;
      // Both loads are on their way before either is used; tokens of other roles are not read.
      const Pack<T> a = load<T, kVector>(x + t * stride.xt, column, shape.K, stride.xk, roles[t] == wanted);
      const bool second = u < tokens && roles[u % kSplit] == wanted;
      const Pack<T> c = load<T, kVector>(x + u * stride.xt, column, shape.K, stride.xk, second);
      low.add(a);
      high.add(c);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      half[warp][0][lane * kSize + i] = low.square[i] + high.square[i];
      half[warp][1][lane * kSize + i] = low.magnitude[i] + high.magnitude[i];
      half[warp][2][lane * kSize + i] = low.signed_[i] + high.signed_[i];
    }
    __syncthreads();
    W* target = moments + (item * 2 + kind) * kMoments * shape.K;
    for (int c = threadIdx.x; c < kChannels; c += kThreads) {
      const int64_t k = block * kChannels + c;
      if (k >= shape.K) continue;
#pragma unroll
      for (int m = 0; m < kMoments; ++m) {
        const W total = (half[0][m][c] + half[2][m][c]) + (half[1][m][c] + half[3][m][c]);
        target[m * shape.K + k] = total;
        // The other sums are finite where the sum of squares is.
        if (m == 0) overflow |= !isfinite(total);
      }
    }
    __syncthreads();
  }
  const int64_t owner = persona[s * stride.ps];
  // Many threads may store the flag of a sequence, all of them the same value.
  if (overflow || owner < 0 || owner >= shape.P) bad[s] = true;
}

/// The eight lanes of one thread's channel.
struct Lanes {
  double lane[kLanes] = {};

  __device__ double fold() const {
    double half[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) half[i] = lane[i] + lane[i + 4];
    return (half[0] + half[2]) + (half[1] + half[3]);
  }
};

/// Stage 2: the splits of a sequence, added in float64: [S, splits, 6, K] -> [S, 6, K], [S, splits, 2] -> [S, 2].
template <class W>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const W* __restrict__ parts, const int32_t* __restrict__ part_counts, W* __restrict__ moments,
                   int32_t* __restrict__ counts, bool* __restrict__ bad, Shape shape) {
  const int64_t blocks = (shape.K + kThreads - 1) / kThreads;
  const int64_t k = blockIdx.x % blocks * kThreads + threadIdx.x, item = blockIdx.x / blocks;
  const int64_t s = item / (2 * kMoments), moment = item % (2 * kMoments), sink = moment / kMoments;
  Lanes total;
  int32_t tokens = 0;
  for (int64_t start = 0; start < shape.splits; start += kLanes) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int64_t part = s * shape.splits + start + i;
      const int32_t count = start + i < shape.splits ? part_counts[part * 2 + sink] : 0;
      tokens += count;
      // A split without such tokens has stored no sums of them.
      if (count > 0 && k < shape.K) total.lane[i] += parts[(part * 2 * kMoments + moment) * shape.K + k];
    }
  }
  if (k == 0 && moment % kMoments == 0) counts[2 * s + sink] = tokens;
  if (k >= shape.K) return;
  const W value = static_cast<W>(total.fold());
  moments[item * shape.K + k] = value;
  if (!isfinite(value)) bad[s] = true;
}

/// Stage 3: one field of a persona, added to sums [P, 8, K].
template <class W>
__global__ void __launch_bounds__(kThreads)
    persona_kernel(const W* __restrict__ moments, const int32_t* __restrict__ counts,
                   const int64_t* __restrict__ persona, double* __restrict__ sums, Shape shape, Strides stride) {
  const int64_t blocks = (shape.K + kThreads - 1) / kThreads;
  const int64_t k = blockIdx.x % blocks * kThreads + threadIdx.x, item = blockIdx.x / blocks;
  const int64_t field = item % kFields, owner = item / kFields;
  // rms, ms and square come from the first moment; the other fields follow the moments.
  const int64_t moment = field < 2 ? 0 : field - 2;
  if (k >= shape.K) return;
  Lanes total;
  bool any = false;
  for (int64_t start = 0; start < shape.S; start += kLanes) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int64_t s = start + i;
      if (s >= shape.S || persona[s * stride.ps] != owner) continue;
      any = true;
      const int32_t count = counts[2 * s + moment / kMoments];
      if (count == 0) continue;
      double value = moments[(s * 2 * kMoments + moment) * shape.K + k];
      if (field < 2) value /= count;
      total.lane[i] += field == 0 ? sqrt(value) : value;
    }
  }
  if (any) sums[owner * stride.sp + field * stride.sf + k * stride.sk] += total.fold();
}

}  // namespace
}  // namespace persona
