/* Softmax of whole scores, a chunk of keys at a time.
 *
 * Scores become shares of the best one in the same lane of the same chunk: nobody waits for the best of all. To that one the
 * chunks are brought when their shares are rounded. */
#ifndef DMQUANT_SOFTMAX_H
#define DMQUANT_SOFTMAX_H
#include "lanes.h"

/* Of the shares of one query in one chunk of keys, by lanes. */
typedef struct {
    int32_t best[LANES];            /* score, of which they are shares */
    float total[LANES];
    float weight[LANES];            /* what a share of it is of the best of all */
} Part;

/* 2^x for -65 < x < 65, to 2e-7: the polynomial is our own fit to the whole of 0..1. */
INLINE Floats power(Floats x) {
    Floats f = fraction(x);
    Floats e = times_plus(all(0.00187758f), f, all(0.00898934f));
    e = times_plus(e, f, all(0.05582632f));
    e = times_plus(e, f, all(0.24015362f));
    e = times_plus(e, f, all(0.69315307f));
    e = times_plus(e, f, all(0.99999993f));
    return raise(e, x);
}

INLINE Floats share_of(const int32_t *scores, Ints best, Ints lowest, Floats factor) {
    return power(times(to_floats(larger_ints(subtract_ints(load_ints(scores), best), lowest)), factor));
}

/* Scores of one query and a chunk of `count` keys -> shares. What is 2^-64 of the best one is as good as none; the factor is 64
 * at most, where one step is as much. */
static void share_out(const int32_t *scores, float factor, int64_t count, float *shares, Part *part) {
    Ints best = load_ints(scores), lowest = all_ints(factor > 64e-9f ? (int32_t)(-64.0f / factor) : (int32_t)-1e9f);
    for (int64_t t = LANES; t < count; t += LANES) best = larger_ints(best, load_ints(scores + t));
    Floats steep = all(factor), total = all(0.0f), share;
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES) {
        store(shares + t, share = share_of(scores + t, best, lowest, steep));
        total = add(total, share);
    }
    if (t < count) {
        store(shares + t, share = first_of(share_of(scores + t, best, lowest, steep), count - t));
        total = add(total, share);
    }
    store_ints(part->best, best);
    store(part->total, total);
}

/* Weights of the parts of one query; the inverse of the sum of its shares, all brought to the best score. */
static float weigh(Part *parts, int64_t chunks, float factor) {
    Floats best = to_floats(load_ints(parts[0].best)), sum = all(0.0f);
    for (int64_t i = 1; i < chunks; i++) best = larger(best, to_floats(load_ints(parts[i].best)));
    best = all(largest_lane(best));
    for (int64_t i = 0; i < chunks; i++) {
        Floats x = times(subtract(to_floats(load_ints(parts[i].best)), best), all(factor));
        Floats weight = power(larger(x, all(-64.0f)));
        store(parts[i].weight, weight);
        sum = times_plus(load(parts[i].total), weight, sum);
    }
    return 1.0f / sum_lanes(sum);
}

/* Shares of a chunk of `count` keys, times a factor -> codes of probabilities, whose a are added to `sums`. MAGIC has been added
 * to the zero and to the limit of codes. */
INLINE Ints round_shares(const float *shares, int64_t count, Floats factor, Floats zero, Floats limit, uint8_t *codes,
                         Ints sums) {
    for (int64_t t = 0; t < count; t += LANES) {
        Ints code = bits_of(smaller(times_plus(load(shares + t), factor, zero), limit));
        store_bytes(codes + t, code);
        sums = add_ints(sums, subtract_ints(code, bits_of(zero)));
    }
    return sums;
}
#endif
