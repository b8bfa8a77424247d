/* Sixteen floats or whole numbers at a time: by AVX-512, by AVX2 or in plain C, with the same bits.
 *
 * x = floor(x) + fraction(x), and raise(a, x) is a times 2^floor(x) for 1 <= a < 2: nobody relies on what it is for x below -126,
 * but for its being small, or for x above 126, but for its being large. */
#ifndef DMQUANT_SIMD_H
#define DMQUANT_SIMD_H
#include <math.h>
#include <stdint.h>
#include "simd/float_bits.h"
#include "simd/scratch.h"

#define LANES 16

#if defined(__AVX512F__)
#include <immintrin.h>

typedef __m512 Floats;
typedef __m512i Ints;
typedef __m512i Bytes;

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
INLINE Floats times_less(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
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
INLINE Bytes all_bytes(int64_t x) { return _mm512_set1_epi8((char)x); }
INLINE Ints store_codes(uint8_t *out, Floats a, Floats b, Floats c, Floats d, Bytes zero, Bytes limit) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i first = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    __m512i last = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, last));
    codes = _mm512_min_epu8(_mm512_adds_epu8(codes, zero), limit);
    _mm512_storeu_si512(out, codes);
    return _mm512_sad_epu8(codes, _mm512_setzero_si512());
}

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

typedef __m256i Bytes;

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
INLINE Floats times_less(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
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
    x = _mm256_min_ps(_mm256_max_ps(_mm256_floor_ps(x), _mm256_set1_ps(-126)), _mm256_set1_ps(127));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(x), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
INLINE Floats fraction(Floats x) { return subtract(x, (Floats){_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}); }
INLINE Floats raise(Floats a, Floats b) { return PAIR(Floats, raise_eight); }
INLINE Bytes all_bytes(int64_t x) { return _mm256_set1_epi8((char)x); }
INLINE __m256i store_half(uint8_t *out, Floats a, Floats b, Bytes zero, Bytes limit) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    __m256i last = _mm256_packs_epi32(_mm256_cvtps_epi32(b.low), _mm256_cvtps_epi32(b.high));
    __m256i codes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, last), order);
    codes = _mm256_min_epu8(_mm256_adds_epu8(codes, zero), limit);
    _mm256_storeu_si256((__m256i *)out, codes);
    return _mm256_sad_epu8(codes, _mm256_setzero_si256());
}
INLINE Ints store_codes(uint8_t *out, Floats a, Floats b, Floats c, Floats d, Bytes zero, Bytes limit) {
    __m256i low = store_half(out, a, b, zero, limit);
    return (Ints){low, store_half(out + 2 * LANES, c, d, zero, limit)};
}

#else

typedef struct {
    float lane[LANES];
} Floats;

typedef struct {
    int32_t lane[LANES];
} Ints;

typedef int64_t Bytes;

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
INLINE Floats times_less(Floats a, Floats b, Floats c) { EACH(Floats, fmaf(a.lane[l], b.lane[l], -c.lane[l])); }
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
INLINE float within(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE Floats raise(Floats a, Floats x) { EACH(Floats, scale_by_power(a.lane[l], within(floorf(x.lane[l]), -126, 127) + MAGIC)); }
INLINE Bytes all_bytes(int64_t x) { return x; }
INLINE Ints store_codes(uint8_t *out, Floats a, Floats b, Floats c, Floats d, Bytes zero, Bytes limit) {
    const Floats *parts[] = {&a, &b, &c, &d};
    Ints sums = {{0}};
    for (int i = 0; i < 4 * LANES; i++) {
        float rounded = within(parts[i / LANES]->lane[i % LANES], 0, 255) + MAGIC - MAGIC;
        out[i] = (uint8_t)least((int64_t)rounded + zero, limit);
        sums.lane[i % LANES] += out[i];
    }
    return sums;
}
#endif

/* What is below 2^-126 counts as zero: it takes a processor a hundred times as long, and nobody sees it. Until restored. */
#if defined(__AVX2__)
INLINE unsigned drop_tiny(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void restore(unsigned before) { _mm_setcsr(before); }
#else
INLINE unsigned drop_tiny(void) { return 0; }
INLINE void restore(unsigned before) { (void)before; }
#endif

/* store_codes: 64 floats >= 0, rounded, plus `zero` and at most `limit`; returns the codes' sums by lanes. */

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
