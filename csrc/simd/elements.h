// Element types of the tensors that the kernels read, and their exact conversion to float32.
// Free of torch and of the standard library's algorithms: these headers are compiled once per
// instruction set, and an inline library function compiled for AVX-512 could be the copy that the
// linker keeps for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#define PERSONA_INLINE inline __attribute__((always_inline))

namespace persona {

enum class Element { f32, bf16, f16, f64 };

struct bf16 {
  std::uint16_t bits;
};

struct f16 {
  std::uint16_t bits;
};

namespace {

PERSONA_INLINE float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PERSONA_INLINE std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

PERSONA_INLINE float to_float(float value) { return value; }
PERSONA_INLINE float to_float(double value) { return static_cast<float>(value); }
PERSONA_INLINE float to_float(bf16 value) { return float_of_bits(static_cast<std::uint32_t>(value.bits) << 16); }

// Shifting the exponent into place leaves it 112 too small, for subnormal halves too: one exact product
// repairs both. Infinity and NaN keep their payload and take the largest exponent.
PERSONA_INLINE float to_float(f16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t shifted = (value.bits & 0x7fffu) << 13;
  const std::uint32_t finite = bits_of_float(float_of_bits(shifted) * 0x1p112f);
  return float_of_bits(sign | ((value.bits & 0x7c00u) == 0x7c00u ? (shifted | 0x7f800000u) : finite));
}

}  // namespace
}  // namespace persona
