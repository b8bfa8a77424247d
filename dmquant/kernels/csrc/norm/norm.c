/* Group norm: its moments as a gain and an offset for each channel of each image, and the normalized image itself. */
#include "norm/layer_norm.h"
#define SLICE 64                    /* channels summed up at a time */
#define RUN 64                      /* pixels summed up in float before they are added in double */
#define AHEAD 16                    /* pixels: how far slices are fetched before they are read */

/* (images, pixels, channels) float, channels last; mirrors the structure of normal.py. */
typedef struct {
    const float *x, *skip;        /* the last beside_channels of all channels are in `beside`; or NULL and 0 */
    const float *weight, *bias;     /* (channels), or NULL */
    float *gain, *offset;           /* (images, channels) */
    double *sums;                   /* (images, 2, channels): of x, of x^2, both less the first pixel */
    const float *factor;
    float *out;                     /* normalized, or NULL */
    int64_t images, pixels, channels, skip_channels, groups, activation, threads;
    double epsilon;                 /* of a layer norm, where there are no groups */
} Norm;

/* Channels of one image which lie in one piece. */
typedef struct {
    const float *x;                 /* of the first pixel */
    int64_t stride;                 /* from one pixel to the next */
    int64_t first, count;           /* channels */
} Slice;

INLINE int64_t slices_of(int64_t channels) { return (channels + SLICE - 1) / SLICE; }

INLINE Slice slice_of(const Norm *norm, int64_t n, int64_t number) {
    int64_t before = norm->channels - norm->skip_channels, whole = slices_of(before);
    int is_beside = number >= whole;
    int64_t stride = is_beside ? norm->skip_channels : before, first = (is_beside ? number - whole : number) * SLICE;
    const float *x = (is_beside ? norm->skip : norm->x) + n * norm->pixels * stride + first;
    return (Slice){x, stride, first + (is_beside ? before : 0), min(SLICE, stride - first)};
}

/* Adds pixels from..to of a slice to its sums. */
INLINE void sum_run(const Slice *slice, int64_t from, int64_t to, double *total, double *square, const int64_t count) {
    float sum[SLICE] = {0}, power[SLICE] = {0};
    const float *pivot = slice->x, *x = pivot + from * slice->stride;
    for (int64_t i = from; i < to; i++, x += slice->stride) {
        for (int64_t c = 0; c < count; c += 16) __builtin_prefetch(x + AHEAD * slice->stride + c);
        for (int64_t c = 0; c < count; c++) {
            float d = x[c] - pivot[c];
            sum[c] += d;
            power[c] = fmaf(d, d, power[c]);
        }
    }
    for (int64_t c = 0; c < count; c++) total[c] += sum[c], square[c] += power[c];
}

/* Slices from..to of an image. A run of all of them before the next one: pixels are read in the order in which they lie. */
static void sum_slices(const Norm *norm, int64_t n, int64_t from, int64_t to) {
    double *total = norm->sums + 2 * n * norm->channels, *square = total + norm->channels;
    for (int64_t p = 0; p < norm->pixels; p += RUN)
        for (int64_t number = from; number < to; number++) {
            Slice slice = slice_of(norm, n, number);
            int64_t first = slice.first;
            for (int64_t c = first; p == 0 && c < first + slice.count; c++) total[c] = square[c] = 0;
            int64_t end = min(p + RUN, norm->pixels);
            if (slice.count == SLICE) sum_run(&slice, p, end, total + first, square + first, SLICE);
            else sum_run(&slice, p, end, total + first, square + first, slice.count);
        }
}

/* A channel of the first pixel of an image. */
INLINE float first_pixel(const Norm *norm, int64_t n, int64_t c) {
    int64_t before = norm->channels - norm->skip_channels;
    return c < before ? norm->x[n * norm->pixels * before + c]
                      : norm->skip[n * norm->pixels * norm->skip_channels + c - before];
}

static void close_image(const Norm *norm, int64_t n) {
    const double *total = norm->sums + 2 * n * norm->channels, *square = total + norm->channels;
    int64_t size = norm->channels / norm->groups;
    double pixels = (double)norm->pixels;
    for (int64_t g = 0; g < norm->groups; g++) {
        double mean = 0, variance = 0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) mean += first_pixel(norm, n, c) + total[c] / pixels;
        mean /= (double)size;
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            double own = total[c] / pixels, away = first_pixel(norm, n, c) + own - mean;
            variance += square[c] / pixels - own * own + away * away;
        }
        double inverse = 1 / sqrt((variance > 0 ? variance : 0) / (double)size + norm->epsilon);
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            double gain = inverse * (norm->weight ? norm->weight[c] : 1);
            norm->gain[n * norm->channels + c] = (float)gain;
            norm->offset[n * norm->channels + c] = (float)((norm->bias ? norm->bias[c] : 0) - mean * gain);
        }
    }
}

/* Gains and offsets. Each channel is summed up in the order of its pixels: the number of threads changes no bit. */
int dmquant_moments(const Norm *norm) {
    int64_t slices = slices_of(norm->channels - norm->skip_channels) + slices_of(norm->skip_channels);
    int64_t shares = max(1, min(slices, norm->threads)), count = norm->images * shares;
#pragma omp parallel num_threads((int)norm->threads) if (norm->threads > 1)
    {
#pragma omp for
        for (int64_t i = 0; i < count; i++)
            sum_slices(norm, i / shares, i % shares * slices / shares, (i % shares + 1) * slices / shares);
#pragma omp for
        for (int64_t n = 0; n < norm->images; n++) close_image(norm, n);
    }
    return 0;
}

/* The image by given gains and offsets, as the kernels normalize it row by row. */
int dmquant_normalize(const Norm *norm) {
    int64_t step = norm->pixels * norm->channels, read = norm->pixels * input_channels(norm->activation, norm->channels);
#pragma omp parallel for num_threads((int)norm->threads) if (norm->threads > 1)
    for (int64_t n = 0; n < norm->images; n++) {
        Prologue prologue = {.factor = norm->factor, .activation = norm->activation, .stride = norm->channels, .epsilon = norm->epsilon};
        if (norm->gain) prologue.gain = norm->gain + n * norm->channels, prologue.offset = norm->offset + n * norm->channels;
        apply_prologue(&prologue, norm->x + n * read, norm->pixels, norm->channels, norm->out + n * step);
    }
    return 0;
}
