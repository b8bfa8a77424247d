/* The walk that all kernels share: quantize a band of rows into cells, then multiply its tiles with every block of weights.
 *
 * A cell is one pixel of one block of channels, CELL bytes per channel: a code or a share of a lookup table. Cells lie as
 * [channel block][row][padded width], padding included, so each (block, tap) of a tile is one constant offset from its first
 * pixel. The file that includes this one defines CELL and
 *   fill(job, zero, k, count, cells)              `count` cells of padding in block k
 *   build(job, n, k, x, count, cells, sums)       cells of `count` pixels; adds their sums of a to `sums` unless NULL
 *   arrange(band)                                 what the products need of the cells of a band; how many tiles they are
 *   arranged_bytes(job, shape)                    what it may take of scratch.arranged
 *   expand(job, shape, plane, from, to, weights)  blocks from..to of a plane as the tiles read them
 *   multiply(band)                                the products
 * and ALWAYS_SUMS(job), whether it needs the sums of a even where the weights have no shift.
 */
#ifndef DMQUANT_CONV_DRIVER_H
#define DMQUANT_CONV_DRIVER_H
#ifdef _OPENMP
#include <omp.h>
#endif
#include "conv/blocking.h"
#include "norm/layer_norm.h"

/* Output rows row..row+count of a band against blocks from..to of a plane of weights. */
typedef struct {
    const ConvParams *conv;
    const Plan *plan;
    const Scratch *scratch;
    int64_t row, count;
    int64_t tiles;                  /* as arrange() counted them */
    int64_t from, to, plane;
    const uint8_t *weights;         /* of block `from`, as expand() left them */
} Band;

static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells);
static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t count, uint8_t *cells, int32_t *sums);
static int64_t prepare_band(const Band *band);
static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights);
static void multiply_band(const Band *band);

INLINE int64_t first_input_pixel(const ConvParams *conv, int64_t n, int64_t h) {
    int64_t row = conv->width / conv->upsample, missing = conv->width - conv->last_width;
    return n * (conv->height / conv->upsample * row - missing) + h / conv->upsample * row;
}

INLINE int64_t count_input_pixels(const ConvParams *conv, int64_t h) { return h == conv->height - 1 ? conv->last_width : conv->width; }

/* Each of the first cells of a row `zoom` times, in place: from the last to the first. */
static void upsample_row(void *cells, int64_t bytes, int64_t count, int64_t upsample) {
    uint8_t *first = cells;
    for (int64_t p = upsample > 1 ? count - 1 : 0; p > 0; p--) memcpy(first + p * bytes, first + p / upsample * bytes, bytes);
}

/* The k-th of equal shares of the next row. */
INLINE void prefetch_share(const float *next, int64_t count, int64_t k) {
    for (int64_t i = k * count; i < (k + 1) * count; i += CACHE_LINE / 4) __builtin_prefetch(next + i, 0, 2);
}

/* `count` pixels of image n, without padding, into cells; `cells` are those of the first plane. */
static void quantize_blocks(const ConvParams *conv, const Plan *plan, int64_t n, const float *x, int64_t count, uint8_t *cells,
                         int32_t *sums) {
    for (int64_t k = 0; k * conv->block < conv->channels; k++, cells += plan->plane_bytes) {
        if (!is_staged(conv)) prefetch_share(x + count * conv->channels, conv->block * count, k);
        quantize_pixels(conv, n, k, x + k * conv->block, count, cells, sums);
    }
}

/* The same of pixels that lie in two pieces, of whole blocks of channels each. */
static void quantize_parts(const ConvParams *conv, const Plan *plan, int64_t n, int64_t pixel, int64_t count, uint8_t *cells, int32_t *sums) {
    ConvParams piece = *conv;
    piece.channels = x_channels(conv), piece.skip = NULL;
    quantize_blocks(&piece, plan, n, conv->x + pixel * piece.channels, count, cells, sums);
    cells += piece.channels / conv->block * plan->plane_bytes;
    piece.channels = conv->skip_channels;
    if (conv->skip) quantize_blocks(&piece, plan, n, conv->skip + pixel * piece.channels, count, cells, sums);
}

