// Mask selection in CUDA: one block a row, radix select on the bits of the scores in shared memory, packed store.
// Only integers are added (atomics in shared memory count keys), so the result has no order to depend on.
// Written without a GPU at hand: compiled and read, not run.
#include "../cuda.h"

#include <optional>

namespace persona {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kDigits = 256;
constexpr unsigned kAll = 0xFFFFFFFFu;

struct Unordered {
  int scores, tiebreak;
};

/// uint32 in the order of the float; -0.0 equals 0.0.
__device__ uint32_t ordered(float value) {
  uint32_t bits = __float_as_uint(value);
  if (bits == 0x80000000u) bits = 0;
  return bits < 0x80000000u ? bits | 0x80000000u : ~bits;
}

/// NaN is not below infinity.
__device__ bool has_no_order(float value) { return !(value < INFINITY); }

/// One row of scores: `|values| * channel` rounded once, or `values`; and what breaks ties, or null.
template <class T>
struct Row {
  const T* values;
  const float* channel;
  const float* tiebreak;
  int64_t stride, channel_stride, tiebreak_stride;

  template <class Key>
  __device__ Key key(int64_t k, Unordered& bad) const {
    float score = static_cast<float>(widen(values[k * stride]));
    if (channel != nullptr) score = __fmul_rn(fabsf(score), channel[k * channel_stride]);
    bad.scores |= has_no_order(score);
    Key result = ordered(score);
    if constexpr (sizeof(Key) == 8) {
      const float second = tiebreak[k * tiebreak_stride];
      bad.tiebreak |= has_no_order(second);
      result = result << 32 | ordered(second);
    }
    return result;
  }
};

/// The keys that stay: above `threshold`, and the leftmost `room` of those at it (all of them if `room` is negative).
template <class Key>
struct Threshold {
  Key value;
  int room;
};

/// In `digits`: the greatest digit that, with those above it, at least `room` keys have. One warp, eight digits a lane.
__device__ void choose_digit(const int (*counts)[kDigits], int room, int* digit, int* above, int* equal) {
  const int lane = threadIdx.x % 32, top = kDigits - 1 - lane * 8;
  int own[8], sum = 0;
  for (int i = 0; i < 8; ++i) {
    own[i] = 0;
    for (int w = 0; w < kWarps; ++w) own[i] += counts[w][top - i];
    sum += own[i];
  }
  int before = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, before, step);
    if (lane >= step) before += other;
  }
  before -= sum;
  for (int i = 0; i < 8; ++i) {
    // Exactly one digit takes the count across `room`; with room 0 it is the highest digit.
    const bool first = lane == 0 && i == 0;
    if ((before < room || (first && room == 0)) && before + own[i] >= room) {
      *digit = top - i;
      *above = before;
      *equal = own[i];
    }
    before += own[i];
  }
}

template <class Key, class Keys>
__device__ Threshold<Key> find_threshold(const Keys& keys, int64_t K, int keep) {
  __shared__ int counts[kWarps][kDigits];
  __shared__ int digit, above, equal;
  const int warp = threadIdx.x / 32;
  Key prefix = 0, known = 0;
  int room = keep;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kWarps * kDigits; i += kThreads) counts[i / kDigits][i % kDigits] = 0;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      const Key key = keys(k);
      if ((key & known) == prefix) atomicAdd(&counts[warp][(key >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (warp == 0) choose_digit(counts, room, &digit, &above, &equal);
    __syncthreads();
    prefix |= static_cast<Key>(digit) << shift;
    known |= static_cast<Key>(kDigits - 1) << shift;
    room -= above;
    // All keys that begin like this stay, whatever follows. (Everybody reads the same shared value.)
    const bool exact = equal == room;
    __syncthreads();
    if (exact) return {prefix, -1};
  }
  return {prefix, room};
}

template <class Key, class Keys>
__device__ void store_packed(const Keys& keys, int64_t K, Threshold<Key> threshold, uint8_t* bits) {
  __shared__ int equals[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t bytes = (K + 7) / 8;
  int taken = 0;
  for (int64_t start = 0; start < K; start += kThreads) {
    const int64_t k = start + threadIdx.x;
    const Key key = k < K ? keys(k) : 0;
    bool kept = k < K && key >= threshold.value;
    if (threshold.room >= 0) {
      // Equal keys compete for the last places: the lower columns win, so their number on the left is needed.
      const bool equal = k < K && key == threshold.value;
      const unsigned mine = __ballot_sync(kAll, equal);
      if (lane == 0) equals[warp] = __popc(mine);
      __syncthreads();
      int left = taken + __popc(mine & ((1u << lane) - 1));
      for (int w = 0; w < kWarps; ++w) {
        if (w < warp) left += equals[w];
        taken += equals[w];
      }
      __syncthreads();
      kept = kept && !(equal && left >= threshold.room);
    }
    // A warp's vote is the packed word: bit i is its column i.
    const unsigned word = __ballot_sync(kAll, kept);
    const int64_t byte = start / 8 + warp * 4 + lane;
    if (lane < 4 && byte < bytes) bits[byte] = static_cast<uint8_t>(word >> (8 * lane));
  }
}

/// `kStaged`: the keys of the row fit into shared memory; otherwise they are made again, from the cache, in every pass.
template <class T, class Key, bool kStaged>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Row<T> row, int64_t row_stride, int64_t tiebreak_row_stride, int64_t K, int keep,
                  uint8_t* __restrict__ bits, int* __restrict__ bad_flags) {
  extern __shared__ uint64_t room_for_keys[];
  Key* staged = reinterpret_cast<Key*>(room_for_keys);
  row.values += blockIdx.x * row_stride;
  if (sizeof(Key) == 8) row.tiebreak += blockIdx.x * tiebreak_row_stride;
  Unordered bad{};
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const Key key = row.template key<Key>(k, bad);
    if (kStaged) staged[k] = key;
  }
  // Every thread that stores a flag stores the same value.
  if (bad.scores) bad_flags[0] = 1;
  if (bad.tiebreak) bad_flags[1] = 1;
  __syncthreads();
  const auto keys = [&](int64_t k) -> Key {
    if constexpr (kStaged) return staged[k];
    return row.template key<Key>(k, bad);
  };
  const Threshold<Key> threshold = find_threshold<Key>(keys, K, keep);
  store_packed(keys, K, threshold, bits + blockIdx.x * ((K + 7) / 8));
}

