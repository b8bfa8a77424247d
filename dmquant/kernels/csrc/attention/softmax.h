/* Softmax of integer scores in float32, CHUNK keys at a time, with the same bits in all variants.
 *
 * A probability is exp2(score * factor - shift) divided by its sum over the keys. shift is the pivot times the factor; the
 * pivot is a score of the same query, not necessarily the largest: probabilities do not depend on it unless exponentials
 * overflow, so no pass over all keys has to find the largest score first. */
#ifndef DMQUANT_ATTENTION_SOFTMAX_H
#define DMQUANT_ATTENTION_SOFTMAX_H
#include "simd/scratch.h"
#include "simd/simd.h"

#define CHUNK 64                    /* keys */
#define EXP_SUM_LIMIT 0x1p100f      /* sums of exponentials from here on: the pivot is too far below the largest score */

/* 2^x, relative error 2e-7: 2^floor(x) times a polynomial of degree 5 in x - floor(x), our own fit over 0..1. For x < -126 the
 * result is below 2^-125, for x > 100 it is at least EXP_SUM_LIMIT. */
INLINE F32x16 exp2_f32(F32x16 x) {
    F32x16 f = fract_f32(x);
    F32x16 e = fmadd_f32(set1_f32(0.00187758f), f, set1_f32(0.00898934f));
    e = fmadd_f32(e, f, set1_f32(0.05582632f));
    e = fmadd_f32(e, f, set1_f32(0.24015362f));
    e = fmadd_f32(e, f, set1_f32(0.69315307f));
    e = fmadd_f32(e, f, set1_f32(0.99999993f));
    return scalef(e, x);
}

/* exp2(score * factor - shift) of 16 scores. |score| < 2^24 converts to float exactly, and the product is not rounded before the
 * subtraction. */
INLINE F32x16 exp_scores(const int32_t *scores, F32x16 factor, F32x16 shift) {
    return exp2_f32(fmsub_f32(i32_to_f32(load_i32(scores)), factor, shift));
}

/* Writes the exponentials of one query and a chunk of keys, 0 from key `count` on, and adds them to sums (LANES). */
INLINE void exp_chunk(const int32_t *scores, F32x16 factor, float shift, int64_t count, float *exps, float *sums) {
    F32x16 sum = load_f32(sums), shifts = set1_f32(shift);
    for (int64_t t = 0; t < CHUNK; t += LANES) {
        F32x16 e = exp_scores(scores + t, factor, shifts);
        if (count < CHUNK) e = first_lanes(e, max(0, min(LANES, count - t)));
        store_f32(exps + t, e);
        sum = add_f32(sum, e);
    }
    store_f32(sums, sum);
}

/* The largest of `count` scores, as a float. Scores up to the next multiple of LANES are read; they must be as low as NO_KEY. */
static float max_score(const int32_t *scores, int64_t count) {
    I32x16 best = load_i32(scores);
    for (int64_t t = LANES; t < count; t += LANES) best = max_i32(best, load_i32(scores + t));
    return reduce_max(i32_to_f32(best));
}

/* Exponentials of one query and a chunk of keys, times `factor` -> codes of probabilities. Returns partial sums of the codes. */
INLINE I32x16 quantize_probabilities(const float *exps, float factor, U8Vec zero, U8Vec limit, uint8_t *codes) {
    F32x16 by = set1_f32(factor), a = mul_f32(load_f32(exps), by), b = mul_f32(load_f32(exps + LANES), by);
    return store_codes(codes, a, b, mul_f32(load_f32(exps + 2 * LANES), by), mul_f32(load_f32(exps + 3 * LANES), by), zero,
                       limit);
}
#endif
