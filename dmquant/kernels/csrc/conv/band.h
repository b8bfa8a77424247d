/* The input rows of a band as cells: quantized, upsampled and padded.
 *
 * The kernel defines how a cell is made: fill_padding() and quantize_pixels(). */
#ifndef DMQUANT_CONV_BAND_H
#define DMQUANT_CONV_BAND_H
#include "conv/blocking.h"
#include "norm/layer_norm.h"

/* Writes `count` cells of padding (a = 0) of channel block k. zero: the zero point of the activations. */
static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells);

/* Writes the cells of `count` pixels of image n in channel block k. x: the block's first channel of the first pixel, pixels are
 * `stride` floats apart. Adds to sums[pixel] the sum of a over the channels of the block, unless sums is NULL. */
static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums);

/* The first pixel of row h (after upsampling) of image n, counted in pixels of x. The last row of an image may be shorter. */
INLINE int64_t first_input_pixel(const ConvParams *conv, int64_t n, int64_t h) {
    int64_t row = conv->width / conv->upsample, missing = conv->width - conv->last_width;
    return n * (conv->height / conv->upsample * row - missing) + h / conv->upsample * row;
}

INLINE int64_t count_input_pixels(const ConvParams *conv, int64_t h) {
    return h == conv->height - 1 ? conv->last_width : conv->width;
}

/* Repeats each of the first count / upsample items of `bytes` bytes `upsample` times, in place, from the last to the first. */
static void upsample_row(void *items, int64_t bytes, int64_t count, int64_t upsample) {
    uint8_t *first = items;
    for (int64_t p = upsample > 1 ? count - 1 : 0; p > 0; p--) memcpy(first + p * bytes, first + p / upsample * bytes, bytes);
}

/* Prefetches floats k * count to (k + 1) * count of the next row into the L2 cache. */
INLINE void prefetch_share(const float *next, int64_t count, int64_t k) {
    for (int64_t i = k * count; i < (k + 1) * count; i += CACHE_LINE / 4) __builtin_prefetch(next + i, 0, 2);
}

/* Quantizes all channel blocks of `count` pixels of image n. x: (count, channels), pixels `stride` floats apart; cells, sums: of
 * the first pixel. */
static void quantize_blocks(const ConvParams *conv, const Plan *plan, int64_t n, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums) {
    for (int64_t k = 0; k * conv->channel_block < conv->channels; k++, cells += plan->block_bytes) {
        if (!has_prologue(conv)) prefetch_share(x + count * stride, conv->channel_block * count, k);
        quantize_pixels(conv, n, k, x + k * conv->channel_block, stride, count, cells, sums);
    }
}

INLINE Prologue prologue_of(const ConvParams *conv, int64_t n) {
    Prologue prologue = {
        .factor = conv->factor, .activation = conv->activation, .stride = conv->pixel_stride, .epsilon = conv->epsilon,
    };
    if (conv->gain) prologue.gain = conv->gain + n * conv->channels, prologue.offset = conv->offset + n * conv->channels;
    return prologue;
}

/* Applies the prologue to `count` pixels x of image n and quantizes them, staged_pixels() at a time. */
static void quantize_staged(const ConvParams *conv, const Plan *plan, int64_t n, const float *x, int64_t count, uint8_t *cells,
                            int32_t *sums, float *staged) {
    Prologue prologue = prologue_of(conv, n);
    for (int64_t p = 0, step = staged_pixels(conv); p < count; p += step) {
        int64_t pixels = min(step, count - p);
        apply_prologue(&prologue, x + p * conv->pixel_stride, pixels, conv->channels, staged);
        quantize_blocks(conv, plan, n, staged, conv->channels, pixels, cells + p * plan->cell_bytes, sums ? sums + p : NULL);
    }
}

/* Writes input row h of image n, padding included, to row `slot` of the cells. Rows outside the image are padding. */
static void quantize_row(const ConvParams *conv, const Plan *plan, int64_t n, int64_t h, int64_t slot, Scratch *scratch) {
    float zero = conv->act_zero[n * conv->act_stride];
    int64_t width = h < 0 || h >= conv->height ? 0 : count_input_pixels(conv, h);
    int64_t left = width ? conv->pad_left : 0, right = plan->row_cells - left - width, read = width / conv->upsample;
    int32_t *sums = needs_pixel_sums(conv) ? scratch->pixel_sums + slot * plan->row_cells : NULL;
    uint8_t *row = scratch->cells + slot * plan->row_cells * plan->cell_bytes, *first = row + left * plan->cell_bytes;
    const float *x = conv->x + first_input_pixel(conv, n, h) * conv->pixel_stride;
    if (sums) memset(sums, 0, plan->row_cells * 4);
    if (width && has_prologue(conv))
        quantize_staged(conv, plan, n, x, read, first, sums ? sums + left : NULL, scratch->staged);
    else if (width)
        quantize_blocks(conv, plan, n, x, conv->pixel_stride, read, first, sums ? sums + left : NULL);
    for (int64_t k = 0; k < plan->channel_blocks; k++, row += plan->block_bytes) {
        fill_padding(conv, zero, k, left, row);
        upsample_row(row + left * plan->cell_bytes, plan->cell_bytes, width, conv->upsample);
        fill_padding(conv, zero, k, right, row + (left + width) * plan->cell_bytes);
    }
    if (sums) upsample_row(sums + left, sizeof *sums, width, conv->upsample);
}

/* Quantizes the input rows that output rows row..row+count need, each once. Output rows are counted through all images; the rows
 * of the next image follow those of the one before. Sets scratch->input_rows. */
static void quantize_band(const ConvParams *conv, const Plan *plan, int64_t row, int64_t count, Scratch *scratch) {
    int64_t slot = 0, next = 0;
    for (int64_t r = 0; r < count; r++) {
        int64_t n = (row + r) / conv->out_height, h = (row + r) % conv->out_height;
        int64_t first = h * conv->stride_h - conv->pad_top;
        if (r == 0 || h == 0 || next < first) next = first;
        scratch->input_rows[r] = (int32_t)(slot - (next - first));
        for (; next < first + conv->kernel_h; next++) quantize_row(conv, plan, n, next, slot++, scratch);
    }
    uint8_t *end = scratch->cells + slot * plan->row_cells * plan->cell_bytes;
    for (int64_t k = 0; k < plan->channel_blocks; k++)
        fill_padding(conv, conv->act_zero[0], k, plan->shared_cells, end + k * plan->block_bytes);
    if (needs_pixel_sums(conv)) memset(scratch->pixel_sums + slot * plan->row_cells, 0, plan->shared_cells * 4);
}

/* Sums a over the window of each of `pixels` output pixels of a row. pixel_sums: of the row's first tap. */
static void sum_windows(const ConvParams *conv, const Plan *plan, const int32_t *pixel_sums, int64_t pixels,
                        int32_t *window_sums) {
    for (int64_t p = 0; p < pixels; p++) {
        int32_t sum = 0;
        for (int64_t y = 0; y < conv->kernel_h; y++)
            for (int64_t x = 0; x < conv->kernel_w; x++) sum += pixel_sums[y * plan->row_cells + p * conv->stride_w + x];
        window_sums[p] = sum;
    }
}
#endif
