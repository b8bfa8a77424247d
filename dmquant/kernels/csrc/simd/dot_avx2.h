/* Dot products of u8 codes and s8 levels in registers of 256 bits: by vpdpbusd (AVX-VNNI), or by vpmaddubsw and vpmaddwd. */
#ifndef DMQUANT_SIMD_DOT_AVX2_H
#define DMQUANT_SIMD_DOT_AVX2_H
#include <immintrin.h>
#include <string.h>
#include "simd/inline.h"

/* How products are added up, by what fits int16 (vpmaddubsw saturates). The caller chooses by the largest |code * level|. */
enum {
    DOT_16BIT_SUMS,         /* all products of a channel block, in pairs of channels: acc holds int16, the caller widens it */
    DOT_16BIT_PAIRS,        /* the sum of two products: acc holds int32, as below */
    DOT_WIDENED,            /* no sum of two: codes and levels are widened to int16 before they are multiplied */
    DOT_VPDPBUSD,           /* no limit; for AVX-VNNI only */
};

/* Adds the products of 32 codes and 32 levels to acc: four neighbours to each int32 (two to each int16 for DOT_16BIT_SUMS). */
INLINE __m256i dot_u8s8(__m256i acc, __m256i codes, __m256i levels, const int mode) {
    const __m256i ones = _mm256_set1_epi16(1);
#ifdef __AVXVNNI__
    if (mode == DOT_VPDPBUSD) {
        /* inline assembly: for the intrinsic, gcc copies every accumulator before it adds to it */
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "x"(levels));
        return acc;
    }
#endif
    if (mode == DOT_16BIT_SUMS) return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, levels));
    if (mode == DOT_16BIT_PAIRS) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, levels), ones));
    /* even channels, then odd ones, as int16; levels are sign-extended */
    __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes, 8);
    even = _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8));
    odd = _mm256_madd_epi16(odd, _mm256_srai_epi16(levels, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}

/* Adds `groups` groups of four channels to the sums of P pixels and 16 outputs. codes: of the first pixel, those of the next are
 * `stride` bytes away. levels: [group][32 outputs][4 channels], from the first of the 16 outputs on. acc[p]: sums of outputs 0-7
 * and 8-15. */
INLINE void dot_groups(__m256i acc[][2], const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t groups,
                       const int P, const int mode) {
    for (int64_t g = 0; g < groups; g++, levels += 128) {
        __m256i w0 = _mm256_loadu_si256((const __m256i *)levels), w1 = _mm256_loadu_si256((const __m256i *)(levels + 32));
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) {
            int32_t four;
            memcpy(&four, codes + p * stride + 4 * g, 4);
            __m256i broadcast = _mm256_set1_epi32(four);
            acc[p][0] = dot_u8s8(acc[p][0], broadcast, w0, mode);
            acc[p][1] = dot_u8s8(acc[p][1], broadcast, w1, mode);
        }
    }
}
#endif
