/* gemm_u8s8.h by vpdpbusd in registers of 512 bits: 8 rows x 32 outputs at a time. */
#ifndef DMQUANT_ATTENTION_GEMM_AVX512VNNI_H
#define DMQUANT_ATTENTION_GEMM_AVX512VNNI_H
#include "simd/dot_avx512vnni.h"

#define DEPTH_STEP 32
#define ROWS 16

/* One block of outputs. */
static void gemm_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                       const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    for (int row = 0; row < ROWS; row += 8) {
        __m512i acc[8][2];
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) acc[p][0] = _mm512_loadu_si512(start), acc[p][1] = _mm512_loadu_si512(start + 16);
        for (int64_t d = 0; d < depth; d += SPAN) {
            const uint8_t *first = codes + d / SPAN * stride + row * SPAN;
            dot_groups(acc, first, SPAN, levels + OUTPUTS * d, min(SPAN, depth - d) / 4, 8);
        }
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            _mm512_storeu_si512(sums + (row + p) * width, acc[p][0]);
            _mm512_storeu_si512(sums + (row + p) * width + 16, acc[p][1]);
        }
    }
}
#endif
