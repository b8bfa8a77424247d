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
INLINE Floats power(Floats x) {
    Floats f = fraction(x);
    Floats e = times_plus(all(0.00187758f), f, all(0.00898934f));
    e = times_plus(e, f, all(0.05582632f));
    e = times_plus(e, f, all(0.24015362f));
    e = times_plus(e, f, all(0.69315307f));
    e = times_plus(e, f, all(0.99999993f));
    return raise(e, x);
}

/* 2^(score * factor - shift). A product of a whole score below 2^24 is not rounded before the shift is taken off. */
INLINE Floats share_of(const int32_t *scores, Floats factor, Floats shift) {
    return power(times_less(to_floats(load_ints(scores)), factor, shift));
}

/* Scores of one query and a chunk of keys, `count` of which are keys -> shares, added to their sums by lanes. */
INLINE void share_out(const int32_t *scores, Floats factor, float shift, int64_t count, float *shares, float *total) {
    Floats sum = load(total), shifts = all(shift);
    for (int64_t t = 0; t < CHUNK; t += LANES) {
        Floats share = share_of(scores + t, factor, shifts);
        if (count < CHUNK) share = first_of(share, most(0, least(LANES, count - t)));
        store(shares + t, share);
        sum = add(sum, share);
    }
    store(total, sum);
}

/* The best score of a chunk, whose first `count` keys are keys; the rest of a vector's has scores that are never best. */
static float best_of(const int32_t *scores, int64_t count) {
    Ints best = load_ints(scores);
    for (int64_t t = LANES; t < count; t += LANES) best = larger_ints(best, load_ints(scores + t));
    return largest_lane(to_floats(best));
}

/* Shares of one query in a chunk of keys, times a factor -> codes of probabilities, whose sums are returned by lanes. */
INLINE Ints round_shares(const float *shares, float factor, Bytes zero, Bytes limit, uint8_t *codes) {
    Floats by = all(factor), a = times(load(shares), by), b = times(load(shares + LANES), by);
    return store_codes(codes, a, b, times(load(shares + 2 * LANES), by), times(load(shares + 3 * LANES), by), zero, limit);
}
#endif
