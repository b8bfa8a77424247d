/* Pixels -> cells of u8 codes. Needs AVX2. */
#ifndef DMQUANT_CONV_QUANTIZE_AVX2_H
#define DMQUANT_CONV_QUANTIZE_AVX2_H
#include "conv/quantize.h"
#include "conv/round_avx2.h"

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums) {
    ActGrid grid = grid_of(conv, n);
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    for (int64_t p = 0; p < count; p++, x += stride, cells += conv->channel_block) {
        __m256i sum = _mm256_setzero_si256(), a;
        for (int64_t c = 0; c < conv->channel_block; c += 8) {
            _mm_storel_epi64((__m128i *)(cells + c), round_8(&grid, x + c, max(0, real - c), &a));
            sum = _mm256_add_epi32(sum, a);
        }
        if (sums) sums[p] += reduce_add_8(sum);
    }
}
#endif
