/* Softmax of whole scores, CHUNK keys at a time.
 *
 * Scores become shares of a pivot, which is a score of the same query and near the best one, or else the best one itself: nobody
 * waits for the best of all. What the pivot is does not show in the probabilities. */
#ifndef DMQUANT_ATTENTION_SOFTMAX_H
#define DMQUANT_ATTENTION_SOFTMAX_H
#include "simd/simd.h"

#define CHUNK 64                    /* keys */
#define TOO_MUCH 0x1p100f           /* a sum of shares: the best score is far above the pivot */

/* 2^x, to 2e-7: the polynomial is our own fit to the whole of 0..1. Below -126 next to nothing, above 100 at least TOO_MUCH. */
INLINE F32x16 power(F32x16 x) {
    F32x16 f = fract_f32(x);
    F32x16 e = fmadd_f32(set1_f32(0.00187758f), f, set1_f32(0.00898934f));
    e = fmadd_f32(e, f, set1_f32(0.05582632f));
    e = fmadd_f32(e, f, set1_f32(0.24015362f));
    e = fmadd_f32(e, f, set1_f32(0.69315307f));
    e = fmadd_f32(e, f, set1_f32(0.99999993f));
    return scalef(e, x);
}

/* 2^(score * factor - shift). A product of a whole score below 2^24 is not rounded before the shift is taken off. */
INLINE F32x16 share_of(const int32_t *scores, F32x16 factor, F32x16 shift) {
    return power(fmsub_f32(i32_to_f32(load_i32(scores)), factor, shift));
}

/* Scores of one query and a chunk of keys, `count` of which are keys -> shares, added to their sums by lanes. */
INLINE void share_out(const int32_t *scores, F32x16 factor, float shift, int64_t count, float *shares, float *total) {
    F32x16 sum = load_f32(total), shifts = set1_f32(shift);
    for (int64_t t = 0; t < CHUNK; t += LANES) {
        F32x16 share = share_of(scores + t, factor, shifts);
        if (count < CHUNK) share = first_lanes(share, max(0, min(LANES, count - t)));
        store_f32(shares + t, share);
        sum = add_f32(sum, share);
    }
    store_f32(total, sum);
}

/* The best score of a chunk, whose first `count` keys are keys; the rest of a vector's has scores that are never best. */
static float best_of(const int32_t *scores, int64_t count) {
    I32x16 best = load_i32(scores);
    for (int64_t t = LANES; t < count; t += LANES) best = max_i32(best, load_i32(scores + t));
    return reduce_max(i32_to_f32(best));
}

/* Shares of one query in a chunk of keys, times a factor -> codes of probabilities, whose sums are returned by lanes. */
INLINE I32x16 round_shares(const float *shares, float factor, U8Vec zero, U8Vec limit, uint8_t *codes) {
    F32x16 by = set1_f32(factor), a = mul_f32(load_f32(shares), by), b = mul_f32(load_f32(shares + LANES), by);
    return store_codes(codes, a, b, mul_f32(load_f32(shares + 2 * LANES), by), mul_f32(load_f32(shares + 3 * LANES), by), zero, limit);
}
#endif
