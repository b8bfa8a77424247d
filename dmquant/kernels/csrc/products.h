/* ROWS rows of u8 codes against a block of OUTPUTS outputs of s8 levels, [group of four][output][4], into whole sums that
 * begin with `start`: by AMX, AVX-512 VNNI, AVX2 or plain C, as the compiler is told. Rows are `step` bytes apart, those of sums
 * `width`; the depth comes in STEPs. */
#ifndef DMQUANT_PRODUCTS_H
#define DMQUANT_PRODUCTS_H
#include "memory.h"

#define OUTPUTS 32

#if defined(__AMX_INT8__)
#include "tiles.h"
#define STEP 64
#define ROWS 32

static void begin_products(void) {
    configure();
    SETTLE;
}

static void end_products(void) { _tile_release(); }

static void multiply(const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth, int64_t max_code,
                     const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    _tile_loadd(0, start, 0);       /* the same in all rows */
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start, 0);
    _tile_loadd(3, start + 16, 0);
    for (int64_t d = 0; d < depth; d += 64, levels += 2048) {
        _tile_loadd(4, codes + d, step);
        _tile_loadd(6, levels, 128);
        _tile_loadd(7, levels + 64, 128);
        _tile_loadd(5, codes + 16 * step + d, step);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * width);
    _tile_stored(1, sums + 16, 4 * width);
    _tile_stored(2, sums + 16 * width, 4 * width);
    _tile_stored(3, sums + 16 * width + 16, 4 * width);
    SETTLE;
}
#else
#define STEP 32
#define ROWS 16

static void begin_products(void) {}
static void end_products(void) {}

#if defined(__AVX512VNNI__)
#include "fours.h"

static void multiply(const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth, int64_t max_code,
                     const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    for (int row = 0; row < ROWS; row += 8) {
        __m512i acc[8][2];
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) acc[p][0] = _mm512_loadu_si512(start), acc[p][1] = _mm512_loadu_si512(start + 16);
        multiply_groups(acc, codes + row * step, step, levels, depth / 4, 8);
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            _mm512_storeu_si512(sums + (row + p) * width, acc[p][0]);
            _mm512_storeu_si512(sums + (row + p) * width + 16, acc[p][1]);
        }
    }
}
#elif defined(__AVX2__)
#include "pairs.h"

INLINE void multiply_by(const int mode, const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth,
                        const int32_t *start, int32_t *sums, int64_t width) {
    for (int row = 0; row < ROWS; row += 4)
        for (int half = 0; half < 2; half++) {
            __m256i acc[4][2];
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++)
                for (int v = 0; v < 2; v++) acc[p][v] = _mm256_loadu_si256((const __m256i *)(start + 16 * half + 8 * v));
            multiply_groups(acc, codes + row * step, step, levels + 64 * half, depth / 4, 4, mode);
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                int32_t *first = sums + (row + p) * width + 16 * half;
                _mm256_storeu_si256((__m256i *)first, acc[p][0]);
                _mm256_storeu_si256((__m256i *)(first + 8), acc[p][1]);
            }
        }
}

static void multiply(const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth, int64_t max_code,
                     const int32_t *start, int32_t *sums, int64_t width) {
    if (2 * max_code * 127 <= 32767) multiply_by(PAIRS, codes, step, levels, depth, start, sums, width);
    else multiply_by(SINGLES, codes, step, levels, depth, start, sums, width);
}
#else
static void multiply(const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth, int64_t max_code,
                     const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    for (int row = 0; row < ROWS; row++, codes += step, sums += width) {
        int32_t acc[OUTPUTS];
        memcpy(acc, start, sizeof acc);
        for (int64_t d = 0; d < depth; d++)
            for (int o = 0; o < OUTPUTS; o++) acc[o] += codes[d] * (int8_t)levels[OUTPUTS * (d & -4) + 4 * o + (d & 3)];
        memcpy(sums, acc, sizeof acc);
    }
}
#endif
#endif
#endif
