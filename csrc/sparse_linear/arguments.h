// What the kernels of the sparse product read and write, free of torch.
#pragma once

#include <cstdint>

#include "../masked_linear/arguments.h"

namespace persona {

/// Elements that are readable behind the last value.
constexpr std::int64_t kSparsePadding = 64;

/// The kept weights of row n, in order, are `values[offsets[n] .. offsets[n + 1])`.
struct SparseMatrix {
  const void* values;
  Element element;
  const std::uint8_t* bits;  // [N, ceil(K / 8)]
  const std::int64_t* offsets;
  std::int64_t rows, columns;
};

struct SparseArguments {
  const void* x;      // from prepare_rows
  std::int64_t rows;  // at most kMostRows
  SparseMatrix weight;
  const void* bias;  // [N], or null
  std::int64_t bias_stride;
  void* y;  // [M, N]
  std::int64_t y_stride;
};

struct SparseBlocks {
  BlockArguments product;
  SparseMatrix weight;
};

struct SparseTiles {
  TileArguments product;
  SparseMatrix weight;
};

}  // namespace persona
