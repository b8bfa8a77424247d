/* How a convolution is cut into bands of rows and blocks of channels, and the scratch memory that this takes.
 *
 * A cell is one pixel of one block of channels, CHANNEL_BYTES bytes per channel (a code, or a part of a lookup table). A kernel
 * may define the macros that stand between #ifndef and #endif before it includes this header. */
#ifndef DMQUANT_CONV_BLOCKING_H
#define DMQUANT_CONV_BLOCKING_H
#include "conv/params.h"
#include "simd/scratch.h"

#define OUTPUTS 32                  /* outputs of a block of weights */
#define STAGED_BYTES (16 << 10)     /* of pixels that the prologue writes at a time: they are quantized from the L1 cache */
#define BAND_PIXELS 4096            /* output pixels of a band, at most (but at least BAND_STEP rows) */
#define SLACK 16                    /* cells behind the last one that a kernel may read; their products are ignored */

#ifndef UNPACKED_BYTES              /* bytes of an unpacked block of weights; `plan` is a Plan, `conv` is in scope */
#define UNPACKED_BYTES(plan) ((plan).channel_blocks * (plan).taps * conv->channel_block * OUTPUTS)
#endif
#ifndef SUPPORTS                    /* whether the kernel computes this convolution */
#define SUPPORTS(conv) 1
#endif
#ifndef BUFFER_RATIO                /* bytes of cells and tile buffer together, in bytes of cells */
#define BUFFER_RATIO 1
#endif
#ifndef BAND_BYTES                  /* of the cells of a band (and its tile buffer): they stay in the L2 cache */
#define BAND_BYTES (768 << 10)
#endif
#ifndef BAND_STEP                   /* output rows: bands have a multiple of it */
#define BAND_STEP 1
#endif
#ifndef GROUP_BYTES                 /* of the weights that are unpacked at a time */
#define GROUP_BYTES (1 << 20)
#endif

/* Pixels with a prologue are written to scratch->staged before they are quantized. */
INLINE int has_prologue(const ConvParams *conv) { return conv->gain || conv->factor || conv->activation || conv->epsilon > 0; }

/* How many pixels are staged at a time. */
INLINE int64_t staged_pixels(const ConvParams *conv) { return max(4, STAGED_BYTES / (4 * conv->channels)); }

/* Whether sums of a over channels are needed: for shifts of weights, or by the kernel itself. */
INLINE int needs_pixel_sums(const ConvParams *conv) { return conv->zero || ALWAYS_SUMS(conv); }

typedef struct {
    int64_t channel_blocks, output_blocks;
    int64_t taps;                   /* K = kernel_h * kernel_w */
    int64_t cell_bytes;
    int64_t row_cells;              /* from one row of cells to the next, in cells */
    int64_t block_bytes;            /* from one block of channels to the next, in bytes */
    int64_t shared_cells;           /* padding right of a row that is also the padding left of the next row */
    int64_t band_rows;              /* output rows of a band */
    int64_t band_input_rows;        /* input rows that these need, at most */
    int64_t group_blocks;           /* blocks of weights that are unpacked at a time */
    int64_t weight_bytes;           /* of one unpacked block of weights */
} Plan;

/* Arrays of one thread; each begins at a cache line. Cells are [channel block][input row][row_cells][cell_bytes]. */
typedef struct {
    uint8_t *cells;
    uint8_t *weights;               /* group_blocks unpacked blocks */
    int32_t *pixel_sums;            /* a summed over C, for each input pixel of a band: [input row][row_cells] */
    int32_t *window_sums;           /* a summed over C and K, for each output pixel of a band */
    int32_t *input_rows;            /* for each output row of a band: the row of cells under its first tap */
    int32_t *tap_offsets;           /* [channel block][K]: bytes from the cell of a pixel's first tap to that of this tap */
    uint8_t *tile_buffer;           /* tile_buffer_bytes() for prepare_band() */
    float *staged;                  /* (staged_pixels, C): outputs of the prologue */
} Scratch;

/* Bytes that prepare_band() needs; defined by the kernel. */
static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan);

