/* For kernels that multiply one output row at a time: they define multiply_row(). */
#ifndef DMQUANT_CONV_ROW_DRIVER_H
#define DMQUANT_CONV_ROW_DRIVER_H
#include "conv/driver.h"

/* One output row of one image, and output blocks first_block..end_block of one plane. */
typedef struct {
    const ConvParams *conv;
    const Plan *plan;
    const uint8_t *cells;           /* of the first tap of the first pixel; the next pixel is stride_w cells away */
    const int32_t *tap_offsets;     /* bytes, [channel block][tap] */
    int64_t num_offsets;            /* channel blocks * taps */
    const uint8_t *weights;         /* of first_block */
    int64_t first_block, end_block;
    int64_t plane;
    const int32_t *window_sums;     /* (pixels), or NULL where they are not needed */
    float act_scale, act_zero;      /* of this image */
    const float *bias;              /* (outputs), of this image, or NULL */
    float *out;                     /* of the first pixel, output 0 */
    int64_t pixels;
} Row;

/* Computes the outputs of a row. */
static void multiply_row(const Row *row);

static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan) {
    (void)conv, (void)plan;
    return 0;
}

static int64_t prepare_band(const Band *band) { return band->num_rows; }

static void multiply_band(const Band *band) {
    const ConvParams *conv = band->conv;
    const Plan *plan = band->plan;
    for (int64_t r = 0; r < band->num_rows; r++) {
        int64_t image = (band->first_row + r) / conv->out_height, n = image * conv->act_stride;
        int64_t first_cell = band->scratch->input_rows[r] * plan->row_cells;
        Row row = {
            .conv = conv, .plan = plan, .plane = band->plane,
            .cells = band->scratch->cells + first_cell * plan->cell_bytes,
            .tap_offsets = band->scratch->tap_offsets, .num_offsets = plan->channel_blocks * plan->taps,
            .weights = band->weights, .first_block = band->first_block, .end_block = band->end_block,
            .act_scale = conv->act_scale[n], .act_zero = conv->act_zero[n], .bias = bias_of(conv, image),
            .out = conv->out + first_output_pixel(conv, band->first_row + r) * conv->outputs,
            .pixels = count_output_pixels(conv, band->first_row + r),
        };
        if (needs_pixel_sums(conv)) {
            sum_windows(conv, plan, band->scratch->pixel_sums + first_cell, row.pixels, band->scratch->window_sums);
            row.window_sums = band->scratch->window_sums;
        }
        multiply_row(&row);
    }
}
#endif
