// What the CUDA ops share: the current stream, launch errors, loads of any float type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace persona {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The stream that torch uses on the tensor's device. (Stream::nativeHandle would need torch 2.13, and so would the
/// macro that checks such calls.)
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no current CUDA stream on device ", tensor.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

/// Whether the rows of a half-precision matrix have adjacent columns and begin at multiples of 16 bytes.
inline bool rows_at_16(const Tensor& halves) {
  return halves.stride(1) == 1 && halves.stride(0) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(halves.const_data_ptr()) % 16 == 0;
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

/// 16 bytes of consecutive elements, moved by one load.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

}  // namespace persona
