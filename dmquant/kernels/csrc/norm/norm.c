/* Group norm as a gain and an offset for each channel of each image, and prologues written out as images.
 *
 * Kernels of layers read gain and offset and normalize what they quantize, so no normalized image is stored. Images are float32,
 * channels last. Shapes: B images, P pixels, C channels. */
#include "norm/layer_norm.h"
#define SLICE 64                    /* channels whose sums are in registers at a time */
#define RUN 64                      /* pixels summed up in float32 before the sums are added to those in float64 */
#define AHEAD 16                    /* pixels: distance of prefetches */

/* Arguments of both functions; Python packs the fields in this order. */
typedef struct {
    const float *x;                 /* (B, P, C), or (B, P, 2 C) for GATED */
    const float *weight, *bias;     /* (C), of the group norm, or NULL: 1 and 0 */
    float *gain, *offset;           /* (B, C): written by dmquant_group_norm, read by dmquant_normalize */
    double *sums;                   /* (B, 2, C), scratch: sums over P of d and d^2, with d = x - its value at pixel 0 */
    const float *factor;            /* (C), of the prologue, or NULL */
    float *out;                     /* (B, P, C), written by dmquant_normalize */
    int64_t images, pixels, channels;               /* B, P, C */
    int64_t groups, activation, threads;
    double epsilon;                 /* of the group norm, or of the prologue's layer norm (0: none) */
} NormParams;

/* Adds d and d^2 of pixels from..to of `count` <= SLICE channels to their sums. pivot: x of pixel 0; stride: floats from one
 * pixel to the next. `count` is a constant where it is SLICE. */
INLINE void sum_run(const float *pivot, int64_t stride, int64_t from, int64_t to, double *sums, double *squares,
                    const int64_t count) {
    float sum[SLICE] = {0}, square[SLICE] = {0};
    const float *x = pivot + from * stride;
    for (int64_t i = from; i < to; i++, x += stride) {
        for (int64_t c = 0; c < count; c += 16) __builtin_prefetch(x + AHEAD * stride + c);
        for (int64_t c = 0; c < count; c++) {
            float d = x[c] - pivot[c];
            sum[c] += d;
            square[c] = fmaf(d, d, square[c]);
        }
    }
    for (int64_t c = 0; c < count; c++) sums[c] += sum[c], squares[c] += square[c];
}

/* Sums of slices from..to of image n. All slices of a run come before the next run: memory is read in its order. */
static void sum_slices(const NormParams *norm, int64_t n, int64_t from, int64_t to) {
    const float *x = norm->x + n * norm->pixels * norm->channels;
    double *sums = norm->sums + 2 * n * norm->channels, *squares = sums + norm->channels;
    for (int64_t p = 0; p < norm->pixels; p += RUN)
        for (int64_t c = from * SLICE; c < min(to * SLICE, norm->channels); c += SLICE) {
            int64_t count = min(SLICE, norm->channels - c), end = min(p + RUN, norm->pixels);
            for (int64_t i = c; p == 0 && i < c + count; i++) sums[i] = squares[i] = 0;
            if (count == SLICE) sum_run(x + c, norm->channels, p, end, sums + c, squares + c, SLICE);
            else sum_run(x + c, norm->channels, p, end, sums + c, squares + c, count);
        }
}

/* Sums of image n -> gain = weight / sqrt(variance + epsilon) and offset = bias - mean * gain of its channels, in float64. The
 * variance of a group is the mean over its channels of (their variance + their mean's squared distance to the group's mean). */
static void write_gains(const NormParams *norm, int64_t n) {
    const double *sums = norm->sums + 2 * n * norm->channels, *squares = sums + norm->channels;
    const float *pivot = norm->x + n * norm->pixels * norm->channels;
    int64_t size = norm->channels / norm->groups;
    double pixels = (double)norm->pixels;
    for (int64_t g = 0; g < norm->groups; g++) {
        double mean = 0, variance = 0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) mean += pivot[c] + sums[c] / pixels;
        mean /= (double)size;
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            double shift = sums[c] / pixels, distance = pivot[c] + shift - mean;
            variance += squares[c] / pixels - shift * shift + distance * distance;
        }
        double inverse = 1 / sqrt((variance > 0 ? variance : 0) / (double)size + norm->epsilon);
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            double gain = inverse * (norm->weight ? norm->weight[c] : 1);
            norm->gain[n * norm->channels + c] = (float)gain;
            norm->offset[n * norm->channels + c] = (float)((norm->bias ? norm->bias[c] : 0) - mean * gain);
        }
    }
}

/* Writes gain and offset of a group norm over x. Threads share images and slices of channels, and each channel is summed up in
 * the order of its pixels: the number of threads changes no bit. Returns 0. */
int dmquant_group_norm(const NormParams *norm) {
    int64_t slices = (norm->channels + SLICE - 1) / SLICE;
    int64_t shares = max(1, min(slices, norm->threads)), count = norm->images * shares;
#pragma omp parallel num_threads((int)norm->threads) if (norm->threads > 1)
    {
#pragma omp for
        for (int64_t i = 0; i < count; i++)
            sum_slices(norm, i / shares, i % shares * slices / shares, (i % shares + 1) * slices / shares);
#pragma omp for
        for (int64_t n = 0; n < norm->images; n++) write_gains(norm, n);
    }
    return 0;
}

/* Writes out = a prologue of x, as kernels apply it to what they read. Returns 0. */
int dmquant_normalize(const NormParams *norm) {
    int64_t stride = input_channels(norm->activation, norm->channels);
#pragma omp parallel for num_threads((int)norm->threads) if (norm->threads > 1)
    for (int64_t n = 0; n < norm->images; n++) {
        Prologue prologue = {
            .factor = norm->factor, .activation = norm->activation, .stride = stride, .epsilon = norm->epsilon,
        };
        int64_t first = n * norm->channels, pixel = n * norm->pixels;
        if (norm->gain) prologue.gain = norm->gain + first, prologue.offset = norm->offset + first;
        apply_prologue(&prologue, norm->x + pixel * stride, norm->pixels, norm->channels, norm->out + pixel * norm->channels);
    }
    return 0;
}
