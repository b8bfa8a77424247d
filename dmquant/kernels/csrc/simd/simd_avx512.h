/* simd.h in registers of 512 bits. Needs AVX-512 F, BW, VL and DQ. */
#ifndef DMQUANT_SIMD_AVX512_H
#define DMQUANT_SIMD_AVX512_H
#include <immintrin.h>
#include "simd/inline.h"

typedef __m512 F32x16;
typedef __m512i I32x16;
typedef __m512i U8Vec;              /* 64 bytes */

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
#endif
