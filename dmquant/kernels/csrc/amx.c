/* Products by AMX: a tile of 16 cells of 64 u8 codes times a tile of 64 s8 levels of 16 outputs, 2 x 2 tiles at a time.
 *
 * Cells lie one behind the other over the whole band, so a tile may run over the end of a row: what it computes of the padding
 * is thrown away, and images of 4 or 8 pixels still fill it. Blocks of 64 channels only.
 * Needs AMX-TILE and AMX-INT8, AVX-512 F, BW, VL, DQ for what stands around them, and Linux, which is asked for the tiles. */
#include "levels512.h"
#include "epilogue.h"
#include "tiles.h"

typedef struct {
    int32_t position, image;        /* of its first cell, in cells */
    int32_t pixel[16];              /* of the band, -1 where a cell is no output */
} Tile;

static int64_t arranged_bytes(const Job *job, const Shape *s) { return s->band_rows * job->out_width * (int64_t)sizeof(Tile); }

/* Which cells go into which tile; also the sums of a under each pixel. */
static int64_t arrange(const Band *band) {
    Tile *tiles = (Tile *)band->scratch->arranged;
    const Job *job = band->job;
    int64_t count = 0, stride = job->stride_w, pixel = 0;
    for (int64_t r = 0; r < band->count; r++) {
        int64_t top = band->scratch->tops[r] * band->shape->cells_wide, pixels = output_pixels(job, band->row + r);
        int32_t image = job->act_stride || job->bias_stride ? (int32_t)((band->row + r) / job->out_height) : 0;
        if (job->zero) sum_box(job, band->shape, band->scratch->sums + top, pixels, band->scratch->box + pixel);
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

/* Sums of 16 cells x 16 outputs -> floats. */
static void put_tile(const Band *band, const Tile *tile, const int32_t *sums, int64_t output) {
    const Job *job = band->job;
    int64_t n = tile->image * job->act_stride;
    const float *bias = bias_of(job, tile->image);
    Outputs o = outputs_of(job, band->plane, output, job->act_scale[n], job->act_zero[n], bias);
    if (!o.mask) return;
    float *first = job->out + output_pixel(job, band->row) * job->outputs + output;
    const int32_t *box = band->scratch->box;
    int64_t outputs = job->outputs;
    for (int i = 0; i < 16; i++) {
        int64_t pixel = tile->pixel[i];
        if (pixel < 0) continue;
        put(&o, _mm512_sub_epi32(_mm512_load_si512(sums + 16 * i), o.excess), box + pixel, first + pixel * outputs);
    }
}

/* What put_tile will read and write of 32 outputs, while they are multiplied. */
static void fetch_tile(const Band *band, const Tile *tile, int64_t output) {
    const Job *job = band->job;
    int64_t first = output_pixel(job, band->row) * job->outputs + output, outputs = job->outputs;
    for (int i = 0; i < 16; i++) {
        int64_t at = first + most(0, tile->pixel[i]) * outputs;
        __builtin_prefetch(job->out + at, 1);
        __builtin_prefetch(job->out + at + 16, 1);
        if (!job->residual) continue;
        __builtin_prefetch(job->residual + at);
        __builtin_prefetch(job->residual + at + 16);
    }
}

/* Two tiles of cells against 32 outputs. */
static void multiply_pair(const Band *band, const Tile *tiles, const uint8_t *levels, int64_t block) {
    int32_t sums[4][256] __attribute__((aligned(64)));
    const uint8_t *first = band->scratch->cells + tiles[0].position * 64, *second = band->scratch->cells + tiles[1].position * 64;
    int64_t count = band->shape->channel_blocks * band->shape->taps, step = 64 * band->job->stride_w;
    fetch_tile(band, tiles, block * OUTPUTS);
    fetch_tile(band, tiles + 1, block * OUTPUTS);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < count; i++, levels += 2048) {
        int64_t offset = band->scratch->offsets[i];
        _tile_stream_loadd(6, levels, 128);
        _tile_loadd(4, first + offset, step);
        _tile_stream_loadd(7, levels + 64, 128);
        _tile_loadd(5, second + offset, step);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
        if (i % STRETCH == STRETCH - 1) _tile_stored(0, sums[0], 64);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    SETTLE;
    for (int i = 0; i < 4; i++) put_tile(band, &tiles[i / 2], sums[i], block * OUTPUTS + i % 2 * 16);
}

/* One tile of cells against 32 outputs. */
static void multiply_single(const Band *band, const Tile *tile, const uint8_t *levels, int64_t block) {
    int32_t sums[2][256] __attribute__((aligned(64)));
    const uint8_t *cells = band->scratch->cells + tile->position * 64;
    int64_t count = band->shape->channel_blocks * band->shape->taps, step = 64 * band->job->stride_w;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < count; i++, levels += 2048) {
        _tile_stream_loadd(6, levels, 128);
        _tile_loadd(4, cells + band->scratch->offsets[i], step);
        _tile_stream_loadd(7, levels + 64, 128);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (i % STRETCH == STRETCH - 1) _tile_stored(0, sums[0], 64);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    SETTLE;
    for (int i = 0; i < 2; i++) put_tile(band, tile, sums[i], block * OUTPUTS + i * 16);
}

static void multiply(const Band *band) {
    const Tile *tiles = (const Tile *)band->scratch->arranged;
    configure();
    SETTLE;
    for (int64_t i = 0; i < band->tiles; i += 2)
        for (int64_t block = band->from; block < band->to; block++) {
            const uint8_t *levels = band->weights + (block - band->from) * band->shape->weight_bytes;
            if (i + 1 < band->tiles) multiply_pair(band, tiles + i, levels, block);
            else multiply_single(band, tiles + i, levels, block);
        }
    _tile_release();
}
