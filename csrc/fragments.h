// Half-precision weights as fragments of the tensor cores' 16 x 8 x 16 product, gated by mask bits on the way.
//
// Of 16 rows of the weight and 128 columns, lane 4 g + t has rows g and g + 8 and the 32 columns from 32 t on, one mask
// word of each row. The product's own order of columns does not matter as long as x comes in the same one: step j of
// four takes a lane's columns 8 j to 8 j + 7, as two products.
#pragma once

#include <type_traits>

#include "cuda.h"

namespace persona {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTileRows = 16, kTileColumns = 128, kLaneColumns = 32;
constexpr int kRowsOfTile = 8;  // rows of x beside each other in a product

/// Four bytes out of the eight of b:a; a selector with its highest bit set repeats the sign of the byte.
__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selectors));
  return out;
}

/// `sum` 16 x 8 += (16 x 16) (16 x 8), in float32.
template <class T>
__device__ inline void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                uint32_t b1) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

/// The other way of `widen`, rounded.
template <class T>
__device__ inline T narrow(float v) {
  if constexpr (std::is_same<T, __half>::value)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

}  // namespace persona
