/* Sixteen floats or whole numbers at a time: by AVX-512, by AVX2 or in plain C, with the same bits.
 *
 * x = floor(x) + fraction(x), and raise(a, x) is a times 2^floor(x) for |x| < 100. */
#ifndef DMQUANT_LANES_H
#define DMQUANT_LANES_H
#include <math.h>
#include <stdint.h>
#include "memory.h"
#include "normal.h"

#define LANES 16

#if defined(__AVX512F__)
#include <immintrin.h>

typedef __m512 Floats;
typedef __m512i Ints;

INLINE Floats load(const float *x) { return _mm512_loadu_ps(x); }
INLINE Ints load_ints(const int32_t *x) { return _mm512_loadu_si512(x); }
INLINE void store(float *out, Floats a) { _mm512_storeu_ps(out, a); }
INLINE void store_ints(int32_t *out, Ints a) { _mm512_storeu_si512(out, a); }
INLINE void store_bytes(uint8_t *out, Ints a) { _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(a)); }
INLINE Floats all(float x) { return _mm512_set1_ps(x); }
INLINE Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats first_of(Floats a, int64_t count) { return _mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), a); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Ints subtract_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
INLINE Ints larger_ints(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Ints bits_of(Floats a) { return _mm512_castps_si512(a); }
INLINE Floats fraction(Floats x) { return _mm512_reduce_ps(x, 1); }
INLINE Floats raise(Floats a, Floats x) { return _mm512_scalef_ps(a, x); }

#define LOW(a) _mm512_castps512_ps256(a)
#define HIGH(a) _mm512_extractf32x8_ps(a, 1)

#elif defined(__AVX2__)
#include <immintrin.h>

typedef struct {
    __m256 low, high;
} Floats;

typedef struct {
    __m256i low, high;
} Ints;

#define LOW(a) (a).low
#define HIGH(a) (a).high
#define PAIR(kind, f) (kind){f(a.low, b.low), f(a.high, b.high)}

INLINE __m256i load_eight(const int32_t *x) { return _mm256_loadu_si256((const __m256i *)x); }
INLINE Floats load(const float *x) { return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE Ints load_ints(const int32_t *x) { return (Ints){load_eight(x), load_eight(x + 8)}; }
INLINE void store(float *out, Floats a) { _mm256_storeu_ps(out, a.low), _mm256_storeu_ps(out + 8, a.high); }
INLINE void store_ints(int32_t *out, Ints a) { memcpy(out, &a.low, 32), memcpy(out + 8, &a.high, 32); }
INLINE void store_bytes(uint8_t *out, Ints a) {
    const __m256i byte = _mm256_set1_epi32(255);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.low, byte), _mm256_and_si256(a.high, byte));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE Floats all(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Ints all_ints(int32_t x) { return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Floats add(Floats a, Floats b) { return PAIR(Floats, _mm256_add_ps); }
INLINE Floats subtract(Floats a, Floats b) { return PAIR(Floats, _mm256_sub_ps); }
INLINE Floats times(Floats a, Floats b) { return PAIR(Floats, _mm256_mul_ps); }
INLINE Floats times_plus(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats smaller(Floats a, Floats b) { return PAIR(Floats, _mm256_min_ps); }
INLINE Floats larger(Floats a, Floats b) { return PAIR(Floats, _mm256_max_ps); }
INLINE Floats first_of(Floats a, int64_t count) {
    float some[LANES] = {0};
    memcpy(some, &a, 4 * count);
    return load(some);
}
INLINE Ints add_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_add_epi32); }
INLINE Ints subtract_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_sub_epi32); }
INLINE Ints larger_ints(Ints a, Ints b) { return PAIR(Ints, _mm256_max_epi32); }
INLINE Floats to_floats(Ints a) { return (Floats){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE Ints bits_of(Floats a) { return (Ints){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
INLINE __m256 raise_eight(__m256 a, __m256 x) {
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
INLINE Floats fraction(Floats x) { return subtract(x, (Floats){_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}); }
INLINE Floats raise(Floats a, Floats b) { return PAIR(Floats, raise_eight); }

#else

typedef struct {
    float lane[LANES];
} Floats;

typedef struct {
    int32_t lane[LANES];
} Ints;

#define PLUS(a, b) (a) + (b)
#define MOST(a, b) (a) > (b) ? (a) : (b)
#define EACH(kind, expression) \
    kind out; \
    for (int l = 0; l < LANES; l++) out.lane[l] = expression; \
    return out

INLINE Floats load(const float *x) { EACH(Floats, x[l]); }
INLINE Ints load_ints(const int32_t *x) { EACH(Ints, x[l]); }
INLINE void store(float *out, Floats a) { memcpy(out, a.lane, sizeof a); }
INLINE void store_ints(int32_t *out, Ints a) { memcpy(out, a.lane, sizeof a); }
INLINE void store_bytes(uint8_t *out, Ints a) {
    for (int l = 0; l < LANES; l++) out[l] = (uint8_t)a.lane[l];
}
INLINE Floats all(float x) { EACH(Floats, x); }
INLINE Ints all_ints(int32_t x) { EACH(Ints, x); }
INLINE Floats add(Floats a, Floats b) { EACH(Floats, a.lane[l] + b.lane[l]); }
INLINE Floats subtract(Floats a, Floats b) { EACH(Floats, a.lane[l] - b.lane[l]); }
INLINE Floats times(Floats a, Floats b) { EACH(Floats, a.lane[l] * b.lane[l]); }
INLINE Floats times_plus(Floats a, Floats b, Floats c) { EACH(Floats, fmaf(a.lane[l], b.lane[l], c.lane[l])); }
INLINE Floats smaller(Floats a, Floats b) { EACH(Floats, a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE Floats larger(Floats a, Floats b) { EACH(Floats, a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE Floats first_of(Floats a, int64_t count) { EACH(Floats, l < count ? a.lane[l] : 0.0f); }
/* what overflows wraps round */
INLINE Ints add_ints(Ints a, Ints b) { EACH(Ints, (int32_t)((uint32_t)a.lane[l] + (uint32_t)b.lane[l])); }
INLINE Ints subtract_ints(Ints a, Ints b) { EACH(Ints, (int32_t)((uint32_t)a.lane[l] - (uint32_t)b.lane[l])); }
INLINE Ints larger_ints(Ints a, Ints b) { EACH(Ints, a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE Floats to_floats(Ints a) { EACH(Floats, (float)a.lane[l]); }
INLINE Ints bits_of(Floats a) {
    Ints out;
    memcpy(&out, &a, sizeof out);
    return out;
}
INLINE Floats fraction(Floats x) { EACH(Floats, x.lane[l] - floorf(x.lane[l])); }
INLINE Floats raise(Floats a, Floats x) { EACH(Floats, scale_by_power(a.lane[l], floorf(x.lane[l]) + MAGIC)); }
#endif

/* Halves onto each other, always in the same order. */
#if defined(__AVX2__)
#define FOLD(combine, of_eight, of_four, a) \
    __m256 eight = of_eight(LOW(a), HIGH(a)); \
    __m128 four = of_four(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    __m128 two = of_four(four, _mm_movehl_ps(four, four)); \
    return _mm_cvtss_f32(of_four(two, _mm_shuffle_ps(two, two, 1)))
#else
#define FOLD(combine, of_eight, of_four, a) \
    for (int width = LANES / 2; width; width /= 2) \
        for (int l = 0; l < width; l++) a.lane[l] = combine(a.lane[l], a.lane[l + width]); \
    return a.lane[0]
#endif

INLINE float sum_lanes(Floats a) { FOLD(PLUS, _mm256_add_ps, _mm_add_ps, a); }
INLINE float largest_lane(Floats a) { FOLD(MOST, _mm256_max_ps, _mm_max_ps, a); }
#endif
