/* Bit planes of weight codes -> s8 levels. Needs AVX2. */
#ifndef DMQUANT_CONV_UNPACK_AVX2_H
#define DMQUANT_CONV_UNPACK_AVX2_H
#include <immintrin.h>
#include <string.h>
#include "conv/params.h"
#include "simd/inline.h"

/* The levels of 32 weights of `bits` bits. masks: for each bit eight bytes, of which the first four belong to these weights. A
 * shuffle copies each byte of a mask to the bytes of its eight weights, where one bit each is tested. */
INLINE __m256i unpack_levels(const uint8_t *masks, const int64_t bits) {
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i place = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i level = _mm256_set1_epi8((char)level_min(bits));
    for (int64_t bit = 0; bit < bits; bit++) {
        int32_t mask;
        memcpy(&mask, masks + 8 * bit, 4);
        __m256i at = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), spread), place);
        __m256i step = _mm256_set1_epi8((char)(level_step(bits) << bit));
        level = _mm256_add_epi8(level, _mm256_and_si256(_mm256_cmpeq_epi8(at, place), step));
    }
    return level;
}
#endif
