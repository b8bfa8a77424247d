/* gemm_u8s8.h by AMX: 2 tiles of 16 rows times 2 tiles of 16 outputs. */
#ifndef DMQUANT_ATTENTION_GEMM_AMX_H
#define DMQUANT_ATTENTION_GEMM_AMX_H
#include "simd/amx_tiles.h"
#include "simd/inline.h"

#define DEPTH_STEP 64
#define ROWS 32

static void begin_gemm(void) {
    load_tile_config();
    COMPILER_BARRIER;
}

static void end_gemm(void) { _tile_release(); }

/* For a depth of one SPAN: codes stay in tiles 4 and 5, and the sums of 16 outputs are stored while the next are multiplied. */
static void gemm_one_span(const uint8_t *codes, const uint8_t *levels, const int32_t *start, int64_t outputs, int32_t *sums,
                          int64_t width) {
    int32_t *lower = sums + 16 * width;        /* rows 16 to 31 */
    _tile_loadd(4, codes, SPAN);
    _tile_loadd(5, codes + 16 * SPAN, SPAN);
    for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * SPAN) {
        _tile_loadd(6, levels, 128);
        _tile_loadd(0, start + o, 0);       /* a stride of 0: the same in all rows */
        _tile_loadd(1, start + o, 0);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 5, 6);
        if (o) {
            _tile_stored(2, sums + o - 16, 4 * width);
            _tile_stored(3, lower + o - 16, 4 * width);
        }
        _tile_loadd(7, levels + 64, 128);
        _tile_loadd(2, start + o + 16, 0);
        _tile_loadd(3, start + o + 16, 0);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
        _tile_stored(0, sums + o, 4 * width);
        _tile_stored(1, lower + o, 4 * width);
    }
    _tile_stored(2, sums + round_up(outputs, OUTPUTS) - 16, 4 * width);
    _tile_stored(3, lower + round_up(outputs, OUTPUTS) - 16, 4 * width);
}

/* For any depth: one block of outputs, or the first 16 of it. Tiles 0 to 3 hold sums, 4 and 5 codes, 6 and 7 levels. */
INLINE void gemm_block(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, const int32_t *start,
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
    if (depth == SPAN) gemm_one_span(codes, levels, start, outputs, sums, width);
    else
        for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * depth) {
            if (outputs - o > 16) gemm_block(codes, stride, levels, depth, start + o, sums + o, width, 0);
            else gemm_block(codes, stride, levels, depth, start + o, sums + o, width, 1);
        }
    COMPILER_BARRIER;
}
#endif
