/* How a job is cut into bands and blocks, and the memory that takes. A kernel may define what is asked for by #ifndef here. */
#ifndef DMQUANT_CONV_BLOCKING_H
#define DMQUANT_CONV_BLOCKING_H
#include "conv/params.h"
#include "simd/scratch.h"

#ifndef EXPANDED_BYTES              /* of an output block as the tiles read it */
#define EXPANDED_BYTES(plan) ((plan).channel_blocks * (plan).taps * conv->block * OUTPUTS)
#endif
#ifndef SUPPORTS                       /* whether the kernel is made for such a job */
#define SUPPORTS(conv) 1
#endif
#ifndef GROWTH                      /* of cells, where arrange() makes more of them */
#define GROWTH 1
#endif
#define OUTPUTS 32                  /* outputs of a block of weights */
#ifndef CELLS_BYTES
#define CELLS_BYTES (768 << 10)     /* of a band: it stays in a second-level cache */
#endif
#ifndef BAND_STEP                   /* of output rows */
#define BAND_STEP 1
#endif
#define PART_BYTES (16 << 10)       /* of pixels normalized at a time: they stay in a first-level cache until they are cells */
#define BAND_PIXELS 4096
#ifndef WEIGHTS_BYTES
#define WEIGHTS_BYTES (1 << 20)     /* of expanded weights */
#endif
#define SLACK 16                    /* cells behind the last one that a wide tile may read and ignore */

INLINE int has_prologue(const ConvParams *conv) { return conv->gain || conv->factor || conv->activation || conv->epsilon > 0; }
INLINE int64_t x_channels(const ConvParams *conv) { return conv->channels - conv->skip_channels; }
/* Whether pixels are written before they become cells: normalized, or in one piece. */
INLINE int is_staged(const ConvParams *conv) { return has_prologue(conv) || (conv->skip && x_channels(conv) % conv->block); }
/* Pixels that are normalized at a time. */
INLINE int64_t staged_pixels(const ConvParams *conv) { return max(4, PART_BYTES / (4 * conv->channels)); }
INLINE int needs_pixel_sums(const ConvParams *conv) { return conv->zero || ALWAYS_SUMS(conv); }

typedef struct {
    int64_t channel_blocks, output_blocks, taps;
    int64_t cell_bytes, row_cells, plane_bytes;    /* cells_wide: of a row; plane_bytes: of a channel block */
    int64_t shared;                                 /* cells of padding that end one row and begin the next one */
    int64_t band_rows, band_slots;                  /* output rows at a time, input rows they need at most */
    int64_t group;                                  /* output blocks expanded at a time */
    int64_t weight_bytes;                           /* of an expanded output block */
} Plan;

typedef struct {
    uint8_t *cells, *weights;
    int32_t *sums, *window_sums;            /* sums of a: of each input pixel, under each output pixel */
    int32_t *tops;                  /* first input row of each output row */
    int32_t *offsets;               /* of each (channel block, tap) from a tile's first cell */
    uint8_t *tile_buffer;              /* arranged_bytes() for what arrange() finds */
    float *normalized;              /* a part of an input row */
} Scratch;

static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan);

static Plan make_plan(const ConvParams *conv) {
    Plan plan;
    plan.channel_blocks = round_up(conv->channels, conv->block) / conv->block;
    plan.output_blocks = round_up(conv->outputs, OUTPUTS) / OUTPUTS;
    plan.taps = conv->kernel_h * conv->kernel_w;
    plan.cell_bytes = conv->block * CHANNEL_BYTES;
    plan.row_cells = max(conv->pad_left + conv->width, (conv->out_width - 1) * conv->stride_w + conv->kernel_w);
    /* no output begins in what is shared, or two would begin at one cell; rows of other images may have another zero point */
    plan.shared = min(conv->pad_left, plan.row_cells - conv->pad_left - conv->width);
    plan.shared = conv->act_stride ? 0 : min(plan.shared, plan.row_cells - (conv->out_width - 1) * conv->stride_w - 1);
    plan.row_cells -= plan.shared;
    int64_t row_bytes = plan.row_cells * plan.cell_bytes * plan.channel_blocks * GROWTH;
    int64_t step = min(conv->stride_h, conv->kernel_h);
    plan.band_rows = max(1, (CELLS_BYTES / row_bytes - conv->kernel_h) / step);
    plan.band_rows = min(plan.band_rows, conv->images * conv->out_height);
    plan.band_rows = min(plan.band_rows, max(1, BAND_PIXELS / conv->out_width));
    plan.band_rows = round_up(plan.band_rows, BAND_STEP);
    plan.band_slots = plan.band_rows * step + (plan.band_rows / conv->out_height + 2) * conv->kernel_h;
    plan.plane_bytes = (plan.band_slots * plan.row_cells + plan.shared) * plan.cell_bytes;
    plan.plane_bytes += plan.plane_bytes / CACHE_LINE % 2 ? 0 : CACHE_LINE;   /* odd in lines: planes of one pixel fall into different sets */
    plan.weight_bytes = EXPANDED_BYTES(plan);
    plan.group = min(plan.output_blocks, max(1, WEIGHTS_BYTES / plan.weight_bytes));
    return plan;
}

static int alloc_scratch(const ConvParams *conv, const Plan *plan, Scratch *scratch) {
    int64_t cells = round_up(plan->plane_bytes * plan->channel_blocks + SLACK * plan->cell_bytes * conv->stride_w, CACHE_LINE);
    int64_t weights = round_up(plan->weight_bytes * plan->group, CACHE_LINE);
    int64_t sums = round_up((plan->band_slots * plan->row_cells + plan->shared) * 4, CACHE_LINE), window_sums = round_up(plan->band_rows * conv->out_width * 4, CACHE_LINE);
    int64_t tops = round_up(plan->band_rows * 4, CACHE_LINE), offsets = round_up(plan->channel_blocks * plan->taps * 4, CACHE_LINE);
    int64_t tile_buffer = round_up(tile_buffer_bytes(conv, plan), CACHE_LINE);
    int64_t normalized = is_staged(conv) ? round_up(staged_pixels(conv) * conv->channels * 4, CACHE_LINE) : 0;
    uint8_t *next = alloc(cells + weights + sums + window_sums + tops + offsets + tile_buffer + normalized);
    if (!next) return 1;
    scratch->cells = carve(&next, cells);
    scratch->weights = carve(&next, weights);
    scratch->sums = carve(&next, sums);
    scratch->window_sums = carve(&next, window_sums);
    scratch->tops = carve(&next, tops);
    scratch->offsets = carve(&next, offsets);
    scratch->tile_buffer = carve(&next, tile_buffer);
    scratch->normalized = carve(&next, normalized);
    return 0;
}
#endif
