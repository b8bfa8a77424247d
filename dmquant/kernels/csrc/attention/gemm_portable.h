/* gemm_u8s8.h in plain C: one row x 32 outputs at a time. */
#ifndef DMQUANT_ATTENTION_GEMM_PORTABLE_H
#define DMQUANT_ATTENTION_GEMM_PORTABLE_H
#include <string.h>
#include "simd/inline.h"

#define DEPTH_STEP 32
#define ROWS 16

/* One block of outputs. */
static void gemm_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                       const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    for (int row = 0; row < ROWS; row++, codes += SPAN, sums += width) {
        int32_t acc[OUTPUTS];
        memcpy(acc, start, sizeof acc);
        for (int64_t d = 0; d < depth; d++) {
            int32_t code = codes[d / SPAN * stride + d % SPAN];
            for (int o = 0; o < OUTPUTS; o++) acc[o] += code * (int8_t)levels[OUTPUTS * (d & -4) + 4 * o + (d & 3)];
        }
        memcpy(sums, acc, sizeof acc);
    }
}
#endif
