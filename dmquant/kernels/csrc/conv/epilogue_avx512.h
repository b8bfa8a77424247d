/* Sums -> outputs, sixteen at a time. Needs AVX-512 F. The same interface as epilogue_avx2.h. */
#ifndef DMQUANT_CONV_EPILOGUE_AVX512_H
#define DMQUANT_CONV_EPILOGUE_AVX512_H
#include <immintrin.h>
#include "conv/driver.h"

/* For sixteen outputs of one image. */
typedef struct {
    __mmask16 mask;                 /* outputs that exist */
    __m512 scale, bias;             /* weight scale * act_scale; 0 without a bias */
    __m512i zero_sums;              /* act_zero * weight_sums: the sum of level * code minus that of level * a */
    __m512i weight_shift;           /* shift of the weights: times the window sum, it is subtracted from sums of level * a */
    int has_shift;
    int accumulates;                /* whether this is not the first plane: adds to out instead of the bias */
    const float *residual, *out;    /* of the whole image; residual is NULL if there is none or this is not the last plane */
} Epilogue;

/* Of outputs first..first+16. */
INLINE Epilogue load_epilogue(const ConvParams *conv, int64_t plane, int64_t first, float act_scale, float act_zero,
                              const float *bias) {
    Epilogue e = {.has_shift = conv->zero != NULL, .accumulates = plane > 0, .out = conv->out};
    e.residual = plane == conv->planes - 1 ? conv->residual : NULL;
    int64_t rest = max(0, min(16, conv->outputs - first)), at = plane * conv->outputs + first;
    e.mask = (__mmask16)((1u << rest) - 1);
    e.scale = _mm512_maskz_loadu_ps(e.mask, conv->scale + at);
    e.scale = _mm512_mul_ps(e.scale, _mm512_set1_ps(conv->half_scale ? act_scale * 0.5f : act_scale));
    e.bias = bias ? _mm512_maskz_loadu_ps(e.mask, bias + first) : _mm512_setzero_ps();
    e.zero_sums = _mm512_maskz_loadu_epi32(e.mask, conv->weight_sums + at);
    e.zero_sums = _mm512_mullo_epi32(e.zero_sums, _mm512_set1_epi32((int)act_zero));
    e.weight_shift = _mm512_setzero_si512();
    if (conv->zero) {
        __m512 zero = _mm512_maskz_loadu_ps(e.mask, conv->zero + first), step = _mm512_set1_ps((float)level_step(conv->bits));
        e.weight_shift = _mm512_cvtps_epi32(_mm512_fmadd_ps(zero, step, _mm512_set1_ps((float)level_min(conv->bits))));
    }
    return e;
}

/* Writes the outputs of one pixel to out. sums: of level * a. window_sum: of the pixel, read only if the weights have a shift. */
INLINE void store_outputs(const Epilogue *e, __m512i sums, const int32_t *window_sum, float *out) {
    if (e->has_shift) sums = _mm512_sub_epi32(sums, _mm512_mullo_epi32(e->weight_shift, _mm512_set1_epi32(*window_sum)));
    __m512 before = e->accumulates ? _mm512_maskz_loadu_ps(e->mask, out) : e->bias;
    __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), e->scale, before);
    if (e->residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(e->mask, e->residual + (out - e->out)));
    _mm512_mask_storeu_ps(out, e->mask, value);
}
#endif
