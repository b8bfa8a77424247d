/* For kernels that walk one output row at a time: they define row_of_tiles(row). */
#ifndef DMQUANT_CONV_ROW_DRIVER_H
#define DMQUANT_CONV_ROW_DRIVER_H
#include "conv/driver.h"

/* One output row against blocks from..to of outputs. */
typedef struct {
    const Job *job;
    const Shape *shape;
    const uint8_t *cells;           /* of the first tap of the first pixel */
    const int32_t *offsets;         /* of each (channel block, tap) */
    int64_t count;                  /* of offsets */
    const uint8_t *weights;         /* of block `from` */
    int64_t from, to;
    int64_t plane;
    const int32_t *box;             /* NULL without shifts */
    float act_scale, act_zero;
    const float *bias;              /* of this image, or NULL */
    float *out;                     /* of the first pixel, output 0 */
    int64_t pixels;
} Row;

static void row_of_tiles(const Row *row);

static int64_t arranged_bytes(const Job *job, const Shape *s) {
    (void)job, (void)s;
    return 0;
}

static int64_t arrange(const Band *band) { return band->count; }

static void multiply(const Band *band) {
    const Job *job = band->job;
    const Shape *s = band->shape;
    for (int64_t r = 0; r < band->count; r++) {
        int64_t image = (band->row + r) / job->out_height, n = image * job->act_stride;
        int64_t top = band->scratch->tops[r] * s->cells_wide;
        Row row = {
            .job = job, .shape = s, .cells = band->scratch->cells + top * s->cell_bytes, .offsets = band->scratch->offsets,
            .count = s->channel_blocks * s->taps, .weights = band->weights, .from = band->from, .to = band->to,
            .plane = band->plane, .act_scale = job->act_scale[n], .act_zero = job->act_zero[n], .bias = bias_of(job, image),
            .out = job->out + output_pixel(job, band->row + r) * job->outputs, .pixels = output_pixels(job, band->row + r),
        };
        if (needs_sums(job)) {
            sum_box(job, s, band->scratch->sums + top, row.pixels, band->scratch->box);
            row.box = band->scratch->box;
        }
        row_of_tiles(&row);
    }
}
#endif
