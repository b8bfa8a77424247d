/* Pixels -> cells of u8 codes. Needs AVX-512 F and BW. */
#ifndef DMQUANT_CONV_QUANTIZE_AVX512_H
#define DMQUANT_CONV_QUANTIZE_AVX512_H
#include <immintrin.h>
#include "conv/quantize.h"

/* a of 16 channels, those that are not in the mask as if x were 0. Values are clamped before they are rounded: the limits are
 * integers, so the result is the same, and the conversion cannot overflow. */
INLINE __m512i round_16(const float *x, __mmask16 mask, __m512 inverse, __m512 low, __m512 high) {
    __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), inverse);
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
}

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums) {
    /* undoes the interleaving of the two packs, which work within 128 bits */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    float act_zero = conv->act_zero[n * conv->act_stride];
    __m512 inverse = _mm512_set1_ps(1.0f / conv->act_scale[n * conv->act_stride]);
    __m512 low = _mm512_set1_ps(-act_zero), high = _mm512_set1_ps((float)conv->act_max - act_zero);
    __m512i zero = _mm512_set1_epi16((short)act_zero);
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    __mmask64 mask = ~0ULL >> (64 - real), block = ~0ULL >> (64 - conv->channel_block);
    for (int64_t p = 0; p < count; p++, x += stride, cells += conv->channel_block) {
        __m512i a = round_16(x, (__mmask16)mask, inverse, low, high);
        __m512i b = round_16(x + 16, (__mmask16)(mask >> 16), inverse, low, high);
        __m512i c = round_16(x + 32, (__mmask16)(mask >> 32), inverse, low, high);
        __m512i d = round_16(x + 48, (__mmask16)(mask >> 48), inverse, low, high);
        __m512i first = _mm512_add_epi16(_mm512_packs_epi32(a, b), zero);
        __m512i last = _mm512_add_epi16(_mm512_packs_epi32(c, d), zero);
        __m512i codes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, last));
        codes = _mm512_maskz_mov_epi8(mask, codes);
        _mm512_mask_storeu_epi8(cells, block, codes);
        __m512i sum = _mm512_sad_epu8(codes, _mm512_setzero_si512());
        if (sums) sums[p] += (int32_t)(_mm512_reduce_add_epi64(sum) - real * (int64_t)act_zero);
    }
}
#endif
