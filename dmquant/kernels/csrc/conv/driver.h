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
    const Job *job;
    const Shape *shape;
    const Scratch *scratch;
    int64_t row, count;
    int64_t tiles;                  /* as arrange() counted them */
    int64_t from, to, plane;
    const uint8_t *weights;         /* of block `from`, as expand() left them */
} Band;

static void fill(const Job *job, float zero, int64_t k, int64_t count, uint8_t *cells);
static void build(const Job *job, int64_t n, int64_t k, const float *x, int64_t count, uint8_t *cells, int32_t *sums);
static int64_t arrange(const Band *band);
static const uint8_t *expand(const Job *job, const Shape *s, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights);
static void multiply(const Band *band);

INLINE int64_t input_pixel(const Job *job, int64_t n, int64_t h) {
    int64_t row = job->width / job->zoom, missing = job->width - job->last_width;
    return n * (job->height / job->zoom * row - missing) + h / job->zoom * row;
}

INLINE int64_t pixels_of(const Job *job, int64_t h) { return h == job->height - 1 ? job->last_width : job->width; }

/* Each of the first cells of a row `zoom` times, in place: from the last to the first. */
static void spread(void *cells, int64_t bytes, int64_t count, int64_t zoom) {
    uint8_t *first = cells;
    for (int64_t p = zoom > 1 ? count - 1 : 0; p > 0; p--) memcpy(first + p * bytes, first + p / zoom * bytes, bytes);
}

/* The k-th of equal shares of the next row. */
INLINE void fetch_share(const float *next, int64_t count, int64_t k) {
    for (int64_t i = k * count; i < (k + 1) * count; i += LINE / 4) __builtin_prefetch(next + i, 0, 2);
}

/* `count` pixels of image n, without padding, into cells; `cells` are those of the first plane. */
static void build_pixels(const Job *job, const Shape *s, int64_t n, const float *x, int64_t count, uint8_t *cells,
                         int32_t *sums) {
    for (int64_t k = 0; k * job->block < job->channels; k++, cells += s->plane_bytes) {
        if (!is_prepared(job)) fetch_share(x + count * job->channels, job->block * count, k);
        build(job, n, k, x + k * job->block, count, cells, sums);
    }
}

/* The same of pixels that lie in two pieces, of whole blocks of channels each. */
static void build_pieces(const Job *job, const Shape *s, int64_t n, int64_t pixel, int64_t count, uint8_t *cells, int32_t *sums) {
    Job piece = *job;
    piece.channels = channels_before(job), piece.beside = NULL;
    build_pixels(&piece, s, n, job->x + pixel * piece.channels, count, cells, sums);
    cells += piece.channels / job->block * s->plane_bytes;
    piece.channels = job->beside_channels;
    if (job->beside) build_pixels(&piece, s, n, job->beside + pixel * piece.channels, count, cells, sums);
}

/* What is done to the channels from the given one on. */
INLINE Normal normal_of(const Job *job, int64_t n, int64_t from) {
    Normal normal = {.activate = job->activate, .epsilon = job->epsilon, .stride = job->channels};
    int64_t first = n * job->channels + from;
    if (job->gain) normal.gain = job->gain + first, normal.offset = job->offset + first;
    if (job->factor) normal.factor = job->factor + from;
    return normal;
}

/* The same, from the given pixel on, of pixels that are prepared first, a part at a time. */
static void build_prepared(const Job *job, const Shape *s, int64_t n, int64_t pixel, int64_t count, uint8_t *cells,
                           int32_t *sums, float *normalized) {
    int64_t before = channels_before(job), after = job->beside_channels;
    Normal first = normal_of(job, n, 0), last = normal_of(job, n, before);
    for (int64_t p = 0, part = part_of(job); p < count; p += part) {
        int64_t some = least(part, count - p), at = pixel + p;
        normalize_pixels(&first, job->x + at * channels_read(job->activate, before), some, before, normalized);
        if (after) normalize_pixels(&last, job->beside + at * after, some, after, normalized + before);
        build_pixels(job, s, n, normalized, some, cells + p * s->cell_bytes, sums ? sums + p : NULL);
    }
}

/* Input row h of image n, padding included, into row `slot` of the band. */
static void quantize_row(const Job *job, const Shape *s, int64_t n, int64_t h, int64_t slot, Scratch *scratch) {
    float zero = job->act_zero[n * job->act_stride];
    int64_t width = h < 0 || h >= job->height ? 0 : pixels_of(job, h);
    int64_t left = width ? job->pad_left : 0, right = s->cells_wide - left - width, read = width / job->zoom;
    int32_t *sums = needs_sums(job) ? scratch->sums + slot * s->cells_wide : NULL;
    uint8_t *row = scratch->cells + slot * s->cells_wide * s->cell_bytes, *first = row + left * s->cell_bytes;
    int64_t pixel = input_pixel(job, n, h);
    if (sums) memset(sums, 0, s->cells_wide * 4);
    if (width && is_prepared(job))
        build_prepared(job, s, n, pixel, read, first, sums ? sums + left : NULL, scratch->normalized);
    else if (width)
        build_pieces(job, s, n, pixel, read, first, sums ? sums + left : NULL);
    for (int64_t k = 0; k < s->channel_blocks; k++, row += s->plane_bytes) {
        fill(job, zero, k, left, row);
        spread(row + left * s->cell_bytes, s->cell_bytes, width, job->zoom);
        fill(job, zero, k, right, row + (left + width) * s->cell_bytes);
    }
    if (sums) spread(sums + left, sizeof *sums, width, job->zoom);
}

