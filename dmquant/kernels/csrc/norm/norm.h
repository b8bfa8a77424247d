/* What a denoiser does to an image before it is multiplied: a gain and an offset for each channel (a group norm, once its
 * moments are known), an activation, a factor for each channel. Layer norms are in layer_norm.h.
 *
 * Plain C that compilers make vectors of, with one rounding for each operation written (fmaf is exact everywhere), so that
 * every kernel gives the same bits. SiLU is within 2e-7 of the exact one, relative, and GELU by tanh within 7e-6; GELU within
 * 4e-7, relative, and 8e-8 |x|: what is left of it below -2 loses digits. */
#ifndef DMQUANT_NORM_H
#define DMQUANT_NORM_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "simd/float_bits.h"

enum { NONE, SILU, GELU, GELU_TANH, GATED };    /* activations, as in normal.py; GATED: x times GELU of what lies behind all x */

typedef struct {
    const float *gain, *offset;     /* of each channel of one image, or NULL */
    const float *factor;            /* of each channel, or NULL */
    int64_t activation;
    int64_t stride;                 /* from one pixel that is written to the next */
    double epsilon;                 /* of a layer norm before the gain (layer_norm.h), without an activation; 0: none */
} Prologue;

/* e^x for |x| < 88: 2^n e^r with |r| < 0.35, by the series of e^r. */
static inline __attribute__((always_inline)) float exp_f32(float x) {
    float z = fmaf(x, 1.44269504f, MAGIC), n = z - MAGIC;
    float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x)), e = 1.0f / 5040;
    e = fmaf(e, r, 1.0f / 720);
    e = fmaf(e, r, 1.0f / 120);
    e = fmaf(e, r, 1.0f / 24);
    e = fmaf(e, r, 1.0f / 6);
    e = fmaf(e, r, 0.5f);
    e = fmaf(e, r, 1.0f);
    e = fmaf(e, r, 1.0f);
    return scale_by_power(e, z);
}

/* 1 / x for 1 <= x < 2^120, to half a unit in the last place: Newton's steps from a guess by the exponent are
 * five times as fast as a division. */
static inline __attribute__((always_inline)) float reciprocal(float x) {
    uint32_t bits;
    float y;
    memcpy(&bits, &x, 4);
    bits = 0x7ef311c7 - bits;
    memcpy(&y, &bits, 4);
    y = fmaf(y, fmaf(-x, y, 1.0f), y);
    y = fmaf(y, fmaf(-x, y, 1.0f), y);
    return fmaf(y, fmaf(-x, y, 1.0f), y);
}

static inline __attribute__((always_inline)) float silu(float x) {
    x = x < -80.0f ? -80.0f : x;
    return x * reciprocal(1.0f + exp_f32(x > 80.0f ? -80.0f : -x));
}

/* By the error function of Abramowitz and Stegun, 7.1.26. */
static inline __attribute__((always_inline)) float gelu(float x) {
    float z = fabsf(x) * 0.70710678f, t = reciprocal(fmaf(z, 0.3275911f, 1.0f)), tail = 1.061405429f;
    z = z < 8.0f ? z : 8.0f;
    tail = fmaf(tail, t, -1.453152027f);
    tail = fmaf(tail, t, 1.421413741f);
    tail = fmaf(tail, t, -0.284496736f);
    tail = fmaf(tail, t, 0.254829592f);
    tail *= t * exp_f32(-z * z) * 0.5f * x;     /* x times the smaller half of what is below and above it */
    return x > 0.0f ? x - tail : tail;
}

static inline __attribute__((always_inline)) float gelu_tanh(float x) {
    x = x < -9.7f ? -9.7f : x;                                      /* what is left there is nothing */
    float t = x * fmaf(x * x, -0.0713548162f, -1.59576912f);        /* -2 sqrt(2 / pi) (x + 0.044715 x^3) */
    return x * reciprocal(1.0f + exp_f32(t < -80.0f ? -80.0f : t));
}

/* Channels of a pixel that is read for one of `channels`. */
static inline int64_t input_channels(int64_t activation, int64_t channels) { return activation == GATED ? 2 * channels : channels; }

static inline __attribute__((always_inline)) float activate(int64_t activation, float x) {
    return activation == SILU ? silu(x) : activation == GELU ? gelu(x) : activation == GELU_TANH ? gelu_tanh(x) : x;
}

static inline __attribute__((always_inline)) void affine_pixels(const Prologue *prologue, const float *restrict x, int64_t pixels,
                                                               int64_t channels, float *restrict out, const int64_t activation) {
    const float *restrict gain = prologue->gain, *restrict offset = prologue->offset, *restrict factor = prologue->factor;
    int64_t read = input_channels(activation, channels);
    for (int64_t p = 0; p < pixels; p++, x += read, out += prologue->stride) {
        for (int64_t c = 0; c < read; c += 16) __builtin_prefetch(x + pixels * read + c, 0, 2);     /* the next row */
        if (activation == GATED)
            for (int64_t c = 0; c < channels; c++) out[c] = x[c] * gelu(x[channels + c]);
        else if (gain)
            for (int64_t c = 0; c < channels; c++) out[c] = activate(activation, fmaf(x[c], gain[c], offset[c]));
        else
            for (int64_t c = 0; c < channels; c++) out[c] = activate(activation, x[c]);
        if (factor)
            for (int64_t c = 0; c < channels; c++) out[c] *= factor[c];
    }
}

/* Pixels of one image, channels last, into `out`. */
static inline void apply_affine(const Prologue *prologue, const float *x, int64_t pixels, int64_t channels, float *out) {
    if (prologue->activation == SILU) affine_pixels(prologue, x, pixels, channels, out, SILU);
    else if (prologue->activation == GELU) affine_pixels(prologue, x, pixels, channels, out, GELU);
    else if (prologue->activation == GELU_TANH) affine_pixels(prologue, x, pixels, channels, out, GELU_TANH);
    else if (prologue->activation == GATED) affine_pixels(prologue, x, pixels, channels, out, GATED);
    else affine_pixels(prologue, x, pixels, channels, out, NONE);
}
#endif
