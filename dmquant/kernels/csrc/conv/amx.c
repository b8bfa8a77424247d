/* Products by AMX: a tile of 16 cells of 64 u8 codes times a tile of 64 s8 levels of 16 outputs, 2 x 2 tiles at a time.
 *
 * Cells lie one behind the other over the whole band, so a tile may run over the end of a row: what it computes of the padding
 * is thrown away, and images of 4 or 8 pixels still fill it. Blocks of 64 channels only.
 * While tiles are multiplied, the sums of those before become floats: the unit for tiles and the others work side by side.
 * Needs AMX-TILE and AMX-INT8, AVX-512 F, BW, VL, DQ for what stands around them, and Linux, which is asked for the tiles. */
/* Of expanded weights: as many as the second-level cache holds beside the outputs; at 3x3, each pass reads the cells anew. */
#define WEIGHTS_BYTES (conv->kernel_h * conv->kernel_w > 1 ? 1 << 20 : 256 << 10)
#include "conv/unpack_avx512.h"
#include "conv/epilogue_avx512.h"
#include "simd/amx_tiles.h"

#define FETCHED 8                   /* cells whose outputs are fetched beside one step: with 16 the tiles wait for their own */

typedef struct {
    int32_t position, image;        /* of its first cell, in cells */
    int32_t pixel[16];              /* of the band, -1 where a cell is no output */
} Tile;

static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *s) { return s->band_rows * conv->out_width * (int64_t)sizeof(Tile); }

/* Which cells go into which tile; also the sums of a under each pixel. */
static int64_t prepare_band(const Band *band) {
    Tile *tiles = (Tile *)band->scratch->tile_buffer;
    const ConvParams *conv = band->conv;
    int64_t count = 0, stride = conv->stride_w, pixel = 0;
    for (int64_t r = 0; r < band->count; r++) {
        int64_t top = band->scratch->tops[r] * band->plan->row_cells, pixels = count_output_pixels(conv, band->row + r);
        int32_t image = conv->act_stride || conv->bias_stride ? (int32_t)((band->row + r) / conv->out_height) : 0;
        if (conv->zero) sum_windows(conv, band->plan, band->scratch->sums + top, pixels, band->scratch->window_sums + pixel);
        for (int64_t x = 0; x < pixels; x++) {
            int64_t position = top + x * stride, step = count ? position - tiles[count - 1].position : -1;
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

/* One or two tiles of cells against 32 outputs, between their products and their floats. */
typedef struct {
    const Tile *tiles;
    int64_t count, done, output;    /* tiles, those that are floats, the first output */
    int32_t sums[4][256] __attribute__((aligned(64)));      /* [tile][half of the outputs] */
} Sums;

/* Sums of a tile -> floats, both halves of a pixel one after the other: they share a pair of cache lines. */
static void put_tile(const Band *band, const Sums *s, int64_t t) {
    const ConvParams *conv = band->conv;
    const Tile *tile = &s->tiles[t];
    const int32_t *window_sums = band->scratch->window_sums, *low_sums = s->sums[2 * t], *high_sums = s->sums[2 * t + 1];
    int64_t n = tile->image * conv->act_stride, outputs = conv->outputs;
    const float *bias = bias_of(conv, tile->image);
    Epilogue low = load_epilogue(conv, band->plane, s->output, conv->act_scale[n], conv->act_zero[n], bias);
    Epilogue high = load_epilogue(conv, band->plane, s->output + 16, conv->act_scale[n], conv->act_zero[n], bias);
    float *first = conv->out + first_output_pixel(conv, band->row) * outputs + s->output;
    for (int i = 0; i < 16; i++) {
        int64_t pixel = tile->pixel[i];
        if (pixel < 0) continue;
        float *out = first + pixel * outputs;
        store_outputs(&low, _mm512_sub_epi32(_mm512_load_si512(low_sums + 16 * i), low.excess), window_sums + pixel, out);
        if (high.mask) store_outputs(&high, _mm512_sub_epi32(_mm512_load_si512(high_sums + 16 * i), high.excess), window_sums + pixel, out + 16);
    }
}

/* What put_tile will read and write of some cells, into the second-level cache: in the first one they drive each other out.
 * Inlined, for gcc leaves out calls that do no more than this. */
INLINE void fetch_cells(const Band *band, const Sums *s, int64_t from) {
    const ConvParams *conv = band->conv;
    int64_t outputs = conv->outputs, first = first_output_pixel(conv, band->row) * outputs + s->output;
    for (int64_t i = from; i < from + FETCHED; i++) {
        int64_t at = first + max(0, s->tiles[i / 16].pixel[i % 16]) * outputs;
        for (int64_t half = at; half < at + OUTPUTS; half += 16) {
            __builtin_prefetch(conv->out + half, 0, 2);
            if (conv->residual) __builtin_prefetch(conv->residual + half, 0, 2);
        }
    }
}

/* What is done beside step i of the products of `s`; the sums before are there after the first one. */
static void accompany(const Band *band, Sums *before, const Sums *s, int64_t i) {
    if (i * FETCHED < s->count * 16) fetch_cells(band, s, i * FETCHED);
    if (i && before->done < before->count) put_tile(band, before, before->done++);
}

static void finish(const Band *band, Sums *s) {
    while (s->done < s->count) put_tile(band, s, s->done++);
}

/* The products of `s`, and what is left to do with the sums before. */
INLINE void multiply_tiles(const Band *band, const uint8_t *levels, Sums *before, Sums *s, const int is_pair) {
    const uint8_t *cells = band->scratch->cells, *first = cells + s->tiles[0].position * 64;
    const uint8_t *second = is_pair ? cells + s->tiles[1].position * 64 : first;
    int64_t count = band->plan->channel_blocks * band->plan->taps, step = 64 * band->conv->stride_w;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < count; i++, levels += 2048) {
        int64_t offset = band->scratch->offsets[i];
        _tile_stream_loadd(6, levels, 128);
        _tile_loadd(4, first + offset, step);
        _tile_stream_loadd(7, levels + 64, 128);
        if (is_pair) _tile_loadd(5, second + offset, step);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (is_pair) _tile_dpbusd(2, 5, 6);
        if (is_pair) _tile_dpbusd(3, 5, 7);
        if (i < 32 / FETCHED) accompany(band, before, s, i);
        if (i % STORE_INTERVAL == STORE_INTERVAL - 1) _tile_stored(0, s->sums[0], 64);
    }
    finish(band, before);
    _tile_stored(0, s->sums[0], 64);
    _tile_stored(1, s->sums[1], 64);
    if (is_pair) _tile_stored(2, s->sums[2], 64);
    if (is_pair) _tile_stored(3, s->sums[3], 64);
    COMPILER_BARRIER;
}

static void multiply_band(const Band *band) {
    const Tile *tiles = (const Tile *)band->scratch->tile_buffer;
    Sums sums[2] = {{.count = 0}}, *before = &sums[0], *s = &sums[1];
    load_tile_config();
    COMPILER_BARRIER;
    for (int64_t i = 0; i < band->tiles; i += 2)
        for (int64_t block = band->from; block < band->to; block++) {
            const uint8_t *levels = band->weights + (block - band->from) * band->plan->weight_bytes;
            s->tiles = tiles + i, s->count = min(2, band->tiles - i), s->done = 0, s->output = block * OUTPUTS;
            if (s->count == 2) multiply_tiles(band, levels, before, s, 1);
            else multiply_tiles(band, levels, before, s, 0);
            Sums *next = before;
            before = s, s = next;
        }
    finish(band, before);
    _tile_release();
}