/* The input rows that output rows row..row+count need, each once; images follow each other without a seam. */
static void quantize_band(const Job *job, const Shape *s, int64_t row, int64_t count, Scratch *scratch) {
    int64_t slot = 0, next = 0;
    for (int64_t r = 0; r < count; r++) {
        int64_t n = (row + r) / job->out_height, h = (row + r) % job->out_height;
        int64_t first = h * job->stride_h - job->pad_top;
        if (r == 0 || h == 0 || next < first) next = first;
        scratch->tops[r] = (int32_t)(slot - (next - first));
        for (; next < first + job->kernel_h; next++) quantize_row(job, s, n, next, slot++, scratch);
    }
    uint8_t *end = scratch->cells + slot * s->cells_wide * s->cell_bytes;
    for (int64_t k = 0; k < s->channel_blocks; k++) fill(job, job->act_zero[0], k, s->shared, end + k * s->plane_bytes);
    if (needs_sums(job)) memset(scratch->sums + slot * s->cells_wide, 0, s->shared * 4);
}

/* The sum of a under each output pixel of a row. */
static void sum_box(const Job *job, const Shape *s, const int32_t *sums, int64_t pixels, int32_t *box) {
    for (int64_t p = 0; p < pixels; p++) {
        int32_t sum = 0;
        for (int64_t y = 0; y < job->kernel_h; y++)
            for (int64_t x = 0; x < job->kernel_w; x++) sum += sums[y * s->cells_wide + p * job->stride_w + x];
        box[p] = sum;
    }
}

/* Where output row r of a band begins, in pixels of `out`, and how many it has. A linear layer's last row may be shorter. */
INLINE int64_t output_pixel(const Job *job, int64_t r) {
    int64_t n = r / job->out_height, h = r % job->out_height, missing = job->width - job->last_width;
    return n * (job->out_height * job->out_width - missing) + h * job->out_width;
}

INLINE int64_t output_pixels(const Job *job, int64_t r) {
    return job->out_width - (r % job->out_height == job->out_height - 1 ? job->width - job->last_width : 0);
}

INLINE const float *bias_of(const Job *job, int64_t image) { return job->bias ? job->bias + image * job->bias_stride : NULL; }

/* What the last plane adds to an output, or NULL. */
INLINE const float *residual_at(const Job *job, int64_t plane, const float *out) {
    return job->residual && plane == job->planes - 1 ? job->residual + (out - job->out) : NULL;
}

/* Output rows first..last against blocks from..to of outputs. */
static int work(const Job *job, const Shape *s, int64_t first, int64_t last, int64_t from, int64_t to) {
    Scratch scratch;
    if (first >= last || from >= to) return 0;
    if (reserve(job, s, &scratch)) return 1;
    int64_t i = 0;
    for (int64_t k = 0; k < s->channel_blocks; k++)
        for (int64_t y = 0; y < job->kernel_h; y++)
            for (int64_t x = 0; x < job->kernel_w; x++)
                scratch.offsets[i++] = (int32_t)(k * s->plane_bytes + (y * s->cells_wide + x) * s->cell_bytes);
    Band band = {.job = job, .shape = s, .scratch = &scratch};
    int64_t held = -1;
    for (int64_t row = first; row < last; row += s->band_rows) {
        int64_t count = least(s->band_rows, last - row);
        quantize_band(job, s, row, count, &scratch);
        band.row = row, band.count = count;
        band.tiles = arrange(&band);
        for (int64_t plane = 0; plane < job->planes; plane++)
            for (int64_t block = from; block < to; block += s->group) {
                int64_t end = least(to, block + s->group), name = plane * s->output_blocks + block;
                const uint8_t *blocked = job->weight + plane * job->plane_bytes;
                if (held != name) band.weights = expand(job, s, blocked, block, end, scratch.weights);
                held = name;
                band.from = block, band.to = end, band.plane = plane;
                multiply(&band);
            }
    }
    return 0;
}

int dmquant_run(const Job *job) {
    if (!TAKES(job)) return 2;
    Shape s = measure(job);
    int64_t rows = job->images * job->out_height;
    int failed = 0;
    (void)rows;
#ifdef _OPENMP
    /* few rows: the threads share the outputs instead, and each quantizes the input for itself */
    int by_rows = rows >= 2 * job->threads || rows >= s.output_blocks;
    int64_t threads = least(job->threads, by_rows ? rows : s.output_blocks);
#pragma omp parallel num_threads((int)threads) if (threads > 1) reduction(| : failed)
    {
        int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        if (by_rows)
            failed = work(job, &s, rows * t / all, rows * (t + 1) / all, 0, s.output_blocks);
        else
            failed = work(job, &s, 0, rows, s.output_blocks * t / all, s.output_blocks * (t + 1) / all);
    }
#else
    failed = work(job, &s, 0, rows, 0, s.output_blocks);
#endif
    return failed;
}
#endif
