/* The last step of the AVX-512 kernels, for 16 outputs of one image: acc is the sum of level * code. */
#ifndef DMQUANT_CONV_EPILOGUE_AVX512_H
#define DMQUANT_CONV_EPILOGUE_AVX512_H
#include <immintrin.h>
#include "conv/driver.h"

typedef struct {
    __mmask16 mask;
    __m512 scale, bias;
    __m512i excess, shift;          /* what codes add too much: zero point times total; what each a adds too much */
    int is_shifted, is_added;       /* to what an earlier plane wrote */
    const float *residual, *out;    /* of the whole image; no residual, or not yet: NULL */
} Epilogue;

INLINE Epilogue load_epilogue(const ConvParams *conv, int64_t plane, int64_t first, float act_scale, float act_zero, const float *bias) {
    Epilogue o = {.is_shifted = conv->zero != NULL, .is_added = plane > 0, .out = conv->out};
    o.residual = plane == conv->planes - 1 ? conv->residual : NULL;
    int64_t rest = max(0, min(16, conv->outputs - first)), at = plane * conv->outputs + first;
    o.mask = (__mmask16)((1u << rest) - 1);
    o.scale = _mm512_maskz_loadu_ps(o.mask, conv->scale + at);
    o.scale = _mm512_mul_ps(o.scale, _mm512_set1_ps(conv->half_scale ? act_scale * 0.5f : act_scale));
    o.bias = bias ? _mm512_maskz_loadu_ps(o.mask, bias + first) : _mm512_setzero_ps();
    o.excess = _mm512_maskz_loadu_epi32(o.mask, conv->weight_sums + at);
    o.excess = _mm512_mullo_epi32(o.excess, _mm512_set1_epi32((int)act_zero));
    o.shift = _mm512_setzero_si512();
    if (conv->zero) {
        __m512 zero = _mm512_maskz_loadu_ps(o.mask, conv->zero + first), step = _mm512_set1_ps((float)level_step(conv->bits));
        o.shift = _mm512_cvtps_epi32(_mm512_fmadd_ps(zero, step, _mm512_set1_ps((float)level_min(conv->bits))));
    }
    return o;
}

INLINE void store_outputs(const Epilogue *o, __m512i acc, const int32_t *window_sums, float *out) {
    if (o->is_shifted) acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(o->shift, _mm512_set1_epi32(*window_sums)));
    __m512 before = o->is_added ? _mm512_maskz_loadu_ps(o->mask, out) : o->bias;
    __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), o->scale, before);
    if (o->residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(o->mask, o->residual + (out - o->out)));
    _mm512_mask_storeu_ps(out, o->mask, value);
}
#endif
