// AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "elements.h"

namespace persona {
namespace {

/// For every mask byte, where 8 lanes find their values among those that are kept.
struct Expansion {
  /// How many bits are set in front of each bit; its sign where it is not set.
  std::uint8_t source[256][8];
  /// Bytes of 16-bit values in the upper halves of 32-bit lanes, and -1 where there is to be a zero.
  std::uint8_t upper[256][32];

  constexpr Expansion() : source{}, upper{} {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0, before = 0; i < 8; before += (byte >> i++) & 1) {
        const bool kept = (byte >> i) & 1;
        source[byte][i] = static_cast<std::uint8_t>(before | (kept ? 0 : 0x80));
        for (int j = 0; j < 4; ++j)
          upper[byte][4 * i + j] = static_cast<std::uint8_t>(kept && j >= 2 ? 2 * before + j - 2 : 0xff);
      }
  }
};

alignas(64) constexpr Expansion expansion;

struct Avx2 {
  static constexpr const char* name = "avx2";
  static constexpr int width = 8, registers = 16;
  static constexpr bool fuses_gates = false;
  using F = __m256;
  using I = __m256i;

  static PERSONA_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }

  static PERSONA_INLINE F load(const double* p) {
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(p)));
  }

  static PERSONA_INLINE F load(const bf16* p) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
  }

  static PERSONA_INLINE F load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  /// One half of the 2 * width elements at `p`, in the order that is cheapest to load: see `natural`.
  template <int half, class T>
  static PERSONA_INLINE F load_half(const T* p) {
    return load(p + half * width);
  }

  // Even elements are a shift away from float32, odd ones a mask: no widening shuffle.
  template <int half>
  static PERSONA_INLINE F load_half(const bf16* p) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (half == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(packed, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(packed, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  /// Offset in the element order of lane `i` of half `half`.
  template <class T>
  static constexpr int natural(int half, int i) {
    return __is_same(T, bf16) ? 2 * i + half : half * width + i;
  }

  static PERSONA_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static PERSONA_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static PERSONA_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static PERSONA_INLINE F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static PERSONA_INLINE F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

  static PERSONA_INLINE void store_as(float* p, F a) { store(p, a); }

  static PERSONA_INLINE void store_as(bf16* p, F a) {
    const __m256i x = bits(a), odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i nearest =
        _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i wide = _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i low = _mm256_castsi256_si128(wide), high = _mm256_extracti128_si256(wide, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }

  static PERSONA_INLINE void store_as(f16* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }

  static PERSONA_INLINE F broadcast(float value) { return _mm256_set1_ps(value); }

  static PERSONA_INLINE float sum(F a) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
  }

  static PERSONA_INLINE void sum_each(const F (&a)[2], float (&sums)[2]) {
    for (int i = 0; i < 2; ++i) sums[i] = sum(a[i]);
  }

  /// `width` bits of a packed mask: all bits of a lane whose bit is set.
  using Gate = __m256i;

  static PERSONA_INLINE Gate gate(const std::uint8_t* bits) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), place), place);
  }

  /// A gate of right signs, which are all that `pick` looks at. Reads 4 bytes.
  static PERSONA_INLINE Gate quick_gate(const std::uint8_t* bits) {
    int word;
    std::memcpy(&word, bits, sizeof word);
    return _mm256_sllv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
  }

  /// Lanes of `kept` where the gate's bit is set, else of `removed`.
  static PERSONA_INLINE F pick(Gate gate, F kept, F removed) {
    return _mm256_blendv_ps(removed, kept, _mm256_castsi256_ps(gate));
  }

  /// The elements at `p` whose bit is set, 0 for the others.
  template <class T>
  static PERSONA_INLINE void store_kept(T* out, const T* p, const std::uint8_t* bits) {
    store_as(out, pick(gate(bits), load(p), broadcast(0)));
  }

  /// The first elements at `p` in the lanes whose bit is set, in order, and 0 in the others. Reads `width` elements.
  template <class T>
  static PERSONA_INLINE F expand(const T* p, const std::uint8_t* bits) {
    const __m128i source = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(expansion.source[*bits]));
    const __m256i lanes = _mm256_cvtepi8_epi32(source);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load(p), lanes), _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
  }

  static PERSONA_INLINE F expand(const bf16* p, const std::uint8_t* bits) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(expansion.upper[*bits]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, places));
  }

  static PERSONA_INLINE int count_bits(const std::uint8_t* bits) { return __builtin_popcount(*bits); }

  static PERSONA_INLINE I zero() { return _mm256_setzero_si256(); }
  static PERSONA_INLINE I bits(F a) { return _mm256_castps_si256(a); }
  static PERSONA_INLINE void store(std::int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static PERSONA_INLINE I max(I a, I b) { return _mm256_max_epu32(a, b); }

  static PERSONA_INLINE std::uint32_t largest(I a) {
    std::uint32_t lane[width], r = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), a);
    for (int i = 0; i < width; ++i) r = lane[i] > r ? lane[i] : r;
    return r;
  }

  /// How many of `n` (a multiple of 64) values are at least `threshold`.
  static PERSONA_INLINE std::int64_t count_at_least(const std::int32_t* p, std::int64_t n, std::int32_t threshold) {
    // a >= t is a > t - 1; the caller's thresholds lie above the smallest integer. A compare gives -1.
    const __m256i below = _mm256_set1_epi32(threshold - 1);
    __m256i count[4] = {zero(), zero(), zero(), zero()};
    for (std::int64_t i = 0; i < n; i += 4 * width)
      for (int k = 0; k < 4; ++k)
        count[k] = _mm256_sub_epi32(count[k], _mm256_cmpgt_epi32(at(p + i + k * width), below));
    std::int32_t lane[width];
    store(lane, _mm256_add_epi32(_mm256_add_epi32(count[0], count[1]), _mm256_add_epi32(count[2], count[3])));
    std::int64_t total = 0;
    for (int i = 0; i < width; ++i) total += lane[i];
    return total;
  }

  static PERSONA_INLINE std::uint64_t at_least(const std::int32_t* p, std::int32_t threshold) {
    const __m256i below = _mm256_set1_epi32(threshold - 1);
    std::uint64_t mask = 0;
    for (int k = 0; k < 8; ++k) mask |= lanes(_mm256_cmpgt_epi32(at(p + k * width), below)) << (8 * k);
    return mask;
  }

  static PERSONA_INLINE std::uint64_t equal(const std::int32_t* p, std::int32_t value) {
    const __m256i wanted = _mm256_set1_epi32(value);
    std::uint64_t mask = 0;
    for (int k = 0; k < 8; ++k) mask |= lanes(_mm256_cmpeq_epi32(at(p + k * width), wanted)) << (8 * k);
    return mask;
  }

 private:
  static PERSONA_INLINE I at(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

  static PERSONA_INLINE std::uint64_t lanes(I compare) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(compare)));
  }
};

}  // namespace
}  // namespace persona