static Plan make_plan(const ConvParams *conv) {
    Plan plan;
    plan.channel_blocks = round_up(conv->channels, conv->channel_block) / conv->channel_block;
    plan.output_blocks = round_up(conv->outputs, OUTPUTS) / OUTPUTS;
    plan.taps = conv->kernel_h * conv->kernel_w;
    plan.cell_bytes = conv->channel_block * CHANNEL_BYTES;
    plan.row_cells = max(conv->pad_left + conv->width, (conv->out_width - 1) * conv->stride_w + conv->kernel_w);
    /* No window may begin in shared cells, or windows of two rows would begin at the same one. With a grid for each image nothing
     * is shared: the padding of the next image may have another zero point. */
    int64_t last_window = (conv->out_width - 1) * conv->stride_w;
    plan.shared_cells = min(conv->pad_left, plan.row_cells - conv->pad_left - conv->width);
    plan.shared_cells = conv->act_stride ? 0 : min(plan.shared_cells, plan.row_cells - last_window - 1);
    plan.row_cells -= plan.shared_cells;
    int64_t row_bytes = plan.row_cells * plan.cell_bytes * plan.channel_blocks * BUFFER_RATIO;
    int64_t step = min(conv->stride_h, conv->kernel_h);
    plan.band_rows = max(1, (BAND_BYTES / row_bytes - conv->kernel_h) / step);
    plan.band_rows = min(plan.band_rows, conv->images * conv->out_height);
    plan.band_rows = min(plan.band_rows, max(1, BAND_PIXELS / conv->out_width));
    plan.band_rows = round_up(plan.band_rows, BAND_STEP);
    plan.band_input_rows = plan.band_rows * step + (plan.band_rows / conv->out_height + 2) * conv->kernel_h;
    plan.block_bytes = (plan.band_input_rows * plan.row_cells + plan.shared_cells) * plan.cell_bytes;
    /* an odd number of cache lines: the blocks of one pixel fall into different sets of the cache */
    plan.block_bytes += plan.block_bytes / CACHE_LINE % 2 ? 0 : CACHE_LINE;
    plan.weight_bytes = UNPACKED_BYTES(plan);
    plan.group_blocks = min(plan.output_blocks, max(1, GROUP_BYTES / plan.weight_bytes));
    return plan;
}

INLINE int64_t whole_lines(int64_t bytes) { return round_up(bytes, CACHE_LINE); }

/* Returns 0, or 1 if memory runs out. */
static int alloc_scratch(const ConvParams *conv, const Plan *plan, Scratch *scratch) {
    int64_t cells = whole_lines(plan->block_bytes * plan->channel_blocks + SLACK * plan->cell_bytes * conv->stride_w);
    int64_t weights = whole_lines(plan->weight_bytes * plan->group_blocks);
    int64_t pixel_sums = whole_lines((plan->band_input_rows * plan->row_cells + plan->shared_cells) * 4);
    int64_t window_sums = whole_lines(plan->band_rows * conv->out_width * 4);
    int64_t input_rows = whole_lines(plan->band_rows * 4), tap_offsets = whole_lines(plan->channel_blocks * plan->taps * 4);
    int64_t tile_buffer = whole_lines(tile_buffer_bytes(conv, plan));
    int64_t staged = has_prologue(conv) ? whole_lines(staged_pixels(conv) * conv->channels * 4) : 0;
    uint8_t *next = alloc(cells + weights + pixel_sums + window_sums + input_rows + tap_offsets + tile_buffer + staged);
    if (!next) return 1;
    scratch->cells = carve(&next, cells);
    scratch->weights = carve(&next, weights);
    scratch->pixel_sums = carve(&next, pixel_sums);
    scratch->window_sums = carve(&next, window_sums);
    scratch->input_rows = carve(&next, input_rows);
    scratch->tap_offsets = carve(&next, tap_offsets);
    scratch->tile_buffer = carve(&next, tile_buffer);
    scratch->staged = carve(&next, staged);
    return 0;
}
#endif
