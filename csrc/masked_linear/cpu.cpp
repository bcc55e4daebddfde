// The masked product of few rows, and gated panels of the weight, on torch's CPU threads.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../ops.h"
#include "launch.h"

namespace persona {
namespace {

/// [M], or [1] for one persona of all rows; empty if one of the indices has no mask. `plain` are set bits for a row.
std::vector<MaskRows> masks_of(const Tensor& bits, const Tensor& persona, const std::vector<uint8_t>& plain) {
  const int32_t* index = static_cast<const int32_t*>(persona.const_data_ptr());
  const uint8_t* first = static_cast<const uint8_t*>(bits.const_data_ptr());
  std::vector<MaskRows> masks;
  for (int64_t m = 0; m < persona.size(0); ++m) {
    const int64_t p = index[m * persona.stride(0)];
    if (p < -1 || p >= bits.size(0)) return {};
    masks.push_back(p < 0 ? MaskRows{plain.data(), 0} : MaskRows{first + p * bits.stride(0), bits.stride(1)});
  }
  return masks;
}

/// The order that brings rows with one mask together, which then share gated weights; empty where it changes nothing.
std::vector<int64_t> together(const std::vector<MaskRows>& masks) {
  std::vector<int64_t> order = rows_by_mask(masks, static_cast<int64_t>(masks.size()));
  if (std::is_sorted(order.begin(), order.end())) return {};
  const auto alike = [&](int64_t a, int64_t b) {
    return masks[static_cast<size_t>(a)].bits == masks[static_cast<size_t>(b)].bits;
  };
  return std::adjacent_find(order.begin(), order.end(), alike) == order.end() ? std::vector<int64_t>{} : order;
}

/// `multiply_rows` in another order of the rows; `gates` are in the order of x.
void multiply_in_order(const std::vector<int64_t>& order, const Tensor& x, const Tensor& weight, Gates gates,
                       const std::optional<Tensor>& bias, Tensor& y) {
  const int64_t rows = x.size(0), columns = x.size(1), size = static_cast<int64_t>(x.element_size());
  const size_t y_bytes = static_cast<size_t>(weight.size(0) * size);
  const char* source = static_cast<const char*>(x.const_data_ptr());
  char* target = static_cast<char*>(y.mutable_data_ptr());
  std::vector<char> sorted(static_cast<size_t>(rows * columns * size)), result(static_cast<size_t>(rows) * y_bytes);
  std::vector<MaskRows> masks;
  char* next = sorted.data();
  for (const int64_t m : order) {
    masks.push_back(gates.masks[static_cast<size_t>(m)]);
    for (int64_t k = 0; k < columns; ++k, next += size)
      std::memcpy(next, source + (m * x.stride(0) + k * x.stride(1)) * size, static_cast<size_t>(size));
  }
  gates.masks = std::move(masks);
  const Matrix rows_of_x{sorted.data(), rows, columns, {columns, 1}};
  multiply_rows(PreparedRows(rows_of_x, element_of(x, "x"), size), rows, weight, gates, bias, result.data());
  const char* row = result.data();
  for (const int64_t m : order) {
    std::memcpy(target + static_cast<size_t>(m) * y_bytes, row, y_bytes);
    row += y_bytes;
  }
}

}  // namespace

void check_weight(const Tensor& weight, const Tensor& like) {
  check_cpu(weight, "weight", 2);
  STD_TORCH_CHECK(weight.scalar_type() == like.scalar_type(), "weight and the result must have one dtype");
  STD_TORCH_CHECK(weight.size(1) < 2 || weight.numel() == 0 || weight.stride(1) == 1,
                  "the columns of weight must be adjacent");
  STD_TORCH_CHECK(element_of(weight, "weight") != Element::f64, "float64 is not served");
}

void check_product(const Tensor& x, const Tensor& weight, const Tensor& persona, const std::optional<Tensor>& bias,
                   const Tensor& y) {
  check_cpu(x, "x", 2);
  check_cpu(persona, "persona", 1);
  check_weight(weight, y);
  const int64_t rows = x.size(0), outputs = weight.size(0);
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type() && x.size(1) == weight.size(1), "x must be [M, K], of y's dtype");
  STD_TORCH_CHECK(persona.scalar_type() == ScalarType::Int && (persona.size(0) == 1 || persona.size(0) == rows),
                  "persona must be int32 [M] or [1]");
  check_plain(y, "y", x.scalar_type(), {rows, outputs});
  if (bias.has_value()) {
    check_cpu(*bias, "bias", 1);
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type() && bias->size(0) == outputs, "bias must be [N]");
  }
}

