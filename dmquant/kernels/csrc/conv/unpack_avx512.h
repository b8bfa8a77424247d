/* Bit planes of weight codes -> s8 levels. Needs AVX-512 F and BW. */
#ifndef DMQUANT_CONV_UNPACK_AVX512_H
#define DMQUANT_CONV_UNPACK_AVX512_H
#include <immintrin.h>
#include <string.h>
#include "conv/blocking.h"

/* The levels of 64 weights of `bits` bits. masks: for each bit 64 bits, one for each weight. */
INLINE __m512i unpack_levels(const uint8_t *masks, const int64_t bits) {
    __m512i level = _mm512_set1_epi8((char)level_min(bits));
    for (int64_t bit = 0; bit < bits; bit++) {
        uint64_t mask;
        memcpy(&mask, masks + 8 * bit, 8);
        if (bits == 1) return _mm512_mask_mov_epi8(level, mask, _mm512_set1_epi8(1));
        level = _mm512_mask_add_epi8(level, mask, level, _mm512_set1_epi8((char)(level_step(bits) << bit)));
    }
    return level;
}

/* `count` times 64 weights. */
INLINE void unpack_lines(const uint8_t *masks, int64_t count, const int64_t bits, uint8_t *weights) {
    for (int64_t i = 0; i < count; i++) _mm512_store_si512(weights + 64 * i, unpack_levels(masks + 8 * bits * i, bits));
}

/* unpack_weights() of driver.h: levels in the order of the packed weights; those of 8 bits are used where they are. The most
 * frequent widths have loops of their own, with `bits` constant: unpacking takes a sixth of the time of a layer of 1280
 * channels. */
INLINE const uint8_t *unpack_blocks(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                    uint8_t *weights) {
    int64_t bits = conv->bits, count = (to - from) * plan->weight_bytes / 64;
    const uint8_t *masks = plane + from * plan->weight_bytes / 8 * bits;
    if (bits == 8) return masks;
    if (bits == 1) unpack_lines(masks, count, 1, weights);
    else if (bits == 4) unpack_lines(masks, count, 4, weights);
    else unpack_lines(masks, count, bits, weights);
    return weights;
}
#endif
