/* Layer norm: each pixel (a token) is normalized over its channels, then multiplied by a gain and shifted by an offset.
 *
 * Sums are taken in the same order in every variant (LANES x CHAINS partial sums), so all variants give the same bits. The mean
 * is found in two passes, the second over differences from the first mean: values far from zero keep their precision. */
#ifndef DMQUANT_NORM_LAYER_NORM_H
#define DMQUANT_NORM_LAYER_NORM_H
#include "norm/norm.h"
#include "simd/simd.h"

#define CHAINS 4                    /* independent vectors of sums: no addition waits for the one before */

/* A normalized value is (x - pivot) * inverse + shift, with a pivot near the mean. */
typedef struct {
    float pivot, inverse, shift;
} PixelStats;

/* The first `count` <= LANES floats of x, then zeros. */
INLINE F32x16 load_first(const float *x, int64_t count) {
    float padded[LANES] = {0};
    memcpy(padded, x, 4 * count);
    return load_f32(padded);
}

INLINE float reduce_chains(const F32x16 *sum) {
    return reduce_add(add_f32(add_f32(sum[0], sum[1]), add_f32(sum[2], sum[3])));
}

/* Of one pixel x (channels). */
static PixelStats measure_pixel(const float *x, int64_t channels, double epsilon) {
    const int64_t step = CHAINS * LANES, whole = channels / LANES * LANES, rest = channels - whole;
    F32x16 sum[CHAINS], squares[CHAINS];
    int64_t c = 0;
    for (int j = 0; j < CHAINS; j++) sum[j] = set1_f32(0);
    for (; c + step <= whole; c += step)
        for (int j = 0; j < CHAINS; j++) sum[j] = add_f32(sum[j], load_f32(x + c + j * LANES));
    for (; c < whole; c += LANES) sum[0] = add_f32(sum[0], load_f32(x + c));
    if (rest) sum[1] = add_f32(sum[1], load_first(x + whole, rest));
    float pivot = reduce_chains(sum) / (float)channels;
    for (int j = 0; j < CHAINS; j++) sum[j] = squares[j] = set1_f32(0);
    for (c = 0; c + step <= whole; c += step)
        for (int j = 0; j < CHAINS; j++) {
            F32x16 difference = sub_f32(load_f32(x + c + j * LANES), set1_f32(pivot));
            sum[j] = add_f32(sum[j], difference), squares[j] = fmadd_f32(difference, difference, squares[j]);
        }
    for (; c < channels; c += LANES) {
        int64_t count = min(LANES, channels - c);
        F32x16 difference = first_lanes(sub_f32(load_first(x + c, count), set1_f32(pivot)), count);
        sum[0] = add_f32(sum[0], difference), squares[0] = fmadd_f32(difference, difference, squares[0]);
    }
    float mean = reduce_chains(sum) / (float)channels;
    double variance = reduce_chains(squares) / (double)channels - (double)mean * mean;
    float inverse = (float)(1 / sqrt((variance > 0 ? variance : 0) + epsilon));
    return (PixelStats){pivot, inverse, -mean * inverse};
}

/* Applies any prologue to x (pixels, input channels), one image channels last: a layer norm where it has an epsilon, else
 * apply_affine. */
static inline void apply_prologue(const Prologue *prologue, const float *restrict x, int64_t pixels, int64_t channels,
                                  float *restrict out) {
    const float *restrict gain = prologue->gain, *restrict offset = prologue->offset, *restrict factor = prologue->factor;
    if (prologue->epsilon <= 0) {
        apply_affine(prologue, x, pixels, channels, out);
        return;
    }
    int64_t ahead = pixels * prologue->stride;
    for (int64_t p = 0; p < pixels; p++, x += prologue->stride, out += channels) {
        for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(x + ahead + c, 0, 2);    /* for the next call */
        PixelStats s = measure_pixel(x, channels, prologue->epsilon);
        if (gain)
            for (int64_t c = 0; c < channels; c++)
                out[c] = fmaf(fmaf(x[c] - s.pivot, s.inverse, s.shift), gain[c], offset[c]);
        else
            for (int64_t c = 0; c < channels; c++) out[c] = fmaf(x[c] - s.pivot, s.inverse, s.shift);
        if (factor)
            for (int64_t c = 0; c < channels; c++) out[c] *= factor[c];
    }
}
#endif
