/* Blocks of s8 levels, as the products of AVX-512 and AMX read them. */
#ifndef DMQUANT_CONV_UNPACK_AVX512_H
#define DMQUANT_CONV_UNPACK_AVX512_H
#include "conv/quantize_avx512.h"

INLINE void expand_lines(const uint8_t *masks, int64_t count, const int64_t bits, uint8_t *weights) {
    for (int64_t i = 0; i < count; i++) _mm512_store_si512(weights + 64 * i, unpack_levels(masks + 8 * bits * i, bits));
}

/* What is unpacked most often has a loop of its own, of known length: a sixth of a layer of 1280 channels. */
static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights) {
    int64_t bits = conv->bits, count = (to - from) * plan->weight_bytes / 64;
    const uint8_t *masks = plane + from * plan->weight_bytes / 8 * bits;
    if (bits == 8) return masks;
    if (bits == 1) expand_lines(masks, count, 1, weights);
    else if (bits == 4) expand_lines(masks, count, 4, weights);
    else expand_lines(masks, count, bits, weights);
    return weights;
}
#endif
