/* Vectors of winograd.c in 512 or 256 bits, and the products of transformed inputs V and weights U.
 *
 * V is [channel block][TILE_GROUP tiles][64 channels] of u8, U is [channel block][16 groups][32 outputs][4 channels] of s8.
 * Products are int32 sums over channels, [2 halves of the outputs][TILE_GROUP tiles][16 outputs]; `start` (32) is what they
 * begin with. All are aligned to the size of a vector. */
#ifndef DMQUANT_CONV_WINOGRAD_SIMD_H
#define DMQUANT_CONV_WINOGRAD_SIMD_H
#define LEVELS_BYTES 2048           /* of 32 outputs and 64 channels */
#define TILE_GROUP (2 * REGISTER_TILES)     /* tiles that are multiplied with one block of weights in turn */

#ifdef __AVX512F__
#include "conv/quantize_avx512.h"
#include "conv/epilogue_avx512.h"
#include "conv/unpack_avx512.h"
#include "simd/dot_avx512vnni.h"

typedef __m512i Vector;
#define MM(operation) _mm512_##operation
#define REGISTER_TILES 8            /* tiles x 32 outputs whose sums are in registers */

INLINE Vector load_vector(const void *at) { return _mm512_load_si512(at); }
INLINE void store_vector(void *at, Vector a) { _mm512_store_si512(at, a); }

/* Adds four neighbouring s8 to each int32. */
INLINE Vector add_bytes(Vector sums, Vector a) {
    VPDPBUSD(sums, _mm512_set1_epi8(1), a);
    return sums;
}

/* REGISTER_TILES tiles times 32 outputs. v, u: of the first tile in channel block 0 of `blocks`. */
INLINE void multiply_tiles(const uint8_t *v, const uint8_t *u, int64_t blocks, const int32_t *start, int32_t *products) {
    Vector acc[REGISTER_TILES][2];
#pragma GCC unroll 8
    for (int p = 0; p < REGISTER_TILES; p++) acc[p][0] = load_vector(start), acc[p][1] = load_vector(start + 16);
    for (int64_t k = 0; k < blocks; k++, v += TILE_GROUP * 64, u += LEVELS_BYTES) dot_groups(acc, v, 64, u, 16, REGISTER_TILES);
#pragma GCC unroll 8
    for (int p = 0; p < REGISTER_TILES; p++)
        store_vector(products + 16 * p, acc[p][0]), store_vector(products + 16 * (TILE_GROUP + p), acc[p][1]);
}
#else
#include "conv/quantize_avx2.h"
#include "conv/epilogue_avx2.h"
#include "conv/unpack_avx2.h"
#include "simd/dot_avx2.h"

typedef __m256i Vector;
#define MM(operation) _mm256_##operation
#define REGISTER_TILES 5            /* tiles x 16 outputs whose sums are in registers */

INLINE Vector load_vector(const void *at) { return _mm256_load_si256((const __m256i *)at); }
INLINE void store_vector(void *at, Vector a) { _mm256_store_si256((__m256i *)at, a); }

/* Adds four neighbouring s8 to each int32. */
INLINE Vector add_bytes(Vector sums, Vector a) { return dot_u8s8(sums, _mm256_set1_epi8(1), a, DOT_VPDPBUSD); }

/* REGISTER_TILES tiles times the 16 outputs that begin at u and start. */
INLINE void multiply_half(const uint8_t *v, const uint8_t *u, int64_t blocks, const int32_t *start, int32_t *products) {
    Vector acc[REGISTER_TILES][2];
#pragma GCC unroll 6
    for (int p = 0; p < REGISTER_TILES; p++) acc[p][0] = load_vector(start), acc[p][1] = load_vector(start + 8);
    for (int64_t k = 0; k < blocks; k++, v += TILE_GROUP * 64, u += LEVELS_BYTES)
        dot_groups(acc, v, 64, u, 16, REGISTER_TILES, DOT_VPDPBUSD);
#pragma GCC unroll 6
    for (int p = 0; p < REGISTER_TILES; p++)
        store_vector(products + 16 * p, acc[p][0]), store_vector(products + 16 * p + 8, acc[p][1]);
}

/* REGISTER_TILES tiles times 32 outputs. v, u: of the first tile in channel block 0 of `blocks`. */
INLINE void multiply_tiles(const uint8_t *v, const uint8_t *u, int64_t blocks, const int32_t *start, int32_t *products) {
    multiply_half(v, u, blocks, start, products);
    multiply_half(v, u + 64, blocks, start + 16, products + 16 * TILE_GROUP);
}
#endif
#endif
