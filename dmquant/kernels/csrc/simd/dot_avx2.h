/* Sums of u8 codes times s8 levels in 256 bits: by vpdpbusd, or where there is none by vpmaddubsw and vpmaddwd.
 *
 * For the latter a pair must fit 16 bits: all do but 8-bit codes times 8-bit levels, which are widened before they are
 * multiplied. */
#ifndef DMQUANT_SIMD_DOT_AVX2_H
#define DMQUANT_SIMD_DOT_AVX2_H
#include <immintrin.h>
#include "simd/scratch.h"

enum { DOT_16BIT_SUMS, DOT_16BIT_PAIRS, DOT_WIDENED, DOT_VPDPBUSD };     /* what fits 16 bits: a block, a pair, a code; or vpdpbusd, which asks nothing */

INLINE __m256i dot_u8s8(__m256i acc, __m256i codes, __m256i levels, const int mode) {
    const __m256i ones = _mm256_set1_epi16(1);
#ifdef __AVXVNNI__
    if (mode == DOT_VPDPBUSD) {
        /* inline assembly: as an intrinsic, gcc copies every accumulator before it adds to it */
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(levels));
        return acc;
    }
#endif
    if (mode == DOT_16BIT_SUMS) return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, levels));
    if (mode == DOT_16BIT_PAIRS) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, levels), ones));
    /* even channels, then odd ones: 16 bits each */
    __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes, 8);
    even = _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8));
    odd = _mm256_madd_epi16(odd, _mm256_srai_epi16(levels, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

/* P cells, `step` bytes apart, against 16 of 32 outputs: levels are [group of four][output][4]. */
INLINE void dot_groups(__m256i acc[][2], const uint8_t *cells, int64_t step, const uint8_t *levels, int64_t groups,
                            const int P, const int mode) {
    for (int64_t g = 0; g < groups; g++, levels += 128) {
        __m256i w0 = _mm256_loadu_si256((const __m256i *)levels), w1 = _mm256_loadu_si256((const __m256i *)(levels + 32));
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) {
            int32_t four;
            memcpy(&four, cells + p * step + 4 * g, 4);
            __m256i codes = _mm256_set1_epi32(four);
            acc[p][0] = dot_u8s8(acc[p][0], codes, w0, mode);
            acc[p][1] = dot_u8s8(acc[p][1], codes, w1, mode);
        }
    }
}
#endif
