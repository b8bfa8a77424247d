/* What the AVX2 kernels share: quantizing eight channels, and the last step for eight outputs, as in epilogue_avx512.h. */
#ifndef DMQUANT_CONV_EPILOGUE_AVX2_H
#define DMQUANT_CONV_EPILOGUE_AVX2_H
#include <immintrin.h>
#include "conv/driver.h"

/* All ones in the first `count` of eight lanes. */
INLINE __m256i mask_8(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The grid of one image. */
typedef struct {
    __m256 inverse, low, high;
    __m256i zero;
} Grid;

INLINE Grid grid_of(const ConvParams *conv, int64_t n) {
    float zero = conv->act_zero[n * conv->act_stride];
    Grid grid = {
        _mm256_set1_ps(1.0f / conv->act_scale[n * conv->act_stride]), _mm256_set1_ps(-zero),
        _mm256_set1_ps((float)conv->act_max - zero), _mm256_set1_epi32((int)zero),
    };
    return grid;
}

/* Eight channels, of which `count` are real -> codes in the low eight bytes, 0 behind the real ones; their a into `a`.
 * Clamped before it is rounded: the limits are whole, so the order does not matter, and no integer overflows. */
INLINE __m128i quantize_8(const Grid *grid, const float *x, int64_t count, __m256i *a) {
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

typedef struct {
    __m256i mask;
    __m256 scale, bias;
    __m256i excess, shift;          /* what codes add too much: zero point times total; what each a adds too much */
    int is_shifted, is_added;       /* to what an earlier plane wrote */
    const float *residual, *out;    /* of the whole image; no residual, or not yet: NULL */
} Epilogue;

INLINE Epilogue load_epilogue(const ConvParams *conv, int64_t plane, int64_t first, float act_scale, float act_zero, const float *bias) {
    Epilogue o = {.is_shifted = conv->zero != NULL, .is_added = plane > 0, .out = conv->out};
    int64_t at = plane * conv->outputs + first;
    o.residual = plane == conv->planes - 1 ? conv->residual : NULL;
    o.mask = mask_8(conv->outputs - first);
    o.scale = _mm256_maskload_ps(conv->scale + at, o.mask);
    o.scale = _mm256_mul_ps(o.scale, _mm256_set1_ps(conv->half_scale ? act_scale * 0.5f : act_scale));
    o.bias = bias ? _mm256_maskload_ps(bias + first, o.mask) : _mm256_setzero_ps();
    o.excess = _mm256_maskload_epi32(conv->weight_sums + at, o.mask);
    o.excess = _mm256_mullo_epi32(o.excess, _mm256_set1_epi32((int)act_zero));
    o.shift = _mm256_setzero_si256();
    if (conv->zero) {
        __m256 zero = _mm256_maskload_ps(conv->zero + first, o.mask), step = _mm256_set1_ps((float)level_step(conv->bits));
        o.shift = _mm256_cvtps_epi32(_mm256_fmadd_ps(zero, step, _mm256_set1_ps((float)level_min(conv->bits))));
    }
    return o;
}

INLINE void store_outputs(const Epilogue *o, __m256i acc, const int32_t *window_sums, float *out) {
    if (o->is_shifted) acc = _mm256_sub_epi32(acc, _mm256_mullo_epi32(o->shift, _mm256_set1_epi32(*window_sums)));
    __m256 before = o->is_added ? _mm256_maskload_ps(out, o->mask) : o->bias;
    __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), o->scale, before);
    if (o->residual) value = _mm256_add_ps(value, _mm256_maskload_ps(o->residual + (out - o->out), o->mask));
    _mm256_maskstore_ps(out, o->mask, value);
}
#endif
