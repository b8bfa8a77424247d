/* Dot products of u8 codes and s8 levels by vpdpbusd: four products are added to each int32 accumulator, without saturation. */
#ifndef DMQUANT_SIMD_DOT_AVX512VNNI_H
#define DMQUANT_SIMD_DOT_AVX512VNNI_H
#include <immintrin.h>
#include <string.h>
#include "simd/inline.h"

/* inline assembly: for the intrinsic, gcc copies every accumulator before it adds to it */
#define VPDPBUSD(acc, codes, levels) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(levels))

/* Adds the products of four channels to the sums of P pixels and 32 outputs. codes: of the first pixel, those of the next are
 * `stride` bytes away. levels: [output][4 channels], 128 bytes. acc[p]: sums of outputs 0-15 and 16-31. */
INLINE void dot_group(__m512i acc[8][2], const uint8_t *codes, int64_t stride, const uint8_t *levels, const int P) {
    __m512i w0 = _mm512_loadu_si512(levels), w1 = _mm512_loadu_si512(levels + 64);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        int32_t four;
        memcpy(&four, codes + p * stride, 4);
        __m512i broadcast = _mm512_set1_epi32(four);
        VPDPBUSD(acc[p][0], broadcast, w0);
        VPDPBUSD(acc[p][1], broadcast, w1);
    }
}

/* The same for `groups` groups of four channels, a multiple of four. levels: [group][output][4 channels]. The inner loop has a
 * fixed length: where gcc unrolls one of unknown length, it copies all accumulators behind it. */
INLINE void dot_groups(__m512i acc[8][2], const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t groups,
                       const int P) {
    for (int64_t g = 0; g < groups; g += 4, codes += 16, levels += 512)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) dot_group(acc, codes + 4 * i, stride, levels + 128 * i, P);
}
#endif
