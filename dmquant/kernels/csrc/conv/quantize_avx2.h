/* Cells of u8 codes and weights as s8 levels, for the AVX2 kernels. */
#ifndef DMQUANT_CONV_QUANTIZE_AVX2_H
#define DMQUANT_CONV_QUANTIZE_AVX2_H
#include "conv/quantize.h"
#include "conv/epilogue_avx2.h"

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t count, uint8_t *cells, int32_t *sums) {
    Grid grid = grid_of(conv, n);
    int64_t real = min(conv->block, conv->channels - k * conv->block);
    for (int64_t p = 0; p < count; p++, x += conv->channels, cells += conv->block) {
        __m256i sum = _mm256_setzero_si256(), a;
        for (int64_t c = 0; c < conv->block; c += 8) {
            _mm_storel_epi64((__m128i *)(cells + c), quantize_8(&grid, x + c, max(0, real - c), &a));
            sum = _mm256_add_epi32(sum, a);
        }
        if (sums) sums[p] += reduce_add_8(sum);
    }
}

/* Bit planes -> levels: 32 weights are half a mask of each plane, spread to bytes by a shuffle and tested one bit each. */
INLINE __m256i unpack_levels(const uint8_t *masks, const int64_t bits) {
    /* byte i of a half takes byte i / 8 of the mask */
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i place = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i level = _mm256_set1_epi8((char)level_min(bits));
    for (int64_t bit = 0; bit < bits; bit++) {
        int32_t mask;
        memcpy(&mask, masks + 8 * bit, 4);
        __m256i at = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), spread), place);
        __m256i step = _mm256_set1_epi8((char)(level_step(bits) << bit));
        level = _mm256_add_epi8(level, _mm256_and_si256(_mm256_cmpeq_epi8(at, place), step));
    }
    return level;
}
#endif
