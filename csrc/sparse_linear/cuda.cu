// The compressed weight on a CUDA device, half precision: see sparse_linear_cuda and expand_rows_cuda.
#include <optional>

#include "cuda_kernels.h"

namespace persona {
namespace {

constexpr int kMostRows = 16;

template <class T, int kTiles>
void launch(const SparseProduct& p, cudaStream_t stream) {
  const auto kernel = &sparse_rows_kernel<T, kTiles>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  kernel<<<static_cast<unsigned>((p.N + kTileRows - 1) / kTileRows), kThreads, kSharedBytes, stream>>>(p);
  check_launch("sparse_linear");
}

template <class T>
void launch_tiles(const SparseProduct& p, cudaStream_t stream) {
  if (p.dense != nullptr) return launch<T, 0>(p, stream);
  if (p.M <= 8) return launch<T, 1>(p, stream);
  launch<T, 2>(p, stream);
}

void launch_type(const SparseProduct& p, const Tensor& values) {
  const cudaStream_t stream = current_stream(values);
  switch (values.scalar_type()) {
    case ScalarType::BFloat16: launch_tiles<__nv_bfloat16>(p, stream); break;
    case ScalarType::Half: launch_tiles<__half>(p, stream); break;
    default: STD_TORCH_CHECK(false, "sparse_linear: values must be bfloat16 or float16");
  }
}

/// The parts of `N` rows of the weight from row `first` on.
SparseProduct weight_of(const Tensor& values, const Tensor& bits, const Tensor& offsets, int64_t first, int64_t N,
                        int64_t K) {
  STD_TORCH_CHECK(values.dim() == 1 && bits.dim() == 2 && offsets.dim() == 1,
                  "sparse_linear: values, bits and offsets must have 1, 2 and 1 dimensions");
  STD_TORCH_CHECK(K > 0 && K % kLaneColumns == 0 && bits.size(1) == K / 8 && first >= 0 && N >= 0 &&
                      first + N <= bits.size(0) && offsets.size(0) == bits.size(0) + 1,
                  "sparse_linear: the sizes do not match");
  STD_TORCH_CHECK(K < (int64_t{1} << 31) && N < (int64_t{1} << 31), "sparse_linear: too large for one launch");
  STD_TORCH_CHECK(values.is_contiguous() && bits.is_contiguous() && offsets.is_contiguous() &&
                      reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(bits.const_data_ptr()) % 4 == 0,
                  "sparse_linear: values, bits and offsets must be contiguous and aligned");
  SparseProduct p{};
  p.values = values.const_data_ptr();
  p.bits = static_cast<const uint8_t*>(bits.const_data_ptr()) + first * (K / 8);
  p.offsets = static_cast<const int64_t*>(offsets.const_data_ptr()) + first;
  p.room = values.numel();
  p.N = static_cast<int32_t>(N), p.K = static_cast<int32_t>(K);
  return p;
}

}  // namespace

/// y [M, N] for at most 16 rows x [M, K] in half precision at multiples of 16 bytes; K a multiple of 32.
void sparse_linear_cuda(const Tensor& x, const Tensor& values, const Tensor& bits, const Tensor& offsets,
                        const std::optional<Tensor>& bias, Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && y.is_contiguous() && y.size(0) == x.size(0) &&
                      y.size(1) == bits.size(0) && x.size(0) <= kMostRows && x.scalar_type() == values.scalar_type(),
                  "sparse_linear: x [M, K] of at most ", kMostRows, " rows and contiguous y [M, N]");
  STD_TORCH_CHECK(rows_at_16(x), "sparse_linear: x not aligned");
  if (x.size(0) == 0 || bits.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  SparseProduct p = weight_of(values, bits, offsets, 0, bits.size(0), x.size(1));
  p.x = x.const_data_ptr(), p.stride_x = x.stride(0), p.M = static_cast<int32_t>(x.size(0));
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.stride_bias = bias.has_value() ? bias->stride(0) : 0;
  p.y = y.mutable_data_ptr();
  launch_type(p, values);
}

/// Rows `first` and on of the dense weight into contiguous `out` [count, K]; K a multiple of 32.
void expand_rows_cuda(const Tensor& values, const Tensor& bits, const Tensor& offsets, int64_t first, Tensor& out) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == values.scalar_type() &&
                      reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0,
                  "expand_rows: out [count, K] must be contiguous and aligned");
  if (out.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  SparseProduct p = weight_of(values, bits, offsets, first, out.size(0), out.size(1));
  p.dense = out.mutable_data_ptr();
  launch_type(p, values);
}

}  // namespace persona

STABLE_TORCH_LIBRARY_IMPL(persona_native, CUDA, m) {
  m.impl("sparse_linear", TORCH_BOX(&persona::sparse_linear_cuda));
  m.impl("expand_rows", TORCH_BOX(&persona::expand_rows_cuda));
}
