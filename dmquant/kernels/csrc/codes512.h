/* Cells of u8 codes and weights as s8 levels, for the AVX-512 kernels. */
#ifndef DMQUANT_CODES512_H
#define DMQUANT_CODES512_H
#define CELL 1
#define ALWAYS_SUMS(job) 0
#include <immintrin.h>
#include "band.h"

static void fill(const Job *job, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = least(job->block, job->channels - k * job->block);
    /* channels that only fill a block are zero codes: their weights are not */
    for (int64_t p = 0; p < count; p++, cells += job->block) {
        memset(cells, (int)zero, real);
        memset(cells + real, 0, job->block - real);
    }
}

static void build(const Job *job, int64_t n, int64_t k, const float *x, int64_t count, uint8_t *cells, int32_t *sums) {
    float act_zero = job->act_zero[n * job->act_stride];
    __m512 inverse = _mm512_set1_ps(1.0f / job->act_scale[n * job->act_stride]);
    /* clamped before it is rounded: the limits are whole, so the order does not matter, and no integer overflows */
    __m512 low = _mm512_set1_ps(-act_zero), high = _mm512_set1_ps((float)job->act_max - act_zero);
    __m512i zero = _mm512_set1_epi32((int)act_zero);
    int64_t real = least(job->block, job->channels - k * job->block);
    for (int64_t p = 0; p < count; p++, x += job->channels, cells += job->block) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t c = 0; c < job->block; c += 16) {
            __mmask16 mask = c + 16 <= real ? 0xffff : c >= real ? 0 : (__mmask16)((1u << (real - c)) - 1);
            __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), inverse);
            __m512i a = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, low), high));
            __m512i code = _mm512_maskz_add_epi32(mask, a, zero);
            _mm_storeu_si128((__m128i *)(cells + c), _mm512_cvtepi32_epi8(code));
            if (sums) sum = _mm512_mask_add_epi32(sum, mask, sum, a);
        }
        if (sums) sums[p] += _mm512_reduce_add_epi32(sum);
    }
}

/* Bit planes -> levels: 64 weights are `bits` masks of 64 bits. */
INLINE __m512i levels_of(const uint8_t *masks, const int64_t bits) {
    __m512i level = _mm512_set1_epi8((char)level_least(bits));
    for (int64_t bit = 0; bit < bits; bit++) {
        uint64_t mask;
        memcpy(&mask, masks + 8 * bit, 8);
        if (bits == 1) return _mm512_mask_mov_epi8(level, mask, _mm512_set1_epi8(1));
        level = _mm512_mask_add_epi8(level, mask, level, _mm512_set1_epi8((char)(level_step(bits) << bit)));
    }
    return level;
}
#endif
