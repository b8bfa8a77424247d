/* Sums -> outputs, eight at a time. Needs AVX2 and FMA. The same interface as epilogue_avx512.h. */
#ifndef DMQUANT_CONV_EPILOGUE_AVX2_H
#define DMQUANT_CONV_EPILOGUE_AVX2_H
#include "conv/driver.h"
#include "conv/round_avx2.h"

/* For eight outputs of one image. */
typedef struct {
    __m256i mask;                   /* outputs that exist */
    __m256 scale, bias;             /* weight scale * act_scale; 0 without a bias */
    __m256i zero_sums;              /* act_zero * weight_sums: the sum of level * code minus that of level * a */
    __m256i weight_shift;           /* shift of the weights: times the window sum, it is subtracted from sums of level * a */
    int has_shift;
    int accumulates;                /* whether this is not the first plane: adds to out instead of the bias */
    const float *residual, *out;    /* of the whole image; residual is NULL if there is none or this is not the last plane */
} Epilogue;

/* Of outputs first..first+8. */
INLINE Epilogue load_epilogue(const ConvParams *conv, int64_t plane, int64_t first, float act_scale, float act_zero,
                              const float *bias) {
    Epilogue e = {.has_shift = conv->zero != NULL, .accumulates = plane > 0, .out = conv->out};
    int64_t at = plane * conv->outputs + first;
    e.residual = plane == conv->planes - 1 ? conv->residual : NULL;
    e.mask = mask_8(conv->outputs - first);
    e.scale = _mm256_maskload_ps(conv->scale + at, e.mask);
    e.scale = _mm256_mul_ps(e.scale, _mm256_set1_ps(conv->half_scale ? act_scale * 0.5f : act_scale));
    e.bias = bias ? _mm256_maskload_ps(bias + first, e.mask) : _mm256_setzero_ps();
    e.zero_sums = _mm256_maskload_epi32(conv->weight_sums + at, e.mask);
    e.zero_sums = _mm256_mullo_epi32(e.zero_sums, _mm256_set1_epi32((int)act_zero));
    e.weight_shift = _mm256_setzero_si256();
    if (conv->zero) {
        __m256 zero = _mm256_maskload_ps(conv->zero + first, e.mask), step = _mm256_set1_ps((float)level_step(conv->bits));
        e.weight_shift = _mm256_cvtps_epi32(_mm256_fmadd_ps(zero, step, _mm256_set1_ps((float)level_min(conv->bits))));
    }
    return e;
}

/* Writes the outputs of one pixel to out. sums: of level * a. window_sum: of the pixel, read only if the weights have a shift. */
INLINE void store_outputs(const Epilogue *e, __m256i sums, const int32_t *window_sum, float *out) {
    if (e->has_shift) sums = _mm256_sub_epi32(sums, _mm256_mullo_epi32(e->weight_shift, _mm256_set1_epi32(*window_sum)));
    __m256 before = e->accumulates ? _mm256_maskload_ps(out, e->mask) : e->bias;
    __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), e->scale, before);
    if (e->residual) value = _mm256_add_ps(value, _mm256_maskload_ps(e->residual + (out - e->out), e->mask));
    _mm256_maskstore_ps(out, e->mask, value);
}
#endif
