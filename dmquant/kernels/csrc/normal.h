/* What a denoiser does to an image before it is multiplied: a gain and an offset for each channel (a group norm, once its
 * moments are known), SiLU, a factor for each channel.
 *
 * Plain C that compilers make vectors of, with one rounding for each operation written (fmaf is exact everywhere), so that
 * every kernel gives the same bits. SiLU is within 2e-6 of the exact one, relative. */
#ifndef DMQUANT_NORMAL_H
#define DMQUANT_NORMAL_H
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    const float *gain, *offset;     /* of each channel of one image */
    const float *factor;            /* of each channel, or NULL */
    int64_t activate;               /* 1: SiLU */
} Normal;

/* e^x for |x| < 88: 2^n e^r with |r| < 0.35, by the series of e^r. */
static inline __attribute__((always_inline)) float exponential(float x) {
    const float magic = 12582912.0f;            /* 1.5 * 2^23: added to, it rounds to whole numbers */
    float z = fmaf(x, 1.44269504f, magic), n = z - magic;
    float r = fmaf(n, 1.90465421e-9f, fmaf(n, -0.693147182f, x)), e = 1.0f / 5040;
    e = fmaf(e, r, 1.0f / 720);
    e = fmaf(e, r, 1.0f / 120);
    e = fmaf(e, r, 1.0f / 24);
    e = fmaf(e, r, 1.0f / 6);
    e = fmaf(e, r, 0.5f);
    e = fmaf(e, r, 1.0f);
    e = fmaf(e, r, 1.0f);
    uint32_t exponent, bits;
    memcpy(&exponent, &z, 4);
    memcpy(&bits, &e, 4);
    bits += exponent << 23;
    memcpy(&e, &bits, 4);
    return e;
}

/* 1 / x for 1 <= x < 2^120, to half a unit in the last place: Newton's steps from a guess by the exponent are
 * five times as fast as a division. */
static inline __attribute__((always_inline)) float invert(float x) {
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
    return x * invert(1.0f + exponential(x > 80.0f ? -80.0f : -x));
}

/* Pixels of one image, channels last, into `out`. */
static inline void normalize(const Normal *normal, const float *restrict x, int64_t pixels, int64_t channels,
                             float *restrict out) {
    const float *restrict gain = normal->gain, *restrict offset = normal->offset, *restrict factor = normal->factor;
    for (int64_t p = 0; p < pixels; p++, x += channels, out += channels) {
        if (normal->activate)
            for (int64_t c = 0; c < channels; c++) out[c] = silu(fmaf(x[c], gain[c], offset[c]));
        else
            for (int64_t c = 0; c < channels; c++) out[c] = fmaf(x[c], gain[c], offset[c]);
        if (factor)
            for (int64_t c = 0; c < channels; c++) out[c] *= factor[c];
    }
}
#endif
