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

typedef __m512 F32x16;
typedef __m512i I32x16;
typedef __m512i U8Vec;

INLINE F32x16 load_f32(const float *x) { return _mm512_loadu_ps(x); }
INLINE I32x16 load_i32(const int32_t *x) { return _mm512_loadu_si512(x); }
INLINE void store_f32(float *out, F32x16 a) { _mm512_storeu_ps(out, a); }
INLINE void store_i32(int32_t *out, I32x16 a) { _mm512_storeu_si512(out, a); }
INLINE void store_u8(uint8_t *out, I32x16 a) { _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(a)); }
INLINE F32x16 set1_f32(float x) { return _mm512_set1_ps(x); }
INLINE I32x16 set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
INLINE F32x16 add_f32(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
INLINE F32x16 sub_f32(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
INLINE F32x16 fmadd_f32(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F32x16 fmsub_f32(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmsub_ps(a, b, c); }
INLINE F32x16 min_f32(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
INLINE F32x16 max_f32(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
INLINE F32x16 first_lanes(F32x16 a, int64_t count) { return _mm512_maskz_mov_ps((__mmask16)((1u << count) - 1), a); }
INLINE I32x16 add_i32(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
INLINE I32x16 sub_i32(I32x16 a, I32x16 b) { return _mm512_sub_epi32(a, b); }
INLINE I32x16 max_i32(I32x16 a, I32x16 b) { return _mm512_max_epi32(a, b); }
INLINE F32x16 i32_to_f32(I32x16 a) { return _mm512_cvtepi32_ps(a); }
INLINE I32x16 f32_as_i32(F32x16 a) { return _mm512_castps_si512(a); }
INLINE F32x16 fract_f32(F32x16 x) { return _mm512_reduce_ps(x, 1); }
INLINE F32x16 scalef(F32x16 a, F32x16 x) { return _mm512_scalef_ps(a, x); }
INLINE U8Vec set1_u8(int64_t x) { return _mm512_set1_epi8((char)x); }
INLINE I32x16 store_codes(uint8_t *out, F32x16 a, F32x16 b, F32x16 c, F32x16 d, U8Vec zero, U8Vec limit) {
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
} F32x16;

typedef struct {
    __m256i low, high;
} I32x16;

#define LOW(a) (a).low
#define HIGH(a) (a).high
#define PAIR(kind, f) (kind){f(a.low, b.low), f(a.high, b.high)}

typedef __m256i U8Vec;

INLINE __m256i load_8(const int32_t *x) { return _mm256_loadu_si256((const __m256i *)x); }
INLINE F32x16 load_f32(const float *x) { return (F32x16){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE I32x16 load_i32(const int32_t *x) { return (I32x16){load_8(x), load_8(x + 8)}; }
INLINE void store_f32(float *out, F32x16 a) { _mm256_storeu_ps(out, a.low), _mm256_storeu_ps(out + 8, a.high); }
INLINE void store_i32(int32_t *out, I32x16 a) { memcpy(out, &a.low, 32), memcpy(out + 8, &a.high, 32); }
INLINE void store_u8(uint8_t *out, I32x16 a) {
    const __m256i byte = _mm256_set1_epi32(255);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.low, byte), _mm256_and_si256(a.high, byte));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)out, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
INLINE F32x16 set1_f32(float x) { return (F32x16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE I32x16 set1_i32(int32_t x) { return (I32x16){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE F32x16 add_f32(F32x16 a, F32x16 b) { return PAIR(F32x16, _mm256_add_ps); }
INLINE F32x16 sub_f32(F32x16 a, F32x16 b) { return PAIR(F32x16, _mm256_sub_ps); }
INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { return PAIR(F32x16, _mm256_mul_ps); }
INLINE F32x16 fmadd_f32(F32x16 a, F32x16 b, F32x16 c) {
    return (F32x16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE F32x16 fmsub_f32(F32x16 a, F32x16 b, F32x16 c) {
    return (F32x16){_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
INLINE F32x16 min_f32(F32x16 a, F32x16 b) { return PAIR(F32x16, _mm256_min_ps); }
INLINE F32x16 max_f32(F32x16 a, F32x16 b) { return PAIR(F32x16, _mm256_max_ps); }
INLINE F32x16 first_lanes(F32x16 a, int64_t count) {
    float some[LANES] = {0};
    memcpy(some, &a, 4 * count);
    return load_f32(some);
}
INLINE I32x16 add_i32(I32x16 a, I32x16 b) { return PAIR(I32x16, _mm256_add_epi32); }
INLINE I32x16 sub_i32(I32x16 a, I32x16 b) { return PAIR(I32x16, _mm256_sub_epi32); }
INLINE I32x16 max_i32(I32x16 a, I32x16 b) { return PAIR(I32x16, _mm256_max_epi32); }
INLINE F32x16 i32_to_f32(I32x16 a) { return (F32x16){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE I32x16 f32_as_i32(F32x16 a) { return (I32x16){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
INLINE __m256 scalef_8(__m256 a, __m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(_mm256_floor_ps(x), _mm256_set1_ps(-126)), _mm256_set1_ps(127));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(x), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
INLINE F32x16 fract_f32(F32x16 x) { return sub_f32(x, (F32x16){_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}); }
INLINE F32x16 scalef(F32x16 a, F32x16 b) { return PAIR(F32x16, scalef_8); }
INLINE U8Vec set1_u8(int64_t x) { return _mm256_set1_epi8((char)x); }
INLINE __m256i store_32_codes(uint8_t *out, F32x16 a, F32x16 b, U8Vec zero, U8Vec limit) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high));
    __m256i last = _mm256_packs_epi32(_mm256_cvtps_epi32(b.low), _mm256_cvtps_epi32(b.high));
    __m256i codes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, last), order);
    codes = _mm256_min_epu8(_mm256_adds_epu8(codes, zero), limit);
    _mm256_storeu_si256((__m256i *)out, codes);
    return _mm256_sad_epu8(codes, _mm256_setzero_si256());
}
INLINE I32x16 store_codes(uint8_t *out, F32x16 a, F32x16 b, F32x16 c, F32x16 d, U8Vec zero, U8Vec limit) {
    __m256i low = store_32_codes(out, a, b, zero, limit);
    return (I32x16){low, store_32_codes(out + 2 * LANES, c, d, zero, limit)};
}

#else

typedef struct {
    float lane[LANES];
} F32x16;

typedef struct {
    int32_t lane[LANES];
} I32x16;

typedef int64_t U8Vec;

#define PLUS(a, b) (a) + (b)
#define MOST(a, b) (a) > (b) ? (a) : (b)
#define EACH(kind, expression) \
    kind out; \
    for (int l = 0; l < LANES; l++) out.lane[l] = expression; \
    return out

INLINE F32x16 load_f32(const float *x) { EACH(F32x16, x[l]); }
INLINE I32x16 load_i32(const int32_t *x) { EACH(I32x16, x[l]); }
INLINE void store_f32(float *out, F32x16 a) { memcpy(out, a.lane, sizeof a); }
INLINE void store_i32(int32_t *out, I32x16 a) { memcpy(out, a.lane, sizeof a); }
INLINE void store_u8(uint8_t *out, I32x16 a) {
    for (int l = 0; l < LANES; l++) out[l] = (uint8_t)a.lane[l];
}
INLINE F32x16 set1_f32(float x) { EACH(F32x16, x); }
INLINE I32x16 set1_i32(int32_t x) { EACH(I32x16, x); }
INLINE F32x16 add_f32(F32x16 a, F32x16 b) { EACH(F32x16, a.lane[l] + b.lane[l]); }
INLINE F32x16 sub_f32(F32x16 a, F32x16 b) { EACH(F32x16, a.lane[l] - b.lane[l]); }
INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { EACH(F32x16, a.lane[l] * b.lane[l]); }
INLINE F32x16 fmadd_f32(F32x16 a, F32x16 b, F32x16 c) { EACH(F32x16, fmaf(a.lane[l], b.lane[l], c.lane[l])); }
INLINE F32x16 fmsub_f32(F32x16 a, F32x16 b, F32x16 c) { EACH(F32x16, fmaf(a.lane[l], b.lane[l], -c.lane[l])); }
INLINE F32x16 min_f32(F32x16 a, F32x16 b) { EACH(F32x16, a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE F32x16 max_f32(F32x16 a, F32x16 b) { EACH(F32x16, a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE F32x16 first_lanes(F32x16 a, int64_t count) { EACH(F32x16, l < count ? a.lane[l] : 0.0f); }
/* what overflows wraps round */
INLINE I32x16 add_i32(I32x16 a, I32x16 b) { EACH(I32x16, (int32_t)((uint32_t)a.lane[l] + (uint32_t)b.lane[l])); }
INLINE I32x16 sub_i32(I32x16 a, I32x16 b) { EACH(I32x16, (int32_t)((uint32_t)a.lane[l] - (uint32_t)b.lane[l])); }
INLINE I32x16 max_i32(I32x16 a, I32x16 b) { EACH(I32x16, a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE F32x16 i32_to_f32(I32x16 a) { EACH(F32x16, (float)a.lane[l]); }
INLINE I32x16 f32_as_i32(F32x16 a) {
    I32x16 out;
    memcpy(&out, &a, sizeof out);
    return out;
}
INLINE F32x16 fract_f32(F32x16 x) { EACH(F32x16, x.lane[l] - floorf(x.lane[l])); }
INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE F32x16 scalef(F32x16 a, F32x16 x) { EACH(F32x16, scale_by_power(a.lane[l], clamp(floorf(x.lane[l]), -126, 127) + MAGIC)); }
INLINE U8Vec set1_u8(int64_t x) { return x; }
INLINE I32x16 store_codes(uint8_t *out, F32x16 a, F32x16 b, F32x16 c, F32x16 d, U8Vec zero, U8Vec limit) {
    const F32x16 *parts[] = {&a, &b, &c, &d};
    I32x16 sums = {{0}};
    for (int i = 0; i < 4 * LANES; i++) {
        float rounded = clamp(parts[i / LANES]->lane[i % LANES], 0, 255) + MAGIC - MAGIC;
        out[i] = (uint8_t)min((int64_t)rounded + zero, limit);
        sums.lane[i % LANES] += out[i];
    }
    return sums;
}
#endif

/* What is below 2^-126 counts as zero: it takes a processor a hundred times as long, and nobody sees it. Until restored. */
#if defined(__AVX2__)
INLINE unsigned flush_denormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
}
INLINE void restore_denormals(unsigned before) { _mm_setcsr(before); }
#else
INLINE unsigned flush_denormals(void) { return 0; }
INLINE void restore_denormals(unsigned before) { (void)before; }
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

INLINE float reduce_add(F32x16 a) { FOLD(PLUS, _mm256_add_ps, _mm_add_ps, a); }
INLINE float reduce_max(F32x16 a) { FOLD(MOST, _mm256_max_ps, _mm_max_ps, a); }
#endif
