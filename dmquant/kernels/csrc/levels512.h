/* Blocks of s8 levels, as the products of AVX-512 and AMX read them. */
#ifndef DMQUANT_LEVELS512_H
#define DMQUANT_LEVELS512_H
#include "codes512.h"

static const uint8_t *expand(const Job *job, const Shape *s, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights) {
    int64_t bits = job->bits, count = (to - from) * s->weight_bytes / 64;
    if (bits == 8) return plane + from * s->weight_bytes;
    const uint8_t *masks = plane + from * s->weight_bytes / 8 * bits;
    for (int64_t i = 0; bits == 1 && i < count; i++) _mm512_store_si512(weights + 64 * i, levels_of(masks + 8 * i, 1));
    for (int64_t i = 0; bits > 1 && i < count; i++) _mm512_store_si512(weights + 64 * i, levels_of(masks + 8 * bits * i, bits));
    return weights;
}
#endif
