/* How a job is cut into bands and blocks, and the memory that takes. A kernel may define what is asked for by #ifndef here. */
#ifndef DMQUANT_CONV_BLOCKING_H
#define DMQUANT_CONV_BLOCKING_H
#include "conv/params.h"
#include "simd/scratch.h"

#ifndef EXPANDED_BYTES              /* of an output block as the tiles read it */
#define EXPANDED_BYTES(s) ((s).channel_blocks * (s).taps * job->block * OUTPUTS)
#endif
#ifndef TAKES                       /* whether the kernel is made for such a job */
#define TAKES(job) 1
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

INLINE int is_normalized(const Job *job) { return job->gain || job->factor || job->activate || job->epsilon > 0; }
INLINE int64_t channels_before(const Job *job) { return job->channels - job->beside_channels; }
/* Whether pixels are written before they become cells: normalized, or in one piece. */
INLINE int is_prepared(const Job *job) { return is_normalized(job) || (job->beside && channels_before(job) % job->block); }
/* Pixels that are normalized at a time. */
INLINE int64_t part_of(const Job *job) { return most(4, PART_BYTES / (4 * job->channels)); }
INLINE int needs_sums(const Job *job) { return job->zero || ALWAYS_SUMS(job); }

typedef struct {
    int64_t channel_blocks, output_blocks, taps;
    int64_t cell_bytes, cells_wide, plane_bytes;    /* cells_wide: of a row; plane_bytes: of a channel block */
    int64_t shared;                                 /* cells of padding that end one row and begin the next one */
    int64_t band_rows, band_slots;                  /* output rows at a time, input rows they need at most */
    int64_t group;                                  /* output blocks expanded at a time */
    int64_t weight_bytes;                           /* of an expanded output block */
} Shape;

typedef struct {
    uint8_t *cells, *weights;
    int32_t *sums, *box;            /* sums of a: of each input pixel, under each output pixel */
    int32_t *tops;                  /* first input row of each output row */
    int32_t *offsets;               /* of each (channel block, tap) from a tile's first cell */
    uint8_t *arranged;              /* arranged_bytes() for what arrange() finds */
    float *normalized;              /* a part of an input row */
} Scratch;

static int64_t arranged_bytes(const Job *job, const Shape *s);

static Shape measure(const Job *job) {
    Shape s;
    s.channel_blocks = up(job->channels, job->block) / job->block;
    s.output_blocks = up(job->outputs, OUTPUTS) / OUTPUTS;
    s.taps = job->kernel_h * job->kernel_w;
    s.cell_bytes = job->block * CELL;
    s.cells_wide = most(job->pad_left + job->width, (job->out_width - 1) * job->stride_w + job->kernel_w);
    /* no output begins in what is shared, or two would begin at one cell; rows of other images may have another zero point */
    s.shared = least(job->pad_left, s.cells_wide - job->pad_left - job->width);
    s.shared = job->act_stride ? 0 : least(s.shared, s.cells_wide - (job->out_width - 1) * job->stride_w - 1);
    s.cells_wide -= s.shared;
    int64_t row_bytes = s.cells_wide * s.cell_bytes * s.channel_blocks * GROWTH;
    int64_t step = least(job->stride_h, job->kernel_h);
    s.band_rows = most(1, (CELLS_BYTES / row_bytes - job->kernel_h) / step);
    s.band_rows = least(s.band_rows, job->images * job->out_height);
    s.band_rows = least(s.band_rows, most(1, BAND_PIXELS / job->out_width));
    s.band_rows = up(s.band_rows, BAND_STEP);
    s.band_slots = s.band_rows * step + (s.band_rows / job->out_height + 2) * job->kernel_h;
    s.plane_bytes = (s.band_slots * s.cells_wide + s.shared) * s.cell_bytes;
    s.plane_bytes += s.plane_bytes / LINE % 2 ? 0 : LINE;   /* odd in lines: planes of one pixel fall into different sets */
    s.weight_bytes = EXPANDED_BYTES(s);
    s.group = least(s.output_blocks, most(1, WEIGHTS_BYTES / s.weight_bytes));
    return s;
}

static int reserve(const Job *job, const Shape *s, Scratch *scratch) {
    int64_t cells = up(s->plane_bytes * s->channel_blocks + SLACK * s->cell_bytes * job->stride_w, LINE);
    int64_t weights = up(s->weight_bytes * s->group, LINE);
    int64_t sums = up((s->band_slots * s->cells_wide + s->shared) * 4, LINE), box = up(s->band_rows * job->out_width * 4, LINE);
    int64_t tops = up(s->band_rows * 4, LINE), offsets = up(s->channel_blocks * s->taps * 4, LINE);
    int64_t arranged = up(arranged_bytes(job, s), LINE);
    int64_t normalized = is_prepared(job) ? up(part_of(job) * job->channels * 4, LINE) : 0;
    uint8_t *next = keep(cells + weights + sums + box + tops + offsets + arranged + normalized);
    if (!next) return 1;
    scratch->cells = take(&next, cells);
    scratch->weights = take(&next, weights);
    scratch->sums = take(&next, sums);
    scratch->box = take(&next, box);
    scratch->tops = take(&next, tops);
    scratch->offsets = take(&next, offsets);
    scratch->arranged = take(&next, arranged);
    scratch->normalized = take(&next, normalized);
    return 0;
}
#endif
