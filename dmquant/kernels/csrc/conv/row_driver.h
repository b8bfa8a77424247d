/* For kernels that walk one output row at a time: they define row_of_tiles(row). */
#ifndef DMQUANT_CONV_ROW_DRIVER_H
#define DMQUANT_CONV_ROW_DRIVER_H
#include "conv/driver.h"

/* One output row against blocks from..to of outputs. */
typedef struct {
    const ConvParams *conv;
    const Plan *plan;
    const uint8_t *cells;           /* of the first tap of the first pixel */
    const int32_t *offsets;         /* of each (channel block, tap) */
    int64_t count;                  /* of offsets */
    const uint8_t *weights;         /* of block `from` */
    int64_t from, to;
    int64_t plane;
    const int32_t *window_sums;             /* NULL without shifts */
    float act_scale, act_zero;
    const float *bias;              /* of this image, or NULL */
    float *out;                     /* of the first pixel, output 0 */
    int64_t pixels;
} Row;

static void multiply_row(const Row *row);

static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan) {
    (void)conv, (void)plan;
    return 0;
}

static int64_t prepare_band(const Band *band) { return band->count; }

static void multiply_band(const Band *band) {
    const ConvParams *conv = band->conv;
    const Plan *plan = band->plan;
    for (int64_t r = 0; r < band->count; r++) {
        int64_t image = (band->row + r) / conv->out_height, n = image * conv->act_stride;
        int64_t top = band->scratch->tops[r] * plan->row_cells;
        Row row = {
            .conv = conv, .plan = plan, .cells = band->scratch->cells + top * plan->cell_bytes, .offsets = band->scratch->offsets,
            .count = plan->channel_blocks * plan->taps, .weights = band->weights, .from = band->from, .to = band->to,
            .plane = band->plane, .act_scale = conv->act_scale[n], .act_zero = conv->act_zero[n], .bias = bias_of(conv, image),
            .out = conv->out + first_output_pixel(conv, band->row + r) * conv->outputs, .pixels = count_output_pixels(conv, band->row + r),
        };
        if (needs_pixel_sums(conv)) {
            sum_windows(conv, plan, band->scratch->sums + top, row.pixels, band->scratch->window_sums);
            row.window_sums = band->scratch->window_sums;
        }
        multiply_row(&row);
    }
}
#endif
