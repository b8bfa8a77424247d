/* Convolution by AMX: a tile of 16 cells of 64 u8 codes times a tile of 64 s8 levels of 16 outputs, 2 x 2 tiles at a time.
 *
 * Channel blocks have 64 channels. Cells of a band are contiguous, so the 16 cells of a tile may run over the end of a
 * row: sums under padding are dropped, and tiles are full even where rows have 4 or 8 pixels. The epilogue of earlier tiles runs
 * between the products of the next ones: the tile unit and the vector units work at the same time.
 * Needs AMX-TILE, AMX-INT8, AVX-512 F, BW, VL and DQ, and Linux. */

/* Of unpacked weights: what the L2 cache holds besides the outputs. At 3x3 more, for each group reads the cells again. */
#define GROUP_BYTES (conv->kernel_h * conv->kernel_w > 1 ? 1 << 20 : 256 << 10)
#include "conv/quantize_avx512.h"
#include "conv/unpack_avx512.h"
#include "conv/epilogue_avx512.h"
#include "simd/amx_tiles.h"

#define PREFETCHED 8                /* cells whose outputs are prefetched at each step; with 16 the loads of tiles have to wait */

/* 16 cells, stride_w apart. */
typedef struct {
    int32_t position;               /* first cell, counted from the first cell of the band */
    int32_t image;                  /* 0 if all images have the same grid and bias */
    int32_t pixel[16];              /* output pixel of each cell, counted from the first of the band; -1: the cell has none */
} Tile;

/* Two neighbouring tiles (or one) and one output block: int32 sums between their products and their epilogue. */
typedef struct {
    const Tile *tiles;
    int64_t count;                  /* of tiles, 1 or 2 */
    int64_t done;                   /* tiles whose outputs are written */
    int64_t output;                 /* first output of the block */
    int32_t sums[4][256] __attribute__((aligned(64)));      /* [2 * tile + half of the outputs][16 cells][16 outputs] */
} TilePair;

static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan) {
    return plan->band_rows * conv->out_width * (int64_t)sizeof(Tile);
}

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    return unpack_blocks(conv, plan, plane, from, to, weights);
}

/* Assigns the output pixels of a band to tiles, in order: a pixel joins the last tile if its first cell is one of the tile's 16.
 * Also sums a over the window of each pixel. */
static int64_t prepare_band(const Band *band) {
    Tile *tiles = (Tile *)band->scratch->tile_buffer;
    const ConvParams *conv = band->conv;
    int64_t count = 0, stride = conv->stride_w, pixel = 0;
    for (int64_t r = 0; r < band->num_rows; r++) {
        int64_t first = band->scratch->input_rows[r] * band->plan->row_cells;
        int64_t pixels = count_output_pixels(conv, band->first_row + r);
        int32_t image = conv->act_stride || conv->bias_stride ? (int32_t)((band->first_row + r) / conv->out_height) : 0;
        if (conv->zero)
            sum_windows(conv, band->plan, band->scratch->pixel_sums + first, pixels, band->scratch->window_sums + pixel);
        for (int64_t x = 0; x < pixels; x++) {
            int64_t position = first + x * stride, step = count ? position - tiles[count - 1].position : -1;
            if (step < 0 || step >= 16 * stride || step % stride || tiles[count - 1].image != image) {
                Tile *tile = &tiles[count++];
                tile->position = (int32_t)position, tile->image = image, step = 0;
                memset(tile->pixel, -1, sizeof tile->pixel);
            }
            tiles[count - 1].pixel[step / stride] = (int32_t)pixel++;
        }
    }
    return count;
}

/* Writes the outputs of tile t of a pair: both halves of a pixel in turn, for they share a pair of cache lines. */
static void store_tile(const Band *band, const TilePair *pair, int64_t t) {
    const ConvParams *conv = band->conv;
    const Tile *tile = &pair->tiles[t];
    const int32_t *window_sums = band->scratch->window_sums, *sums_0 = pair->sums[2 * t], *sums_1 = pair->sums[2 * t + 1];
    int64_t n = tile->image * conv->act_stride, outputs = conv->outputs;
    const float *bias = bias_of(conv, tile->image);
    Epilogue e0 = load_epilogue(conv, band->plane, pair->output, conv->act_scale[n], conv->act_zero[n], bias);
    Epilogue e1 = load_epilogue(conv, band->plane, pair->output + 16, conv->act_scale[n], conv->act_zero[n], bias);
    float *first = conv->out + first_output_pixel(conv, band->first_row) * outputs + pair->output;
    for (int i = 0; i < 16; i++) {
        int64_t pixel = tile->pixel[i];
        if (pixel < 0) continue;
        float *out = first + pixel * outputs;
        store_outputs(&e0, _mm512_sub_epi32(_mm512_load_si512(sums_0 + 16 * i), e0.zero_sums), window_sums + pixel, out);
        if (e1.mask)
            store_outputs(&e1, _mm512_sub_epi32(_mm512_load_si512(sums_1 + 16 * i), e1.zero_sums), window_sums + pixel, out + 16);
    }
}

