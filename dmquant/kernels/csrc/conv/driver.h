/* The loops that all kernels of convolutions share. For each band of output rows they quantize the input rows into cells, then
 * for each plane and each group of output blocks they unpack the weights and multiply.
 *
 * Cells lie as [channel block][input row][row_cells], padding included, so each (channel block, tap) of an output pixel is at a
 * constant offset from the pixel's first tap. There is no im2col.
 *
 * A kernel defines, before it includes a header of conv/:
 *   CHANNEL_BYTES, ALWAYS_SUMS(conv)    bytes of a channel in a cell; whether it reads window sums although no weight has a shift
 *   and, if need be, the macros of blocking.h
 * and the functions that are declared in band.h and below. */
#ifndef DMQUANT_CONV_DRIVER_H
#define DMQUANT_CONV_DRIVER_H
#ifdef _OPENMP
#include <omp.h>
#endif
#include "conv/band.h"

/* Output rows first_row..first_row+num_rows, counted through all images, and output blocks first_block..end_block of a plane. */
typedef struct {
    const ConvParams *conv;
    const Plan *plan;
    const Scratch *scratch;
    int64_t first_row, num_rows;
    int64_t tiles;                  /* what prepare_band() returned */
    int64_t first_block, end_block, plane;
    const uint8_t *weights;         /* of first_block, as unpack_weights() returned them */
} Band;

/* Writes to scratch->tile_buffer what multiply_band() needs besides the cells. Returns the number of tiles. */
static int64_t prepare_band(const Band *band);

/* Unpacks output blocks from..to of a plane into `weights`, or leaves them where they are. Returns the first block. */
static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights);

/* Computes the outputs of a band; from the second plane on adds to them. */
static void multiply_band(const Band *band);

/* The first pixel of output row r, in pixels of out. The last row of an image of a linear layer may be shorter. */
INLINE int64_t first_output_pixel(const ConvParams *conv, int64_t r) {
    int64_t n = r / conv->out_height, h = r % conv->out_height, missing = conv->width - conv->last_width;
    return n * (conv->out_height * conv->out_width - missing) + h * conv->out_width;
}

INLINE int64_t count_output_pixels(const ConvParams *conv, int64_t r) {
    return conv->out_width - (r % conv->out_height == conv->out_height - 1 ? conv->width - conv->last_width : 0);
}

/* The bias of an image (outputs), or NULL. */
INLINE const float *bias_of(const ConvParams *conv, int64_t image) {
    return conv->bias ? conv->bias + image * conv->bias_stride : NULL;
}

/* The residual of the output at `out`, which the last plane adds; NULL for other planes and where there is none. */
INLINE const float *residual_at(const ConvParams *conv, int64_t plane, const float *out) {
    return conv->residual && plane == conv->planes - 1 ? conv->residual + (out - conv->out) : NULL;
}

/* Computes output rows first..last for output blocks from..to, on one thread. Returns 0, or 1 if memory runs out. */
static int convolve(const ConvParams *conv, const Plan *plan, int64_t first, int64_t last, int64_t from, int64_t to) {
    Scratch scratch;
    if (first >= last || from >= to) return 0;
    if (alloc_scratch(conv, plan, &scratch)) return 1;
    int64_t i = 0;
    for (int64_t k = 0; k < plan->channel_blocks; k++)
        for (int64_t y = 0; y < conv->kernel_h; y++)
            for (int64_t x = 0; x < conv->kernel_w; x++)
                scratch.tap_offsets[i++] = (int32_t)(k * plan->block_bytes + (y * plan->row_cells + x) * plan->cell_bytes);
    Band band = {.conv = conv, .plan = plan, .scratch = &scratch};
    int64_t unpacked = -1;          /* the group whose weights are unpacked: often the only one */
    for (int64_t row = first; row < last; row += plan->band_rows) {
        int64_t count = min(plan->band_rows, last - row);
        quantize_band(conv, plan, row, count, &scratch);
        band.first_row = row, band.num_rows = count;
        band.tiles = prepare_band(&band);
        for (int64_t plane = 0; plane < conv->planes; plane++)
            for (int64_t block = from; block < to; block += plan->group_blocks) {
                int64_t end = min(to, block + plan->group_blocks), group = plane * plan->output_blocks + block;
                const uint8_t *packed = conv->weight + plane * conv->plane_bytes;
                if (unpacked != group) band.weights = unpack_weights(conv, plan, packed, block, end, scratch.weights);
                unpacked = group;
                band.first_block = block, band.end_block = end, band.plane = plane;
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
    /* With few rows the threads share the output blocks instead, and each quantizes the whole input. */
    int by_rows = rows >= 2 * conv->threads || rows >= plan.output_blocks;
    int64_t threads = min(conv->threads, by_rows ? rows : plan.output_blocks);
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : failed)
    {
        int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        if (by_rows)
            failed = convolve(conv, &plan, rows * t / all, rows * (t + 1) / all, 0, plan.output_blocks);
        else
            failed = convolve(conv, &plan, 0, rows, plan.output_blocks * t / all, plan.output_blocks * (t + 1) / all);
    }
#else
    failed = convolve(conv, &plan, 0, rows, 0, plan.output_blocks);
#endif
    return failed;
}
#endif