/* What is done to the channels from the given one on. */
INLINE Prologue prologue_of(const ConvParams *conv, int64_t n, int64_t from) {
    Prologue prologue = {.activation = conv->activation, .epsilon = conv->epsilon, .stride = conv->channels};
    int64_t first = n * conv->channels + from;
    if (conv->gain) prologue.gain = conv->gain + first, prologue.offset = conv->offset + first;
    if (conv->factor) prologue.factor = conv->factor + from;
    return prologue;
}

/* The same, from the given pixel on, of pixels that are prepared first, a part at a time. */
static void quantize_staged(const ConvParams *conv, const Plan *plan, int64_t n, int64_t pixel, int64_t count, uint8_t *cells,
                           int32_t *sums, float *normalized) {
    int64_t before = x_channels(conv), after = conv->skip_channels;
    Prologue first = prologue_of(conv, n, 0), last = prologue_of(conv, n, before);
    for (int64_t p = 0, part = staged_pixels(conv); p < count; p += part) {
        int64_t some = min(part, count - p), at = pixel + p;
        apply_prologue(&first, conv->x + at * input_channels(conv->activation, before), some, before, normalized);
        if (after) apply_prologue(&last, conv->skip + at * after, some, after, normalized + before);
        quantize_blocks(conv, plan, n, normalized, some, cells + p * plan->cell_bytes, sums ? sums + p : NULL);
    }
}

/* Input row h of image n, padding included, into row `slot` of the band. */
static void quantize_row(const ConvParams *conv, const Plan *plan, int64_t n, int64_t h, int64_t slot, Scratch *scratch) {
    float zero = conv->act_zero[n * conv->act_stride];
    int64_t width = h < 0 || h >= conv->height ? 0 : count_input_pixels(conv, h);
    int64_t left = width ? conv->pad_left : 0, right = plan->row_cells - left - width, read = width / conv->upsample;
    int32_t *sums = needs_pixel_sums(conv) ? scratch->sums + slot * plan->row_cells : NULL;
    uint8_t *row = scratch->cells + slot * plan->row_cells * plan->cell_bytes, *first = row + left * plan->cell_bytes;
    int64_t pixel = first_input_pixel(conv, n, h);
    if (sums) memset(sums, 0, plan->row_cells * 4);
    if (width && is_staged(conv))
        quantize_staged(conv, plan, n, pixel, read, first, sums ? sums + left : NULL, scratch->normalized);
    else if (width)
        quantize_parts(conv, plan, n, pixel, read, first, sums ? sums + left : NULL);
    for (int64_t k = 0; k < plan->channel_blocks; k++, row += plan->plane_bytes) {
        fill_padding(conv, zero, k, left, row);
        upsample_row(row + left * plan->cell_bytes, plan->cell_bytes, width, conv->upsample);
        fill_padding(conv, zero, k, right, row + (left + width) * plan->cell_bytes);
    }
    if (sums) upsample_row(sums + left, sizeof *sums, width, conv->upsample);
}

/* The input rows that output rows row..row+count need, each once; images follow each other without a seam. */
static void quantize_band(const ConvParams *conv, const Plan *plan, int64_t row, int64_t count, Scratch *scratch) {
    int64_t slot = 0, next = 0;
    for (int64_t r = 0; r < count; r++) {
        int64_t n = (row + r) / conv->out_height, h = (row + r) % conv->out_height;
        int64_t first = h * conv->stride_h - conv->pad_top;
        if (r == 0 || h == 0 || next < first) next = first;
        scratch->tops[r] = (int32_t)(slot - (next - first));
        for (; next < first + conv->kernel_h; next++) quantize_row(conv, plan, n, next, slot++, scratch);
    }
    uint8_t *end = scratch->cells + slot * plan->row_cells * plan->cell_bytes;
    for (int64_t k = 0; k < plan->channel_blocks; k++) fill_padding(conv, conv->act_zero[0], k, plan->shared, end + k * plan->plane_bytes);
    if (needs_pixel_sums(conv)) memset(scratch->sums + slot * plan->row_cells, 0, plan->shared * 4);
}

