// The masked product on a CUDA device, half precision: see masked_linear_cuda.
#include <algorithm>
#include <optional>

#include "cuda_kernels.h"

namespace persona {
namespace {

template <class T, int kTiles, bool kSoft>
void launch(MaskedProduct p, const Tensor& x, cudaStream_t stream) {
  constexpr int kBlockRows = kWarps * kTileRows;
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  const int64_t across = (p.N + kBlockRows - 1) / kBlockRows, high = (p.M + 8 * kTiles - 1) / (8 * kTiles);
  STD_TORCH_CHECK(high <= 65535, "masked_linear: x has too many rows for one launch");
  // As many parts of the columns as make the device busy once.
  const int64_t steps = (p.K + kTileColumns - 1) / kTileColumns;
  const int64_t wanted = std::clamp<int64_t>(processors * blocks_at_once(kTiles) / (across * high), 1, steps);
  p.span = static_cast<int32_t>((steps + wanted - 1) / wanted * kTileColumns);
  p.splits = (p.K + p.span - 1) / p.span;
  std::optional<Tensor> parts;
  if (p.splits > 1) parts = torch::stable::new_empty(x, {p.splits, p.M, p.N}, ScalarType::Float);
  p.parts = parts.has_value() ? static_cast<float*>(parts->mutable_data_ptr()) : nullptr;

  const auto kernel = &masked_rows_kernel<T, kTiles, kSoft>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(kTiles));
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(p.splits), static_cast<unsigned>(high));
  kernel<<<grid, kThreads, shared_bytes(kTiles), stream>>>(p);
  check_launch("masked_linear");
  if (p.parts != nullptr) {
    const int64_t blocks = (static_cast<int64_t>(p.M) * p.N + kThreads - 1) / kThreads;
    add_parts_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
    check_launch("masked_linear");
  }
}

template <class T, bool kSoft>
void launch_tiles(const MaskedProduct& p, const Tensor& x, cudaStream_t stream) {
  // With a soft gate a kernel for one tile would not have enough registers.
  if constexpr (!kSoft)
    if (p.M <= 8) return launch<T, 1, kSoft>(p, x, stream);
  if (p.M <= 16) return launch<T, 2, kSoft>(p, x, stream);
  if (p.M <= 32) return launch<T, 4, kSoft>(p, x, stream);
  launch<T, 8, kSoft>(p, x, stream);
}

template <class T>
void launch_gate(const MaskedProduct& p, const Tensor& x, cudaStream_t stream) {
  p.gamma == 0 ? launch_tiles<T, false>(p, x, stream) : launch_tiles<T, true>(p, x, stream);
}

}  // namespace

/// y [M, N] for x [M, K], weight [N, K] in half precision with adjacent columns, masks [P, N, K / 8], personas [M] or
/// [1]; K a multiple of 32, rows of x and weight at multiples of 16 bytes, of masks at multiples of 4. A persona that
/// does not exist fills its row with NaN. Never waits for the device.
bool masked_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& bits, const Tensor& persona, double gamma,
                        const std::optional<Tensor>& bias, Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && bits.dim() == 3 && persona.dim() == 1 && y.dim() == 2,
                  "masked_linear: x, weight, bits, persona and y must have 2, 2, 3, 1 and 2 dimensions");
  const int64_t M = x.size(0), N = weight.size(0), K = x.size(1), P = bits.size(0), limit = int64_t{1} << 31;
  STD_TORCH_CHECK(weight.size(1) == K && bits.size(1) == N && bits.size(2) == K / 8 && y.size(0) == M &&
                      y.size(1) == N && y.is_contiguous(),
                  "masked_linear: the sizes do not match");
  STD_TORCH_CHECK(persona.size(0) == M || persona.size(0) == 1, "masked_linear: a persona for each row, or one");
  STD_TORCH_CHECK(M < limit && N < limit && K < limit && P < limit && M * N / kThreads < limit,
                  "masked_linear: too large for one launch");
  STD_TORCH_CHECK(K % kLaneColumns == 0 && rows_at_16(x) && rows_at_16(weight),
                  "masked_linear: x or weight not aligned");
  STD_TORCH_CHECK(bits.stride(2) == 1 && bits.stride(1) % 4 == 0 && bits.stride(0) % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(bits.const_data_ptr()) % 4 == 0,
                  "masked_linear: bits not aligned");
  if (M == 0 || N == 0) return true;
  STD_TORCH_CHECK(K > 0, "masked_linear: no columns");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  MaskedProduct p{};
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.bits = static_cast<const uint8_t*>(bits.const_data_ptr());
  p.persona = static_cast<const int32_t*>(persona.const_data_ptr());
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.stride_x = x.stride(0), p.stride_weight = weight.stride(0);
  p.stride_persona_bits = bits.stride(0), p.stride_row_bits = bits.stride(1);
  p.stride_persona = persona.size(0) == 1 ? 0 : persona.stride(0);
  p.stride_bias = bias.has_value() ? bias->stride(0) : 0;
  p.M = static_cast<int32_t>(M), p.N = static_cast<int32_t>(N), p.K = static_cast<int32_t>(K);
  p.P = static_cast<int32_t>(P), p.gamma = static_cast<float>(gamma);
  const cudaStream_t stream = current_stream(x);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: launch_gate<__nv_bfloat16>(p, x, stream); break;
    case ScalarType::Half: launch_gate<__half>(p, x, stream); break;
    default: STD_TORCH_CHECK(false, "masked_linear: x must be bfloat16 or float16");
  }
  return true;
}

}  // namespace persona

STABLE_TORCH_LIBRARY_IMPL(persona_native, CUDA, m) { m.impl("masked_linear", TORCH_BOX(&persona::masked_linear_cuda)); }
