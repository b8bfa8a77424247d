/* Sums of u8 codes times s8 levels by vpdpbusd, four at a time. */
#ifndef DMQUANT_SIMD_DOT_AVX512VNNI_H
#define DMQUANT_SIMD_DOT_AVX512VNNI_H
#include <immintrin.h>
#include "simd/scratch.h"

/* inline assembly: as an intrinsic, gcc copies every accumulator before it adds to it */
#define VPDPBUSD(acc, codes, levels) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(levels))

/* P cells, `step` bytes apart, against 32 outputs: levels are [group of four][output][4]. */
INLINE void dot_group(__m512i acc[8][2], const uint8_t *cells, int64_t step, const uint8_t *levels, const int P) {
    __m512i w0 = _mm512_loadu_si512(levels), w1 = _mm512_loadu_si512(levels + 64);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        int32_t four;
        memcpy(&four, cells + p * step, 4);
        __m512i codes = _mm512_set1_epi32(four);
        VPDPBUSD(acc[p][0], codes, w0);
        VPDPBUSD(acc[p][1], codes, w1);
    }
}

/* A multiple of four groups. Told to unroll a loop of unknown length, gcc copies all accumulators where it ends. */
INLINE void dot_groups(__m512i acc[8][2], const uint8_t *cells, int64_t step, const uint8_t *levels, int64_t groups,
                            const int P) {
    for (int64_t g = 0; g < groups; g += 4, cells += 16, levels += 512)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) dot_group(acc, cells + 4 * i, step, levels + 128 * i, P);
}
#endif
