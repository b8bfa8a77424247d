/* Rounds eight channels at a time to u8 codes. Needs AVX2. */
#ifndef DMQUANT_CONV_ROUND_AVX2_H
#define DMQUANT_CONV_ROUND_AVX2_H
#include <immintrin.h>
#include "conv/params.h"
#include "simd/inline.h"

/* The grid of the activations of one image, in all lanes. */
typedef struct {
    __m256 inverse;                 /* 1 / act_scale */
    __m256 low, high;               /* limits of a: -act_zero and act_max - act_zero */
    __m256i zero;                   /* act_zero */
} ActGrid;

/* All ones in the first `count` of eight int32 lanes; count may be negative or above 8. */
INLINE __m256i mask_8(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE ActGrid grid_of(const ConvParams *conv, int64_t n) {
    float zero = conv->act_zero[n * conv->act_stride];
    ActGrid grid = {
        _mm256_set1_ps(1.0f / conv->act_scale[n * conv->act_stride]), _mm256_set1_ps(-zero),
        _mm256_set1_ps((float)conv->act_max - zero), _mm256_set1_epi32((int)zero),
    };
    return grid;
}

/* Returns the codes of the first `count` of eight channels in the low eight bytes, then zeros; writes their a to *a. Values are
 * clamped before they are rounded: the limits are integers, so the result is the same, and the conversion cannot overflow. */
INLINE __m128i round_8(const ActGrid *grid, const float *x, int64_t count, __m256i *a) {
    __m256i mask = mask_8(count);
    __m256 value = _mm256_mul_ps(count >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, mask), grid->inverse);
    *a = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, grid->low), grid->high));
    *a = _mm256_and_si256(*a, mask);
    __m256i code = _mm256_and_si256(_mm256_add_epi32(*a, grid->zero), mask);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    return _mm_packus_epi16(words, words);
}

INLINE int32_t reduce_add_8(__m256i v) {
    int32_t lane[8], sum = 0;
    _mm256_storeu_si256((__m256i *)lane, v);
    for (int i = 0; i < 8; i++) sum += lane[i];
    return sum;
}
#endif
