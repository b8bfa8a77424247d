/* simd.h in pairs of registers of 256 bits. Needs AVX2 and FMA. */
#ifndef DMQUANT_SIMD_AVX2_H
#define DMQUANT_SIMD_AVX2_H
#include <immintrin.h>
#include <string.h>
#include "simd/inline.h"

typedef struct {
    __m256 low, high;
} F32x16;

typedef struct {
    __m256i low, high;
} I32x16;

typedef __m256i U8Vec;              /* 32 bytes */

#define LOW(a) (a).low
#define HIGH(a) (a).high
#define BOTH_HALVES(type, f) (type){f(a.low, b.low), f(a.high, b.high)}

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
INLINE F32x16 add_f32(F32x16 a, F32x16 b) { return BOTH_HALVES(F32x16, _mm256_add_ps); }
INLINE F32x16 sub_f32(F32x16 a, F32x16 b) { return BOTH_HALVES(F32x16, _mm256_sub_ps); }
INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { return BOTH_HALVES(F32x16, _mm256_mul_ps); }
INLINE F32x16 fmadd_f32(F32x16 a, F32x16 b, F32x16 c) {
    return (F32x16){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE F32x16 fmsub_f32(F32x16 a, F32x16 b, F32x16 c) {
    return (F32x16){_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
INLINE F32x16 min_f32(F32x16 a, F32x16 b) { return BOTH_HALVES(F32x16, _mm256_min_ps); }
INLINE F32x16 max_f32(F32x16 a, F32x16 b) { return BOTH_HALVES(F32x16, _mm256_max_ps); }
INLINE F32x16 first_lanes(F32x16 a, int64_t count) {
    float kept[LANES] = {0};
    memcpy(kept, &a, 4 * count);
    return load_f32(kept);
}
INLINE I32x16 add_i32(I32x16 a, I32x16 b) { return BOTH_HALVES(I32x16, _mm256_add_epi32); }
INLINE I32x16 max_i32(I32x16 a, I32x16 b) { return BOTH_HALVES(I32x16, _mm256_max_epi32); }
INLINE F32x16 i32_to_f32(I32x16 a) { return (F32x16){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE I32x16 f32_as_i32(F32x16 a) { return (I32x16){_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
/* a * 2^floor(x) of eight lanes, floor(x) clamped to -126..127. */
INLINE __m256 scalef_8(__m256 a, __m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(_mm256_floor_ps(x), _mm256_set1_ps(-126)), _mm256_set1_ps(127));
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(x), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}
INLINE F32x16 fract_f32(F32x16 x) { return sub_f32(x, (F32x16){_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}); }
INLINE F32x16 scalef(F32x16 a, F32x16 b) { return BOTH_HALVES(F32x16, scalef_8); }
INLINE U8Vec set1_u8(int64_t x) { return _mm256_set1_epi8((char)x); }
/* store_codes for 32 floats; the permutation undoes the interleaving of the two packs. */
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
#endif