template <class T, class Key>
void launch(const Row<T>& row, int64_t row_stride, int64_t tiebreak_row_stride, int64_t N, int64_t K, int keep,
            uint8_t* bits, int* flags, int device, cudaStream_t stream) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // 10 kB are for the counts.
  const int64_t wanted = K * static_cast<int64_t>(sizeof(Key)), bytes = wanted <= most - 10 * 1024 ? wanted : 0;
  const auto kernel = bytes > 0 ? &select_kernel<T, Key, true> : &select_kernel<T, Key, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  kernel<<<static_cast<unsigned>(N), kThreads, static_cast<size_t>(bytes), stream>>>(
      row, row_stride, tiebreak_row_stride, K, keep, bits, flags);
  check_launch("mask_select");
}

template <class T>
void launch_row(const Tensor& values, const std::optional<Tensor>& channel, const std::optional<Tensor>& tiebreak,
                int keep, Tensor& bits, int* flags, cudaStream_t stream) {
  Row<T> row{static_cast<const T*>(values.const_data_ptr()), nullptr, nullptr, values.stride(1), 0, 0};
  if (channel.has_value()) {
    row.channel = static_cast<const float*>(channel->const_data_ptr());
    row.channel_stride = channel->stride(0);
  }
  auto* out = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const int64_t N = values.size(0), K = values.size(1);
  const int device = values.get_device_index();
  if (tiebreak.has_value()) {
    row.tiebreak = static_cast<const float*>(tiebreak->const_data_ptr());
    row.tiebreak_stride = tiebreak->stride(1);
    launch<T, uint64_t>(row, values.stride(0), tiebreak->stride(0), N, K, keep, out, flags, device, stream);
  } else {
    launch<T, uint32_t>(row, values.stride(0), 0, N, K, keep, out, flags, device, stream);
  }
}

}  // namespace

/// Packed rows [N, ceil(K / 8)] into `bits`; 1 or 2 where scores or tiebreak hold NaN or plus infinity, else 0.
int64_t mask_select_cuda(const Tensor& values, const std::optional<Tensor>& channel,
                         const std::optional<Tensor>& tiebreak, int64_t keep, Tensor& bits) {
  STD_TORCH_CHECK(values.dim() == 2 && bits.is_contiguous(), "mask_select: values [N, K] and contiguous bits");
  STD_TORCH_CHECK(keep >= 0 && keep <= values.size(1), "mask_select: keep must lie in 0..", values.size(1));
  if (values.size(0) == 0 || values.size(1) == 0) return 0;
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const cudaStream_t stream = current_stream(values);
  Tensor flags = torch::stable::new_zeros(values, {2}, ScalarType::Int);
  auto* flag_data = static_cast<int*>(flags.mutable_data_ptr());
  const int kept = static_cast<int>(keep);
  switch (values.scalar_type()) {
    case ScalarType::Float: launch_row<float>(values, channel, tiebreak, kept, bits, flag_data, stream); break;
    case ScalarType::BFloat16:
      launch_row<__nv_bfloat16>(values, channel, tiebreak, kept, bits, flag_data, stream);
      break;
    case ScalarType::Half: launch_row<__half>(values, channel, tiebreak, kept, bits, flag_data, stream); break;
    case ScalarType::Double: launch_row<double>(values, channel, tiebreak, kept, bits, flag_data, stream); break;
    default: STD_TORCH_CHECK(false, "mask_select: values must be float32, bfloat16, float16 or float64");
  }
  int found[2] = {0, 0};
  STD_TORCH_CHECK(cudaMemcpyAsync(found, flag_data, sizeof(found), cudaMemcpyDeviceToHost, stream) == cudaSuccess &&
                      cudaStreamSynchronize(stream) == cudaSuccess,
                  "mask_select: ", cudaGetErrorString(cudaGetLastError()));
  return found[0] ? 1 : found[1] ? 2 : 0;
}

}  // namespace persona

STABLE_TORCH_LIBRARY_IMPL(persona_native, CUDA, m) { m.impl("mask_select", TORCH_BOX(&persona::mask_select_cuda)); }