void multiply_rows(const PreparedRows& x, int64_t rows, const Tensor& weight, const Gates& gates,
                   const std::optional<Tensor>& bias, void* y) {
  const int64_t outputs = weight.size(0);
  const int64_t parts = parts_of(outputs, kLeastWeights / std::max<int64_t>(weight.size(1), 1));
  const auto kernel = kernels().masked_linear;
  const bool shared = gates.masks.size() == 1;
  parallel_parts(outputs, parts, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t m = 0; m < rows; m += kMostRows) {
      const MaskedArguments arguments{x.at(m),
                                      std::min(rows - m, kMostRows),
                                      matrix_of(weight),
                                      element_of(weight, "weight"),
                                      gates.masks.data() + (shared ? 0 : m),
                                      shared,
                                      gates.gamma,
                                      bias.has_value() ? bias->const_data_ptr() : nullptr,
                                      bias.has_value() ? bias->stride(0) : 0,
                                      static_cast<char*>(y) + static_cast<size_t>(m * outputs) * weight.element_size(),
                                      outputs,
                                      gates.removed.empty() ? nullptr : gates.removed.data() + m,
                                      gates.removed_scale,
                                      gates.removed.empty() ? nullptr : gates.flat + m * gates.flat_stride,
                                      gates.flat_stride};
      kernel(arguments, first, last);
    }
  });
}

bool masked_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& bits, const Tensor& persona, double gamma,
                       const std::optional<Tensor>& bias, Tensor& y) {
  check_product(x, weight, persona, bias, y);
  check_cpu(bits, "bits", 3);
  const int64_t row_bytes = bytes_of(weight.size(1));
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.size(1) == weight.size(0) &&
                      bits.size(2) == row_bytes && (row_bytes < 2 || bits.numel() == 0 || bits.stride(2) == 1),
                  "bits must be uint8 [P, N, ceil(K/8)] with adjacent bytes");
  const std::vector<uint8_t> plain(static_cast<size_t>(row_bytes), 0xff);
  const Gates gates{masks_of(bits, persona, plain), static_cast<float>(gamma), {}, 0, nullptr, 0};
  if (gates.masks.empty() && persona.size(0) > 0) return false;
  if (x.size(0) == 0 || multiply_tiles(x, weight, gates, bias, y) || multiply_blocks(x, weight, gates, bias, y))
    return true;
  const auto order = kernels().shares_gates ? together(gates.masks) : std::vector<int64_t>{};
  if (!order.empty())
    multiply_in_order(order, x, weight, gates, bias, y);
  else
    multiply_rows(PreparedRows(x), x.size(0), weight, gates, bias, y.mutable_data_ptr());
  return true;
}

void gate_rows_cpu(const Tensor& weight, const Tensor& bits, double gamma, Tensor& out) {
  check_weight(weight, out);
  check_cpu(bits, "bits", 2);
  const int64_t rows = weight.size(0), columns = weight.size(1), row_bytes = bytes_of(columns);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.size(0) == rows && bits.size(1) == row_bytes &&
                      (row_bytes < 2 || rows == 0 || bits.stride(1) == 1),
                  "bits must be uint8 [N, ceil(K/8)] with adjacent bytes");
  check_plain(out, "out", weight.scalar_type(), {rows, columns});
  const GateArguments arguments{matrix_of(weight),
                                element_of(weight, "weight"),
                                {static_cast<const uint8_t*>(bits.const_data_ptr()), bits.stride(0)},
                                static_cast<float>(gamma),
                                out.mutable_data_ptr()};
  const auto kernel = kernels().gate_rows;
  const int64_t parts = parts_of(rows, kLeastWeights / std::max<int64_t>(columns, 1));
  parallel_parts(rows, parts, [&](int64_t, int64_t first, int64_t last) { kernel(arguments, first, last); });
}

}  // namespace persona