/* Prefetches outputs and residuals of PREFETCHED cells of a pair, from cell `from` on, into the L2 cache: in L1 they would evict
 * each other. Always inlined: gcc drops calls of functions that only prefetch. */
INLINE void prefetch_outputs(const Band *band, const TilePair *pair, int64_t from) {
    const ConvParams *conv = band->conv;
    int64_t outputs = conv->outputs, first = first_output_pixel(conv, band->first_row) * outputs + pair->output;
    for (int64_t i = from; i < from + PREFETCHED; i++) {
        int64_t at = first + max(0, pair->tiles[i / 16].pixel[i % 16]) * outputs;
        for (int64_t half = at; half < at + OUTPUTS; half += 16) {
            __builtin_prefetch(conv->out + half, 0, 2);
            if (conv->residual) __builtin_prefetch(conv->residual + half, 0, 2);
        }
    }
}

/* Vector work that goes with step i of the products of a pair: prefetches for this pair, one tile of the pair before. The sums of
 * the latter are in memory only after the first step. */
static void overlap_epilogue(const Band *band, TilePair *before, const TilePair *pair, int64_t i) {
    if (i * PREFETCHED < pair->count * 16) prefetch_outputs(band, pair, i * PREFETCHED);
    if (i && before->done < before->count) store_tile(band, before, before->done++);
}

static void finish_epilogue(const Band *band, TilePair *pair) {
    while (pair->done < pair->count) store_tile(band, pair, pair->done++);
}

/* Computes the sums of a pair, and finishes the pair before. levels: [channel block][tap][16 groups][32 outputs][4 channels].
 * Tile registers 0 to 3 hold sums, 4 and 5 codes, 6 and 7 levels. */
INLINE void multiply_pair(const Band *band, const uint8_t *levels, TilePair *before, TilePair *pair, const int has_two) {
    const uint8_t *cells = band->scratch->cells, *first = cells + pair->tiles[0].position * 64;
    const uint8_t *second = has_two ? cells + pair->tiles[1].position * 64 : first;
    int64_t count = band->plan->channel_blocks * band->plan->taps, stride = 64 * band->conv->stride_w;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < count; i++, levels += 2048) {
        int64_t offset = band->scratch->tap_offsets[i];
        _tile_stream_loadd(6, levels, 128);
        _tile_loadd(4, first + offset, stride);
        _tile_stream_loadd(7, levels + 64, 128);
        if (has_two) _tile_loadd(5, second + offset, stride);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (has_two) _tile_dpbusd(2, 5, 6);
        if (has_two) _tile_dpbusd(3, 5, 7);
        if (i < 32 / PREFETCHED) overlap_epilogue(band, before, pair, i);
        if (i % STORE_INTERVAL == STORE_INTERVAL - 1) _tile_stored(0, pair->sums[0], 64);
    }
    finish_epilogue(band, before);
    _tile_stored(0, pair->sums[0], 64);
    _tile_stored(1, pair->sums[1], 64);
    if (has_two) _tile_stored(2, pair->sums[2], 64);
    if (has_two) _tile_stored(3, pair->sums[3], 64);
    COMPILER_BARRIER;
}

static void multiply_band(const Band *band) {
    const Tile *tiles = (const Tile *)band->scratch->tile_buffer;
    TilePair pairs[2] = {{.count = 0}}, *before = &pairs[0], *pair = &pairs[1];
    load_tile_config();
    COMPILER_BARRIER;
    for (int64_t i = 0; i < band->tiles; i += 2)
        for (int64_t block = band->first_block; block < band->end_block; block++) {
            const uint8_t *levels = band->weights + (block - band->first_block) * band->plan->weight_bytes;
            pair->tiles = tiles + i, pair->count = min(2, band->tiles - i), pair->done = 0, pair->output = block * OUTPUTS;
            if (pair->count == 2) multiply_pair(band, levels, before, pair, 1);
            else multiply_pair(band, levels, before, pair, 0);
            TilePair *next = before;
            before = pair, pair = next;
        }
    finish_epilogue(band, before);
    _tile_release();
}
