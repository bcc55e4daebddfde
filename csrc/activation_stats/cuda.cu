// Activation statistics on a CUDA device. Written without a GPU at hand: compiled and read, not run.
#include <algorithm>
#include <optional>

#include "cuda_kernels.h"

namespace persona {
namespace {

template <class T, class W>
void launch(const Tensor& x, const Tensor& role, const Tensor& persona, const int64_t* span, Tensor& sums, Tensor& bad,
            Shape shape, Strides stride) {
  constexpr int kChannels = 32 * Pack<T>::size;
  const ScalarType work = sizeof(W) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t fold_blocks = (shape.K + kThreads - 1) / kThreads;
  Tensor moments = torch::stable::new_empty(x, {shape.S, shape.splits, 2 * kMoments, shape.K}, work);
  Tensor counts = torch::stable::new_empty(x, {shape.S, shape.splits, 2}, ScalarType::Int);
  const cudaStream_t stream = current_stream(x);
  const auto* x_data = static_cast<const T*>(x.const_data_ptr());
  const auto* role_data = static_cast<const uint8_t*>(role.const_data_ptr());
  const auto* persona_data = static_cast<const int64_t*>(persona.const_data_ptr());
  auto* bad_data = static_cast<bool*>(bad.mutable_data_ptr());
  auto* moment_data = static_cast<W*>(moments.mutable_data_ptr());
  auto* count_data = static_cast<int32_t*>(counts.mutable_data_ptr());

  const int64_t grid = shape.S * shape.splits * ((shape.K + kChannels - 1) / kChannels);
  STD_TORCH_CHECK(grid < (int64_t{1} << 31), "activation_stats: x is too large for one launch");
  const int64_t size = Pack<T>::size;
  const bool vector = stride.xk == 1 && shape.K % size == 0 && stride.xt % size == 0 && stride.xb % size == 0 &&
                      reinterpret_cast<uintptr_t>(x_data) % 16 == 0;
  const auto split = vector ? &split_kernel<T, W, true> : &split_kernel<T, W, false>;
  split<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(x_data, role_data, persona_data, span, moment_data,
                                                              count_data, bad_data, shape, stride);
  check_launch("activation_stats");

  Tensor combined = moments, combined_counts = counts;
  if (shape.splits > 1) {
    combined = torch::stable::new_empty(x, {shape.S, 2 * kMoments, shape.K}, work);
    combined_counts = torch::stable::new_empty(x, {shape.S, 2}, ScalarType::Int);
    combine_kernel<W><<<static_cast<unsigned>(shape.S * 2 * kMoments * fold_blocks), kThreads, 0, stream>>>(
        moment_data, count_data, static_cast<W*>(combined.mutable_data_ptr()),
        static_cast<int32_t*>(combined_counts.mutable_data_ptr()), bad_data, shape);
    check_launch("activation_stats");
  }
  persona_kernel<W><<<static_cast<unsigned>(shape.P * kFields * fold_blocks), kThreads, 0, stream>>>(
      static_cast<const W*>(combined.const_data_ptr()), static_cast<const int32_t*>(combined_counts.const_data_ptr()),
      persona_data, static_cast<double*>(sums.mutable_data_ptr()), shape, stride);
  check_launch("activation_stats");
}

/// A copy of `spans` on the device of x; the longest becomes `shape.T`. What is not pinned has been read when this
/// returns, and nobody waits for the kernels in front of it.
Tensor send_spans(const Tensor& x, const Tensor& spans, Shape& shape) {
  STD_TORCH_CHECK(spans.is_cpu() && spans.is_contiguous() && spans.numel() == 3 * shape.S,
                  "activation_stats: spans must be contiguous [S, 3] on the CPU");
  const int64_t* border = static_cast<const int64_t*>(spans.const_data_ptr());
  shape.T = 0;
  for (int64_t s = 0; s < shape.S; ++s) shape.T = std::max(shape.T, border[3 * s + 2] - border[3 * s + 1]);
  Tensor copy = torch::stable::new_empty(x, {shape.S, 3}, ScalarType::Long);
  const cudaError_t error =
      cudaMemcpyAsync(copy.mutable_data_ptr(), border, static_cast<size_t>(3 * shape.S) * sizeof(int64_t),
                      cudaMemcpyHostToDevice, current_stream(x));
  STD_TORCH_CHECK(error == cudaSuccess, "activation_stats: ", cudaGetErrorString(error));
  return copy;
}

}  // namespace

/// See kernels/ops/activation_stats/__init__.py, which has checked the arguments; `spans` are in the host's memory.
/// Never waits for the device.
Tensor activation_stats_cuda(const Tensor& x, const Tensor& role, const Tensor& persona, Tensor& sums,
                             const std::optional<Tensor>& spans) {
  STD_TORCH_CHECK(x.dim() == 3 && role.dim() == 2 && persona.dim() == 1 && sums.dim() == 3,
                  "activation_stats: x, role, persona and sums must have 3, 2, 1 and 3 dimensions");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Shape shape{persona.size(0), x.size(1), x.size(2), sums.size(0), 0};
  std::optional<Tensor> on_device;
  if (spans.has_value()) on_device = send_spans(x, *spans, shape);
  const auto* span = on_device.has_value() ? static_cast<const int64_t*>(on_device->const_data_ptr()) : nullptr;
  shape.splits = (shape.T + kSplit - 1) / kSplit;
  const Strides stride{x.stride(0),       x.stride(1),    x.stride(2),    role.stride(0), role.stride(1),
                       persona.stride(0), sums.stride(0), sums.stride(1), sums.stride(2)};
  Tensor bad = torch::stable::new_zeros(x, {shape.S}, ScalarType::Bool);
  if (shape.S == 0 || shape.T == 0 || shape.K == 0 || shape.P == 0) return bad;
  switch (x.scalar_type()) {
    case ScalarType::Float: launch<float, float>(x, role, persona, span, sums, bad, shape, stride); break;
    case ScalarType::BFloat16: launch<__nv_bfloat16, float>(x, role, persona, span, sums, bad, shape, stride); break;
    case ScalarType::Half: launch<__half, float>(x, role, persona, span, sums, bad, shape, stride); break;
    case ScalarType::Double: launch<double, double>(x, role, persona, span, sums, bad, shape, stride); break;
    default: STD_TORCH_CHECK(false, "activation_stats: x must be float32, bfloat16, float16 or float64");
  }
  return bad;
}

}  // namespace persona

STABLE_TORCH_LIBRARY_IMPL(persona_native, CUDA, m) {
  m.impl("activation_stats", TORCH_BOX(&persona::activation_stats_cuda));
}
