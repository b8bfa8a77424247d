/* Convolution in plain C, for any machine: u8 codes times s8 levels, one output block of one pixel at a time. */
#include <math.h>
#include "conv/quantize.h"
#include "conv/row_driver.h"

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums) {
    float inverse = 1.0f / conv->act_scale[n * conv->act_stride], zero = conv->act_zero[n * conv->act_stride];
    float low = -zero, high = (float)conv->act_max - zero;
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    for (int64_t p = 0; p < count; p++, x += stride, cells += conv->channel_block)
        for (int64_t c = 0; c < conv->channel_block; c++) {
            float value = c < real ? x[c] * inverse : low;
            value = value > low ? value : low;
            int a = (int)rintf(value < high ? value : high);
            cells[c] = (uint8_t)(c < real ? a + (int)zero : 0);
            if (sums && c < real) sums[p] += a;
        }
}

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    int64_t bits = conv->bits, count = (to - from) * plan->weight_bytes;
    if (bits == 8) return plane + from * plan->weight_bytes;
    const uint8_t *masks = plane + from * plan->weight_bytes / 8 * bits;
    int step = level_step(bits), lowest = level_min(bits);
    for (int64_t i = 0; i < count; i++) {
        int code = 0;
        for (int64_t bit = 0; bit < bits; bit++) code |= (masks[(i / 64 * bits + bit) * 8 + i % 64 / 8] >> i % 8 & 1) << bit;
        weights[i] = (uint8_t)(int8_t)(lowest + step * code);
    }
    return weights;
}

/* The epilogue of one output block of one pixel. sums: of level * code. */
static void store_outputs(const Row *row, int64_t block, int64_t pixel, const int32_t sums[OUTPUTS]) {
    const ConvParams *conv = row->conv;
    int64_t at = row->plane * conv->outputs;
    for (int64_t o = block * OUTPUTS; o < min(conv->outputs, (block + 1) * OUTPUTS); o++) {
        int32_t sum = sums[o % OUTPUTS] - conv->weight_sums[at + o] * (int32_t)row->act_zero;
        if (conv->zero)
            sum -= (int32_t)(level_step(conv->bits) * conv->zero[o] + level_min(conv->bits)) * row->window_sums[pixel];
        float *out = row->out + pixel * conv->outputs + o;
        float scale = conv->scale[at + o] * (conv->half_scale ? row->act_scale * 0.5f : row->act_scale);
        const float *residual = residual_at(conv, row->plane, out);
        *out = fmaf((float)sum, scale, row->plane ? *out : row->bias ? row->bias[o] : 0.0f);
        if (residual) *out += *residual;
    }
}

static void multiply_row(const Row *row) {
    int64_t step = row->conv->stride_w * row->plan->cell_bytes;
    for (int64_t pixel = 0; pixel < row->pixels; pixel++)
        for (int64_t block = row->first_block; block < row->end_block; block++) {
            const int8_t *levels = (const int8_t *)row->weights + (block - row->first_block) * row->plan->weight_bytes;
            int32_t acc[OUTPUTS] = {0};
            for (int64_t i = 0; i < row->num_offsets; i++) {
                const uint8_t *codes = row->cells + pixel * step + row->tap_offsets[i];
                for (int64_t c = 0; c < row->conv->channel_block; c += 4, levels += 4 * OUTPUTS)
                    for (int o = 0; o < OUTPUTS; o++)
                        for (int j = 0; j < 4; j++) acc[o] += codes[c + j] * levels[4 * o + j];
            }
            store_outputs(row, block, pixel, acc);
        }
}
