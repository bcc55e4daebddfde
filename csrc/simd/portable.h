// Plain C++ that a compiler can vectorise for any processor.
#pragma once

#include "elements.h"

namespace persona {
namespace {

struct Portable {
  static constexpr const char* name = "portable";
  static constexpr int width = 8, registers = 16;
  static constexpr bool fuses_gates = false;

  struct F {
    float lane[width];
  };

  struct I {
    std::uint32_t lane[width];
  };

  template <class T>
  static PERSONA_INLINE F load(const T* p) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = to_float(p[i]);
    return r;
  }

  /// One half of the 2 * width elements at `p`, in the order that is cheapest to load: see `natural`.
  template <int half, class T>
  static PERSONA_INLINE F load_half(const T* p) {
    return load(p + half * width);
  }

  /// Offset in the element order of lane `i` of half `half`.
  template <class T>
  static constexpr int natural(int half, int i) {
    return half * width + i;
  }

  static PERSONA_INLINE void store(float* p, F a) { std::memcpy(p, a.lane, sizeof a.lane); }

  static PERSONA_INLINE F add(F a, F b) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = a.lane[i] + b.lane[i];
    return r;
  }

  static PERSONA_INLINE F mul(F a, F b) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = a.lane[i] * b.lane[i];
    return r;
  }

  static PERSONA_INLINE F multiply_add(F a, F b, F c) { return add(mul(a, b), c); }

  static PERSONA_INLINE F abs(F a) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = float_of_bits(bits_of_float(a.lane[i]) & 0x7fffffffu);
    return r;
  }

  template <class T>
  static PERSONA_INLINE void store_as(T* p, F a) {
    for (int i = 0; i < width; ++i) narrow(a.lane[i], p[i]);
  }

  static PERSONA_INLINE F broadcast(float value) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = value;
    return r;
  }

  static PERSONA_INLINE float sum(F a) {
    float lane[width];
    std::memcpy(lane, a.lane, sizeof lane);
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }

  static PERSONA_INLINE void sum_each(const F (&a)[2], float (&sums)[2]) {
    for (int i = 0; i < 2; ++i) sums[i] = sum(a[i]);
  }

  /// `width` bits of a packed mask.
  using Gate = std::uint8_t;
  static PERSONA_INLINE Gate gate(const std::uint8_t* bits) { return *bits; }

  static PERSONA_INLINE Gate quick_gate(const std::uint8_t* bits) { return gate(bits); }

  /// Lanes of `kept` where the gate's bit is set, else of `removed`.
  static PERSONA_INLINE F pick(Gate gate, F kept, F removed) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = (gate >> i) & 1 ? kept.lane[i] : removed.lane[i];
    return r;
  }

  /// The elements at `p` whose bit is set, 0 for the others.
  template <class T>
  static PERSONA_INLINE void store_kept(T* out, const T* p, const std::uint8_t* bits) {
    store_as(out, pick(gate(bits), load(p), broadcast(0)));
  }

  /// The first elements at `p` in the lanes whose bit is set, in order, and 0 in the others.
  template <class T>
  static PERSONA_INLINE F expand(const T* p, const std::uint8_t* bits) {
    F r;
    for (int i = 0; i < width; ++i) r.lane[i] = (*bits >> i) & 1 ? to_float(*p++) : 0.0f;
    return r;
  }

  static PERSONA_INLINE int count_bits(const std::uint8_t* bits) { return __builtin_popcount(*bits); }

  static PERSONA_INLINE I zero() { return {}; }

  static PERSONA_INLINE I bits(F a) {
    I r;
    std::memcpy(r.lane, a.lane, sizeof r.lane);
    return r;
  }

  static PERSONA_INLINE void store(std::int32_t* p, I a) { std::memcpy(p, a.lane, sizeof a.lane); }

  static PERSONA_INLINE I max(I a, I b) {
    I r;
    for (int i = 0; i < width; ++i) r.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return r;
  }

  static PERSONA_INLINE std::uint32_t largest(I a) {
    std::uint32_t r = 0;
    for (int i = 0; i < width; ++i) r = a.lane[i] > r ? a.lane[i] : r;
    return r;
  }

  /// How many of `n` (a multiple of 64) values are at least `threshold`.
  static PERSONA_INLINE std::int64_t count_at_least(const std::int32_t* p, std::int64_t n, std::int32_t threshold) {
    std::int32_t count = 0;
    for (std::int64_t i = 0; i < n; ++i) count += p[i] >= threshold;
    return count;
  }

  static PERSONA_INLINE std::uint64_t at_least(const std::int32_t* p, std::int32_t threshold) {
    std::uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) mask |= static_cast<std::uint64_t>(p[i] >= threshold) << i;
    return mask;
  }

  static PERSONA_INLINE std::uint64_t equal(const std::int32_t* p, std::int32_t value) {
    std::uint64_t mask = 0;
    for (int i = 0; i < 64; ++i) mask |= static_cast<std::uint64_t>(p[i] == value) << i;
    return mask;
  }
};

}  // namespace
}  // namespace persona
