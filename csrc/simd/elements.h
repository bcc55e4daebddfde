// Element types of the tensors that the kernels read, and their exact conversion to float32.
// Free of torch and of the standard library's algorithms: these headers are compiled once per
// instruction set, and an inline library function compiled for AVX-512 could be the copy that the
// linker keeps for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#define PERSONA_INLINE inline __attribute__((always_inline))
/// The compiler forgets where the pointer comes from.
#define PERSONA_OPAQUE(pointer) __asm__("" : "+r"(pointer))

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

PERSONA_INLINE void narrow(float value, float& out) { out = value; }

// To the nearest, ties to even.
PERSONA_INLINE void narrow(float value, bf16& out) {
  const std::uint32_t bits = bits_of_float(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<std::uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// A subnormal half is a multiple of 2^-24: adding 0.5 (whose last bit is worth that much) rounds to one.
PERSONA_INLINE void narrow(float value, f16& out) {
  const std::uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u)
    half = 0x7e00u;
  else if (magnitude >= 0x477ff000u)  // from 65520 on the nearest is infinity
    half = 0x7c00u;
  else if (magnitude < 0x38800000u)
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  else
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  out.bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace
}  // namespace persona
