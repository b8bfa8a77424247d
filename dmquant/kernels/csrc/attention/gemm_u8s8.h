/* ROWS rows of u8 codes against s8 levels, [block of OUTPUTS][group of four][output][4], into whole sums that begin with `start`
 * and fill the last block: by AMX, AVX-512 VNNI, AVX2 or plain C, as the compiler is told. Codes lie as [SPAN of the depth][row]
 * [SPAN], `stride` bytes from one to the next; rows of sums are `width` apart; the depth comes in STEPs. */
#ifndef DMQUANT_ATTENTION_GEMM_U8S8_H
#define DMQUANT_ATTENTION_GEMM_U8S8_H
#include "simd/scratch.h"

#define OUTPUTS 32
#define SPAN 64                     /* of the depth: codes of a row that lie side by side */

#if defined(__AMX_INT8__)
#include "simd/amx_tiles.h"
#define STEP 64
#define ROWS 32

static void begin_products(void) {
    load_tile_config();
    COMPILER_BARRIER;
}

static void end_products(void) { _tile_release(); }

/* Of one SPAN: the codes stay in their tiles, and sums are stored while the next ones are multiplied. */
static void multiply_flat(const uint8_t *codes, const uint8_t *levels, const int32_t *start, int64_t outputs, int32_t *sums,
                          int64_t width) {
    int32_t *low = sums + 16 * width;
    _tile_loadd(4, codes, SPAN);
    _tile_loadd(5, codes + 16 * SPAN, SPAN);
    for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * SPAN) {
        _tile_loadd(6, levels, 128);
        _tile_loadd(0, start + o, 0);       /* the same in all rows */
        _tile_loadd(1, start + o, 0);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        if (o) {
            _tile_stored(2, sums + o - 16, 4 * width);
            _tile_stored(3, low + o - 16, 4 * width);
        }
        _tile_loadd(7, levels + 64, 128);
        _tile_loadd(2, start + o + 16, 0);
        _tile_loadd(3, start + o + 16, 0);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
        _tile_stored(0, sums + o, 4 * width);
        _tile_stored(1, low + o, 4 * width);
    }
    _tile_stored(2, sums + round_up(outputs, OUTPUTS) - 16, 4 * width);
    _tile_stored(3, low + round_up(outputs, OUTPUTS) - 16, 4 * width);
}

/* Of a block, or of its first half. */
INLINE void multiply_deep(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, const int32_t *start,
                          int32_t *sums, int64_t width, const int is_half) {
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start, 0);
    if (!is_half) {
        _tile_loadd(2, start + 16, 0);
        _tile_loadd(3, start + 16, 0);
    }
    for (int64_t d = 0; d < depth; d += SPAN, codes += stride, levels += OUTPUTS * SPAN) {
        _tile_loadd(4, codes, SPAN);
        _tile_loadd(6, levels, 128);
        _tile_loadd(5, codes + 16 * SPAN, SPAN);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        if (!is_half) {
            _tile_loadd(7, levels + 64, 128);
            _tile_dpbusd(2, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        if (d / SPAN % STORE_INTERVAL == STORE_INTERVAL - 1) _tile_stored(0, sums, 4 * width);
    }
    _tile_stored(0, sums, 4 * width);
    _tile_stored(1, sums + 16 * width, 4 * width);
    if (!is_half) {
        _tile_stored(2, sums + 16, 4 * width);
        _tile_stored(3, sums + 16 * width + 16, 4 * width);
    }
}

static void gemm_u8s8(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                     const int32_t *start, int64_t outputs, int32_t *sums, int64_t width) {
    (void)max_code;
    if (depth == SPAN) multiply_flat(codes, levels, start, outputs, sums, width);
    else
        for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * depth) {
            if (outputs - o > 16) multiply_deep(codes, stride, levels, depth, start + o, sums + o, width, 0);
            else multiply_deep(codes, stride, levels, depth, start + o, sums + o, width, 1);
        }
    COMPILER_BARRIER;
}
#else
#define STEP 32
#define ROWS 16

static void begin_products(void) {}
static void end_products(void) {}

#if defined(__AVX512VNNI__)
#include "simd/dot_avx512vnni.h"

static void multiply_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                           const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    for (int row = 0; row < ROWS; row += 8) {
        __m512i acc[8][2];
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) acc[p][0] = _mm512_loadu_si512(start), acc[p][1] = _mm512_loadu_si512(start + 16);
        for (int64_t d = 0; d < depth; d += SPAN) {
            const uint8_t *first = codes + d / SPAN * stride + row * SPAN;
            dot_groups(acc, first, SPAN, levels + OUTPUTS * d, min(SPAN, depth - d) / 4, 8);
        }
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            _mm512_storeu_si512(sums + (row + p) * width, acc[p][0]);
            _mm512_storeu_si512(sums + (row + p) * width + 16, acc[p][1]);
        }
    }
}
#elif defined(__AVX2__)
#include "simd/dot_avx2.h"

INLINE void multiply_by(const int mode, const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth,
                        const int32_t *start, int32_t *sums, int64_t width) {
    for (int row = 0; row < ROWS; row += 4)
        for (int half = 0; half < 2; half++) {
            __m256i acc[4][2];
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++)
                for (int v = 0; v < 2; v++) acc[p][v] = _mm256_loadu_si256((const __m256i *)(start + 16 * half + 8 * v));
            for (int64_t d = 0; d < depth; d += SPAN) {
                const uint8_t *first = codes + d / SPAN * stride + row * SPAN;
                dot_groups(acc, first, SPAN, levels + OUTPUTS * d + 64 * half, min(SPAN, depth - d) / 4, 4, mode);
            }
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                int32_t *first = sums + (row + p) * width + 16 * half;
                _mm256_storeu_si256((__m256i *)first, acc[p][0]);
                _mm256_storeu_si256((__m256i *)(first + 8), acc[p][1]);
            }
        }
}

static void multiply_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                           const int32_t *start, int32_t *sums, int64_t width) {
#ifdef __AVXVNNI__
    (void)max_code;
    multiply_by(DOT_VPDPBUSD, codes, stride, levels, depth, start, sums, width);
#else
    if (2 * max_code * 127 <= 32767) multiply_by(DOT_16BIT_PAIRS, codes, stride, levels, depth, start, sums, width);
    else multiply_by(DOT_WIDENED, codes, stride, levels, depth, start, sums, width);
#endif
}
#else
static void multiply_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                           const int32_t *start, int32_t *sums, int64_t width) {
    (void)max_code;
    for (int row = 0; row < ROWS; row++, codes += SPAN, sums += width) {
        int32_t acc[OUTPUTS];
        memcpy(acc, start, sizeof acc);
        for (int64_t d = 0; d < depth; d++) {
            int32_t code = codes[d / SPAN * stride + d % SPAN];
            for (int o = 0; o < OUTPUTS; o++) acc[o] += code * (int8_t)levels[OUTPUTS * (d & -4) + 4 * o + (d & 3)];
        }
        memcpy(sums, acc, sizeof acc);
    }
}
#endif

static void gemm_u8s8(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                     const int32_t *start, int64_t outputs, int32_t *sums, int64_t width) {
    for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * depth)
        multiply_block(codes, stride, levels, depth, max_code, start + o, sums + o, width);
}
#endif
#endif
