/* Layer norm: each pixel (a token) by its own mean and variance over the channels, then a gain and an offset for each channel.
 *
 * Sums run over lanes and in an order of their own, the same in every variant, so that all give the same bits. The mean is found
 * twice, the second time of what lies around the first: values far from zero lose nothing. */
#ifndef DMQUANT_NORM_LAYER_NORM_H
#define DMQUANT_NORM_LAYER_NORM_H
#include "norm/norm.h"
#include "simd/simd.h"
#define CHAINS 4                    /* of sums, so that none waits for its last addition */

typedef struct {
    float pivot, inverse, shift;    /* a normalized value is (x - pivot) * inverse + shift */
} Token;

INLINE F32x16 load_some(const float *x, int64_t count) {
    float some[LANES] = {0};
    memcpy(some, x, 4 * count);
    return load_f32(some);
}

INLINE float sum_chains(const F32x16 *sum) { return reduce_add(add_f32(add_f32(sum[0], sum[1]), add_f32(sum[2], sum[3]))); }

static Token measure_token(const float *x, int64_t channels, double epsilon) {
    const int64_t step = CHAINS * LANES, whole = channels / LANES * LANES, rest = channels - whole;
    F32x16 sum[CHAINS], power[CHAINS];
    int64_t c = 0;
    for (int j = 0; j < CHAINS; j++) sum[j] = set1_f32(0);
    for (; c + step <= whole; c += step)
        for (int j = 0; j < CHAINS; j++) sum[j] = add_f32(sum[j], load_f32(x + c + j * LANES));
    for (; c < whole; c += LANES) sum[0] = add_f32(sum[0], load_f32(x + c));
    if (rest) sum[1] = add_f32(sum[1], load_some(x + whole, rest));
    float pivot = sum_chains(sum) / (float)channels;
    for (int j = 0; j < CHAINS; j++) sum[j] = power[j] = set1_f32(0);
    for (c = 0; c + step <= whole; c += step)
        for (int j = 0; j < CHAINS; j++) {
            F32x16 away = sub_f32(load_f32(x + c + j * LANES), set1_f32(pivot));
            sum[j] = add_f32(sum[j], away), power[j] = fmadd_f32(away, away, power[j]);
        }
    for (; c < channels; c += LANES) {
        int64_t count = min(LANES, channels - c);
        F32x16 away = first_lanes(sub_f32(load_some(x + c, count), set1_f32(pivot)), count);
        sum[0] = add_f32(sum[0], away), power[0] = fmadd_f32(away, away, power[0]);
    }
    float mean = sum_chains(sum) / (float)channels;
    double variance = sum_chains(power) / (double)channels - (double)mean * mean;
    float inverse = (float)(1 / sqrt((variance > 0 ? variance : 0) + epsilon));
    return (Token){pivot, inverse, -mean * inverse};
}

/* Pixels of one image, channels last, into `out`: by a layer norm, if there is one, or else as norm.h does it. */
static inline void apply_prologue(const Prologue *prologue, const float *restrict x, int64_t pixels, int64_t channels,
                                    float *restrict out) {
    const float *restrict gain = prologue->gain, *restrict offset = prologue->offset, *restrict factor = prologue->factor;
    if (prologue->epsilon <= 0) {
        apply_affine(prologue, x, pixels, channels, out);
        return;
    }
    for (int64_t p = 0; p < pixels; p++, x += channels, out += prologue->stride) {
        for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(x + pixels * channels + c, 0, 2);     /* the next row */
        Token t = measure_token(x, channels, prologue->epsilon);
        if (gain)
            for (int64_t c = 0; c < channels; c++)
                out[c] = fmaf(fmaf(x[c] - t.pivot, t.inverse, t.shift), gain[c], offset[c]);
        else
            for (int64_t c = 0; c < channels; c++) out[c] = fmaf(x[c] - t.pivot, t.inverse, t.shift);
        if (factor)
            for (int64_t c = 0; c < channels; c++) out[c] *= factor[c];
    }
}
#endif
