/* The last step of the AVX-512 kernels, for 16 outputs of one image: acc is the sum of level * code. */
#ifndef DMQUANT_EPILOGUE_H
#define DMQUANT_EPILOGUE_H
#include <immintrin.h>
#include "band.h"

typedef struct {
    __mmask16 mask;
    __m512 scale, bias;
    __m512i excess, shift;          /* what codes add too much: zero point times total; what each a adds too much */
} Outputs;

INLINE Outputs outputs_of(const Job *job, int64_t plane, int64_t first, float act_scale, float act_zero, const float *bias) {
    Outputs o;
    int64_t rest = most(0, least(16, job->outputs - first)), at = plane * job->outputs + first;
    o.mask = (__mmask16)((1u << rest) - 1);
    o.scale = _mm512_maskz_loadu_ps(o.mask, job->scale + at);
    o.scale = _mm512_mul_ps(o.scale, _mm512_set1_ps(job->halves ? act_scale * 0.5f : act_scale));
    o.bias = bias ? _mm512_maskz_loadu_ps(o.mask, bias + first) : _mm512_setzero_ps();
    o.excess = _mm512_maskz_loadu_epi32(o.mask, job->total + at);
    o.excess = _mm512_mullo_epi32(o.excess, _mm512_set1_epi32((int)act_zero));
    o.shift = _mm512_setzero_si512();
    if (job->zero) {
        __m512 zero = _mm512_maskz_loadu_ps(o.mask, job->zero + first), step = _mm512_set1_ps((float)level_step(job->bits));
        o.shift = _mm512_cvtps_epi32(_mm512_fmadd_ps(zero, step, _mm512_set1_ps((float)level_least(job->bits))));
    }
    return o;
}

/* Further planes add to what the first one wrote. */
INLINE void put(const Job *job, const Outputs *o, int64_t plane, __m512i acc, const int32_t *box, float *out) {
    if (job->zero) acc = _mm512_sub_epi32(acc, _mm512_mullo_epi32(o->shift, _mm512_set1_epi32(*box)));
    __m512 before = plane ? _mm512_maskz_loadu_ps(o->mask, out) : o->bias;
    __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), o->scale, before);
    const float *residual = residual_at(job, plane, out);
    if (residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(o->mask, residual));
    _mm512_mask_storeu_ps(out, o->mask, value);
}
#endif
