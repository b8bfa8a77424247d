/* The prologue of a packed layer: activation(x * gain + offset) * factor, applied to pixels before they are quantized.
 *
 * Gain and offset (one for each channel of each image) are those of a group norm or of an adaptive norm. A prologue with an
 * epsilon is a layer norm: see norm/layer_norm.h. */
#ifndef DMQUANT_NORM_H
#define DMQUANT_NORM_H
#include "norm/activation.h"

/* For the channels of one image. */
typedef struct {
    const float *gain, *offset;     /* (C), or both NULL: 1 and 0 */
    const float *factor;            /* (C), or NULL: 1 */
    int64_t activation;             /* NONE, SILU, ...; GATED takes neither gain nor offset */
    int64_t stride;                 /* floats from one pixel of x to the next */
    double epsilon;                 /* > 0: a layer norm comes first, and activation is NONE; 0: none */
} Prologue;

INLINE void affine_pixels(const Prologue *prologue, const float *restrict x, int64_t pixels, int64_t channels,
                          float *restrict out, const int64_t activation) {
    const float *restrict gain = prologue->gain, *restrict offset = prologue->offset, *restrict factor = prologue->factor;
    int64_t read = input_channels(activation, channels), ahead = pixels * prologue->stride;
    for (int64_t p = 0; p < pixels; p++, x += prologue->stride, out += channels) {
        for (int64_t c = 0; c < read; c += 16) __builtin_prefetch(x + ahead + c, 0, 2);     /* for the next call */
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

/* Applies a prologue without a layer norm to x (pixels, input_channels(activation, channels)), one image channels last; writes
 * (pixels, channels). Compiled once for each activation. */
static inline void apply_affine(const Prologue *prologue, const float *x, int64_t pixels, int64_t channels, float *out) {
    if (prologue->activation == SILU) affine_pixels(prologue, x, pixels, channels, out, SILU);
    else if (prologue->activation == GELU) affine_pixels(prologue, x, pixels, channels, out, GELU);
    else if (prologue->activation == GELU_TANH) affine_pixels(prologue, x, pixels, channels, out, GELU_TANH);
    else if (prologue->activation == GATED) affine_pixels(prologue, x, pixels, channels, out, GATED);
    else affine_pixels(prologue, x, pixels, channels, out, NONE);
}
#endif
