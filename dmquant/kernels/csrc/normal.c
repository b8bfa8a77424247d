/* Group norm: its moments as a gain and an offset for each channel of each image, and the normalized image itself. */
#include "token.h"
#define SLICE 64                    /* channels summed up at a time */
#define RUN 64                      /* pixels summed up in float before they are added in double */
#define AHEAD 16                    /* pixels: how far slices are fetched before they are read */

/* (images, pixels, channels) float, channels last; mirrors the structure of normal.py. */
typedef struct {
    const float *x, *weight, *bias; /* weight and bias (channels), or NULL */
    float *gain, *offset;           /* (images, channels) */
    double *sums;                   /* (images, 2, channels): of x, of x^2, both less the first pixel */
    const float *factor;
    float *out;                     /* normalized, or NULL */
    int64_t images, pixels, channels, groups, activate, threads;
    double epsilon;                 /* of a layer norm, where there are no groups */
} Norm;

static void sum_slice(const Norm *norm, int64_t n, int64_t first) {
    int64_t count = norm->channels - first < SLICE ? norm->channels - first : SLICE;
    const float *x = norm->x + n * norm->pixels * norm->channels + first, *pivot = x;
    double *total = norm->sums + 2 * n * norm->channels + first, *square = total + norm->channels;
    for (int64_t c = 0; c < count; c++) total[c] = square[c] = 0;
    for (int64_t p = 0; p < norm->pixels; p += RUN) {
        float sum[SLICE] = {0}, power[SLICE] = {0};
        int64_t end = p + RUN < norm->pixels ? p + RUN : norm->pixels;
        for (int64_t i = p; i < end; i++) {
            for (int64_t c = 0; c < count; c += 16) __builtin_prefetch(x + (i + AHEAD) * norm->channels + c);
            for (int64_t c = 0; c < count; c++) {
                float d = x[i * norm->channels + c] - pivot[c];
                sum[c] += d;
                power[c] = fmaf(d, d, power[c]);
            }
        }
        for (int64_t c = 0; c < count; c++) total[c] += sum[c], square[c] += power[c];
    }
}

static void close_image(const Norm *norm, int64_t n) {
    const float *pivot = norm->x + n * norm->pixels * norm->channels;
    const double *total = norm->sums + 2 * n * norm->channels, *square = total + norm->channels;
    int64_t size = norm->channels / norm->groups;
    double pixels = (double)norm->pixels;
    for (int64_t g = 0; g < norm->groups; g++) {
        double mean = 0, variance = 0;
        for (int64_t c = g * size; c < (g + 1) * size; c++) mean += pivot[c] + total[c] / pixels;
        mean /= (double)size;
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            double own = total[c] / pixels, away = pivot[c] + own - mean;
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
    int64_t slices = (norm->channels + SLICE - 1) / SLICE;
#pragma omp parallel num_threads((int)norm->threads) if (norm->threads > 1)
    {
#pragma omp for
        for (int64_t i = 0; i < norm->images * slices; i++) sum_slice(norm, i / slices, i % slices * SLICE);
#pragma omp for
        for (int64_t n = 0; n < norm->images; n++) close_image(norm, n);
    }
    return 0;
}

/* The image by given gains and offsets, as the kernels normalize it row by row. */
int dmquant_normalize(const Norm *norm) {
    int64_t step = norm->pixels * norm->channels, read = norm->pixels * channels_read(norm->activate, norm->channels);
#pragma omp parallel for num_threads((int)norm->threads) if (norm->threads > 1)
    for (int64_t n = 0; n < norm->images; n++) {
        Normal normal = {.factor = norm->factor, .activate = norm->activate, .epsilon = norm->epsilon};
        if (norm->gain) normal.gain = norm->gain + n * norm->channels, normal.offset = norm->offset + n * norm->channels;
        normalize_pixels(&normal, norm->x + n * read, norm->pixels, norm->channels, norm->out + n * step);
    }
    return 0;
}
