/* What the AVX2 kernels share: quantizing eight channels, and the last step for eight outputs. */
#ifndef DMQUANT_HALF_H
#define DMQUANT_HALF_H
#include <immintrin.h>
#include "rows.h"

/* All ones in the first `count` of eight lanes. */
INLINE __m256i lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The grid of one image. */
typedef struct {
    __m256 inverse, low, high;
    __m256i zero;
} Grid;

INLINE Grid grid_of(const Job *job, int64_t n) {
    float zero = job->act_zero[n * job->act_stride];
    Grid grid = {
        _mm256_set1_ps(1.0f / job->act_scale[n * job->act_stride]), _mm256_set1_ps(-zero),
        _mm256_set1_ps((float)job->act_max - zero), _mm256_set1_epi32((int)zero),
    };
    return grid;
}

/* Eight channels, of which `count` are real -> codes in the low eight bytes, 0 behind the real ones; their a into `a`.
 * Clamped before it is rounded: the limits are whole, so the order does not matter, and no integer overflows. */
INLINE __m128i quantize(const Grid *grid, const float *x, int64_t count, __m256i *a) {
    __m256i mask = lanes(count);
    __m256 value = _mm256_mul_ps(count >= 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, mask), grid->inverse);
    *a = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, grid->low), grid->high));
    *a = _mm256_and_si256(*a, mask);
    __m256i code = _mm256_and_si256(_mm256_add_epi32(*a, grid->zero), mask);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    return _mm_packus_epi16(words, words);
}

INLINE int32_t sum_eight(__m256i v) {
    int32_t lane[8], sum = 0;
    _mm256_storeu_si256((__m256i *)lane, v);
    for (int i = 0; i < 8; i++) sum += lane[i];
    return sum;
}

/* acc: sums of level * a of outputs first..first+8, but for the shift. */
INLINE void put(const Row *row, int64_t first, __m256i acc, int64_t pixel) {
    const Job *job = row->job;
    int64_t rest = job->outputs - first, at = row->plane * job->outputs + first;
    if (rest <= 0) return;
    __m256i mask = lanes(rest);
    if (job->zero) {
        __m256 step = _mm256_set1_ps((float)level_step(job->bits)), lowest = _mm256_set1_ps((float)level_least(job->bits));
        __m256i shift = _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_maskload_ps(job->zero + first, mask), step, lowest));
        acc = _mm256_sub_epi32(acc, _mm256_mullo_epi32(shift, _mm256_set1_epi32(row->box[pixel])));
    }
    __m256 scale = _mm256_maskload_ps(job->scale + at, mask);
    scale = _mm256_mul_ps(scale, _mm256_set1_ps(job->halves ? row->act_scale * 0.5f : row->act_scale));
    float *out = row->out + pixel * job->outputs + first;
    __m256 before = row->plane ? _mm256_maskload_ps(out, mask) : _mm256_setzero_ps();
    if (!row->plane && row->bias) before = _mm256_maskload_ps(row->bias + first, mask);
    __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), scale, before);
    const float *residual = residual_at(job, row->plane, out);
    if (residual) value = _mm256_add_ps(value, _mm256_maskload_ps(residual, mask));
    _mm256_maskstore_ps(out, mask, value);
}

INLINE __m256i totals(const Row *row, int64_t first) {
    int64_t rest = row->job->outputs - first;
    if (rest <= 0) return _mm256_setzero_si256();
    return _mm256_maskload_epi32(row->job->total + row->plane * row->job->outputs + first, lanes(rest));
}
#endif
