// The functions that binding.cpp registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace persona {

using torch::stable::Tensor;

Tensor activation_stats_cpu(const Tensor& x, const Tensor& role, const Tensor& persona, Tensor& sums,
                            const std::optional<Tensor>& spans);

int64_t mask_select_cpu(const Tensor& values, const std::optional<Tensor>& channel,
                        const std::optional<Tensor>& tiebreak, int64_t keep, Tensor& bits);
int64_t mask_select_nm_cpu(const Tensor& weight, const Tensor& channel, int64_t n, int64_t m, Tensor& bits);
int64_t mask_select_threshold_cpu(const Tensor& scores, double threshold, int64_t ties, Tensor& bits);
int64_t count_digits_cpu(const Tensor& scores, int64_t level, int64_t prefix, Tensor& counts);

void pack_bits_cpu(const Tensor& mask, Tensor& bits);
void unpack_bits_cpu(const Tensor& bits, int64_t columns, Tensor& mask);

bool masked_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& bits, const Tensor& persona, double gamma,
                       const std::optional<Tensor>& bias, Tensor& y);
bool correction_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& columns, const Tensor& offsets,
                           const Tensor& persona, double gamma, const std::optional<Tensor>& bias, Tensor& y);
void subtract_removed_cpu(const Tensor& x, const Tensor& weight, const Tensor& columns, const Tensor& offsets,
                          double scale, Tensor& y);
void sparse_linear_cpu(const Tensor& x, const Tensor& values, const Tensor& bits, const Tensor& offsets,
                       const std::optional<Tensor>& bias, Tensor& y);
void expand_rows_cpu(const Tensor& values, const Tensor& bits, const Tensor& offsets, int64_t first, Tensor& out);
void gate_rows_cpu(const Tensor& weight, const Tensor& bits, double gamma, Tensor& out);

std::string build_info();
bool has_cuda();
std::string instruction_sets();
std::string instruction_set();
bool use_instruction_set(std::string name);

}  // namespace persona