/* The sum of a under each output pixel of a row. */
static void sum_windows(const ConvParams *conv, const Plan *plan, const int32_t *sums, int64_t pixels, int32_t *window_sums) {
    for (int64_t p = 0; p < pixels; p++) {
        int32_t sum = 0;
        for (int64_t y = 0; y < conv->kernel_h; y++)
            for (int64_t x = 0; x < conv->kernel_w; x++) sum += sums[y * plan->row_cells + p * conv->stride_w + x];
        window_sums[p] = sum;
    }
}

/* Where output row r of a band begins, in pixels of `out`, and how many it has. A linear layer's last row may be shorter. */
INLINE int64_t first_output_pixel(const ConvParams *conv, int64_t r) {
    int64_t n = r / conv->out_height, h = r % conv->out_height, missing = conv->width - conv->last_width;
    return n * (conv->out_height * conv->out_width - missing) + h * conv->out_width;
}

INLINE int64_t count_output_pixels(const ConvParams *conv, int64_t r) {
    return conv->out_width - (r % conv->out_height == conv->out_height - 1 ? conv->width - conv->last_width : 0);
}

INLINE const float *bias_of(const ConvParams *conv, int64_t image) { return conv->bias ? conv->bias + image * conv->bias_stride : NULL; }

/* What the last plane adds to an output, or NULL. */
INLINE const float *residual_at(const ConvParams *conv, int64_t plane, const float *out) {
    return conv->residual && plane == conv->planes - 1 ? conv->residual + (out - conv->out) : NULL;
}

/* Output rows first..last against blocks from..to of outputs. */
static int work(const ConvParams *conv, const Plan *plan, int64_t first, int64_t last, int64_t from, int64_t to) {
    Scratch scratch;
    if (first >= last || from >= to) return 0;
    if (alloc_scratch(conv, plan, &scratch)) return 1;
    int64_t i = 0;
    for (int64_t k = 0; k < plan->channel_blocks; k++)
        for (int64_t y = 0; y < conv->kernel_h; y++)
            for (int64_t x = 0; x < conv->kernel_w; x++)
                scratch.offsets[i++] = (int32_t)(k * plan->plane_bytes + (y * plan->row_cells + x) * plan->cell_bytes);
    Band band = {.conv = conv, .plan = plan, .scratch = &scratch};
    int64_t held = -1;
    for (int64_t row = first; row < last; row += plan->band_rows) {
        int64_t count = min(plan->band_rows, last - row);
        quantize_band(conv, plan, row, count, &scratch);
        band.row = row, band.count = count;
        band.tiles = prepare_band(&band);
        for (int64_t plane = 0; plane < conv->planes; plane++)
            for (int64_t block = from; block < to; block += plan->group) {
                int64_t end = min(to, block + plan->group), name = plane * plan->output_blocks + block;
                const uint8_t *blocked = conv->weight + plane * conv->plane_bytes;
                if (held != name) band.weights = unpack_weights(conv, plan, blocked, block, end, scratch.weights);
                held = name;
                band.from = block, band.to = end, band.plane = plane;
                multiply_band(&band);
            }
    }
    return 0;
}

int dmquant_run(const ConvParams *conv) {
    if (!SUPPORTS(conv)) return 2;
    Plan plan = make_plan(conv);
    int64_t rows = conv->images * conv->out_height;
    int failed = 0;
    (void)rows;
#ifdef _OPENMP
    /* few rows: the threads share the outputs instead, and each quantizes the input for itself */
    int by_rows = rows >= 2 * conv->threads || rows >= plan.output_blocks;
    int64_t threads = min(conv->threads, by_rows ? rows : plan.output_blocks);
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : failed)
    {
        int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        if (by_rows)
            failed = work(conv, &plan, rows * t / all, rows * (t + 1) / all, 0, plan.output_blocks);
        else
            failed = work(conv, &plan, 0, rows, plan.output_blocks * t / all, plan.output_blocks * (t + 1) / all);
    }
#else
    failed = work(conv, &plan, 0, rows, 0, plan.output_blocks);
#endif
    return failed;
}
#endif
