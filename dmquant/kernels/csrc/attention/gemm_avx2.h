/* gemm_u8s8.h in registers of 256 bits: 4 rows x 16 outputs at a time. */
#ifndef DMQUANT_ATTENTION_GEMM_AVX2_H
#define DMQUANT_ATTENTION_GEMM_AVX2_H
#include "simd/dot_avx2.h"

#define DEPTH_STEP 32
#define ROWS 16

/* One block of outputs. mode: see dot_avx2.h. */
INLINE void gemm_block_in_mode(const int mode, const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth,
                               const int32_t *start, int32_t *sums, int64_t width) {
    for (int row = 0; row < ROWS; row += 4)
        for (int half = 0; half < 2; half++) {
            __m256i acc[4][2];
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++)
                for (int v = 0; v < 2; v++) acc[p][v] = _mm256_loadu_si256((const __m256i *)(start + 16 * half + 8 * v));
            for (int64_t d = 0; d < depth; d += SPAN) {
                const uint8_t *first = codes + d / SPAN * stride + row * SPAN;
                dot_groups(acc, first, SPAN, levels + OUTPUTS * d + 64 * half, min(SPAN, depth - d) / 4, 4, mode);
            }
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                int32_t *first = sums + (row + p) * width + 16 * half;
                _mm256_storeu_si256((__m256i *)first, acc[p][0]);
                _mm256_storeu_si256((__m256i *)(first + 8), acc[p][1]);
            }
        }
}

static void gemm_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                       const int32_t *start, int32_t *sums, int64_t width) {
#ifdef __AVXVNNI__
    (void)max_code;
    gemm_block_in_mode(DOT_VPDPBUSD, codes, stride, levels, depth, start, sums, width);
#else
    if (2 * max_code * 127 <= 32767) gemm_block_in_mode(DOT_16BIT_PAIRS, codes, stride, levels, depth, start, sums, width);
    else gemm_block_in_mode(DOT_WIDENED, codes, stride, levels, depth, start, sums, width);
#endif
}
#endif
