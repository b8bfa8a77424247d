/* The widest registers that winograd.c is compiled for, and its products in them: squares of V, UNIT of which lie side by side in
 * each block of channels, times the levels of 32 outputs. Products are [16 outputs: first, last][square][output], and `start`
 * what the sums of each output begin with. */
#ifndef DMQUANT_CONV_WINOGRAD_SIMD_H
#define DMQUANT_CONV_WINOGRAD_SIMD_H
#define LEVELS_BYTES 2048           /* of 32 outputs and 64 channels */
#define UNIT (2 * TILE)             /* squares that are multiplied at a time */

#ifdef __AVX512F__
#include "conv/quantize_avx512.h"
#include "conv/unpack_avx512.h"
#include "conv/epilogue_avx512.h"
#include "simd/dot_avx512vnni.h"
typedef __m512i Vector;
#define OF(operation) _mm512_##operation
#define TILE 8                      /* squares x 32 outputs in registers */
INLINE Vector get(const void *at) { return _mm512_load_si512(at); }
INLINE void keep_at(void *at, Vector a) { _mm512_store_si512(at, a); }
INLINE Vector add_bytes(Vector sum, Vector a) {
    VPDPBUSD(sum, _mm512_set1_epi8(1), a);
    return sum;
}

INLINE void multiply_tile(const uint8_t *v, const uint8_t *u, int64_t blocks, const int32_t *start, int32_t *products) {
    Vector acc[TILE][2];
#pragma GCC unroll 8
    for (int p = 0; p < TILE; p++) acc[p][0] = get(start), acc[p][1] = get(start + 16);
    for (int64_t k = 0; k < blocks; k++, v += UNIT * 64, u += LEVELS_BYTES) dot_groups(acc, v, 64, u, 16, TILE);
#pragma GCC unroll 8
    for (int p = 0; p < TILE; p++) keep_at(products + 16 * p, acc[p][0]), keep_at(products + 16 * (UNIT + p), acc[p][1]);
}
#else
#include "conv/quantize_avx2.h"
#include "conv/unpack_avx2.h"
#include "conv/epilogue_avx2.h"
#include "simd/dot_avx2.h"
typedef __m256i Vector;
#define OF(operation) _mm256_##operation
#define TILE 5                      /* squares x 16 outputs in registers */
INLINE Vector get(const void *at) { return _mm256_load_si256((const __m256i *)at); }
INLINE void keep_at(void *at, Vector a) { _mm256_store_si256((__m256i *)at, a); }
INLINE Vector add_bytes(Vector sum, Vector a) { return dot_u8s8(sum, _mm256_set1_epi8(1), a, DOT_VPDPBUSD); }

INLINE void multiply_half(const uint8_t *v, const uint8_t *u, int64_t blocks, const int32_t *start, int32_t *products) {
    Vector acc[TILE][2];
#pragma GCC unroll 6
    for (int p = 0; p < TILE; p++) acc[p][0] = get(start), acc[p][1] = get(start + 8);
    for (int64_t k = 0; k < blocks; k++, v += UNIT * 64, u += LEVELS_BYTES) dot_groups(acc, v, 64, u, 16, TILE, DOT_VPDPBUSD);
#pragma GCC unroll 6
    for (int p = 0; p < TILE; p++) keep_at(products + 16 * p, acc[p][0]), keep_at(products + 16 * p + 8, acc[p][1]);
}

INLINE void multiply_tile(const uint8_t *v, const uint8_t *u, int64_t blocks, const int32_t *start, int32_t *products) {
    multiply_half(v, u, blocks, start, products);
    multiply_half(v, u + 64, blocks, start + 16, products + 16 * UNIT);
}
#endif
#endif
