/* SiLU and GELU of one float, in plain C that compilers vectorize.
 *
 * Each operation that is written is rounded once (fmaf is exact on every machine, and contraction is off), so every kernel gets
 * the same bits. Largest errors: SiLU 2e-7, relative; GELU 4e-7, relative, and 8e-8 |x|, absolute (below -2 its small values lose
 * digits); GELU by tanh 7e-6, relative. */
#ifndef DMQUANT_NORM_ACTIVATION_H
#define DMQUANT_NORM_ACTIVATION_H
#include <math.h>
#include <string.h>
#include "simd/float_bits.h"

enum { NONE, SILU, GELU, GELU_TANH, GATED };    /* numbers as in Python; GATED: x[c] * gelu(x[channels + c]) */

/* e^x for |x| < 88, as 2^n e^r with |r| < 0.35: n = round(x / ln 2), e^r by its Taylor series up to r^7. */
INLINE float exp_f32(float x) {
    float biased = fmaf(x, 1.44269504f, MAGIC), n = biased - MAGIC;
    float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x)), e = 1.0f / 5040;    /* x - n ln 2, ln 2 as the sum of two */
    e = fmaf(e, r, 1.0f / 720);
    e = fmaf(e, r, 1.0f / 120);
    e = fmaf(e, r, 1.0f / 24);
    e = fmaf(e, r, 1.0f / 6);
    e = fmaf(e, r, 0.5f);
    e = fmaf(e, r, 1.0f);
    e = fmaf(e, r, 1.0f);
    return scale_by_power(e, biased);
}

/* 1 / x for 1 <= x < 2^120, to half a unit in the last place: an estimate from the exponent, then three Newton steps. Five times
 * as fast as a division. */
INLINE float reciprocal(float x) {
    uint32_t bits;
    float y;
    memcpy(&bits, &x, 4);
    bits = 0x7ef311c7 - bits;
    memcpy(&y, &bits, 4);
    y = fmaf(y, fmaf(-x, y, 1.0f), y);
    y = fmaf(y, fmaf(-x, y, 1.0f), y);
    return fmaf(y, fmaf(-x, y, 1.0f), y);
}

/* x / (1 + e^-x). */
INLINE float silu(float x) {
    x = x < -80.0f ? -80.0f : x;
    return x * reciprocal(1.0f + exp_f32(x > 80.0f ? -80.0f : -x));
}

/* x (1 + erf(x / sqrt 2)) / 2, with erf by Abramowitz and Stegun, 7.1.26. */
INLINE float gelu(float x) {
    float z = fabsf(x) * 0.70710678f, t = reciprocal(fmaf(z, 0.3275911f, 1.0f)), tail = 1.061405429f;
    z = z < 8.0f ? z : 8.0f;
    tail = fmaf(tail, t, -1.453152027f);
    tail = fmaf(tail, t, 1.421413741f);
    tail = fmaf(tail, t, -0.284496736f);
    tail = fmaf(tail, t, 0.254829592f);
    tail *= t * exp_f32(-z * z) * 0.5f * x;     /* x (1 - erf(|x| / sqrt 2)) / 2 */
    return x > 0.0f ? x - tail : tail;
}

/* x / (1 + e^t) with t = -2 sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE float gelu_tanh(float x) {
    x = x < -9.7f ? -9.7f : x;                  /* below, |result| < 1e-34 */
    float t = x * fmaf(x * x, -0.0713548162f, -1.59576912f);
    return x * reciprocal(1.0f + exp_f32(t < -80.0f ? -80.0f : t));
}

/* Not for GATED, which needs two values. */
INLINE float activate(int64_t activation, float x) {
    return activation == SILU ? silu(x) : activation == GELU ? gelu(x) : activation == GELU_TANH ? gelu_tanh(x) : x;
}

/* How many channels a pixel has that is read, where `channels` are written. */
INLINE int64_t input_channels(int64_t activation, int64_t channels) { return activation == GATED ? 2 * channels : channels; }
#endif
