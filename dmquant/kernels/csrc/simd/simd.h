/* Sixteen lanes of float32 or int32, by AVX-512, AVX2 or plain C, with the same bits in all three.
 *
 *   load_f32, load_i32, store_f32, store_i32    16 lanes, from and to memory of any alignment
 *   store_u8(out, a)                            the lowest byte of each lane, 16 bytes
 *   set1_f32, set1_i32, set1_u8                 one value in all lanes; set1_u8 as store_codes reads it
 *   add_, sub_, mul_, min_, max_                by lanes; of a NaN and a number, min_f32 and max_f32 return the second operand
 *   fmadd_f32, fmsub_f32                        a * b + c and a * b - c, rounded once
 *   first_lanes(a, count)                       lanes from `count` on become 0
 *   i32_to_f32, f32_as_i32                      conversion; the same bits read as int32
 *   fract_f32(x)                                x - floor(x)
 *   scalef(a, x)                                a * 2^floor(x), for 1 <= a < 2. Variants differ where floor(x) is below -126
 *                                               (the result is below 2^-125) or above 127 (it is at least 2^127)
 *   store_codes(out, a, b, c, d, zero, limit)   64 floats, 0 <= x < 2^31, rounded to integers (ties to even), plus `zero`, at
 *                                               most `limit`, as bytes. Returns partial sums of these bytes as int32: only their
 *                                               total is the same in all variants
 *   reduce_add, reduce_max                      over all lanes: 16 to 8 to 4 to 2 to 1, halves onto each other */
#ifndef DMQUANT_SIMD_H
#define DMQUANT_SIMD_H

#define LANES 16

#if defined(__AVX512F__)
#include "simd/simd_avx512.h"
#elif defined(__AVX2__)
#include "simd/simd_avx2.h"
#else
#include "simd/simd_portable.h"
#endif

#if defined(__AVX2__)
#define REDUCE(of_8, of_4) \
    __m256 eight = of_8(LOW(a), HIGH(a)); \
    __m128 four = of_4(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    __m128 two = of_4(four, _mm_movehl_ps(four, four)); \
    return _mm_cvtss_f32(of_4(two, _mm_shuffle_ps(two, two, 1)))

INLINE float reduce_add(F32x16 a) { REDUCE(_mm256_add_ps, _mm_add_ps); }
INLINE float reduce_max(F32x16 a) { REDUCE(_mm256_max_ps, _mm_max_ps); }

/* Floats below 2^-126 (denormals) are read and written as 0 until restored: arithmetic on them takes about a hundred times as
 * long. Returns the setting to restore. */
INLINE unsigned flush_denormals(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);    /* flush to zero, denormals are zero */
    return before;
}
INLINE void restore_denormals(unsigned before) { _mm_setcsr(before); }
#else
#define REDUCE(combined) \
    for (int width = LANES / 2; width; width /= 2) \
        for (int l = 0; l < width; l++) a.lane[l] = combined; \
    return a.lane[0]

INLINE float reduce_add(F32x16 a) { REDUCE(a.lane[l] + a.lane[l + width]); }
INLINE float reduce_max(F32x16 a) { REDUCE(a.lane[l] > a.lane[l + width] ? a.lane[l] : a.lane[l + width]); }

INLINE unsigned flush_denormals(void) { return 0; }
INLINE void restore_denormals(unsigned before) { (void)before; }
#endif
#endif
