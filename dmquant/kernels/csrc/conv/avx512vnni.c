/* Convolution by vpdpbusd: u8 codes times s8 levels, with the sums of 8 pixels x 32 outputs in registers.
 * Needs AVX-512 F, BW, VL, DQ and VNNI. */
#include "conv/quantize_avx512.h"
#include "conv/row_driver.h"
#include "conv/epilogue_avx512.h"
#include "conv/unpack_avx512.h"
#include "simd/dot_avx512vnni.h"

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    return unpack_blocks(conv, plan, plane, from, to, weights);
}

/* P pixels from `pixel` on, `stride` bytes apart, times one output block. levels: [channel block][tap][group][output][4];
 * groups: of four channels, in a channel block. */
INLINE void multiply_tile(const Row *row, int64_t block, const uint8_t *levels, int64_t pixel, const int P, const int groups,
                          const int64_t stride) {
    __m512i acc[8][2];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm512_setzero_si512();
    const uint8_t *first = row->cells + pixel * stride;
    for (int64_t i = 0; i < row->num_offsets; i++, levels += 128 * groups)
        dot_groups(acc, first + row->tap_offsets[i], stride, levels, groups, P);
    int64_t output = block * OUTPUTS;
    Epilogue e0 = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
    Epilogue e1 = load_epilogue(row->conv, row->plane, output + 16, row->act_scale, row->act_zero, row->bias);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        const int32_t *window_sum = row->window_sums + pixel + p;
        float *out = row->out + (pixel + p) * row->conv->outputs + output;
        store_outputs(&e0, _mm512_sub_epi32(acc[p][0], e0.zero_sums), window_sum, out);
        store_outputs(&e1, _mm512_sub_epi32(acc[p][1], e1.zero_sums), window_sum, out + 16);
    }
}

/* The row in tiles of 8 pixels, the rest in tiles of 4, 2 and 1. */
INLINE void multiply_tiles(const Row *row, const int groups, const int64_t stride) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        for (int64_t block = row->first_block; block < row->end_block; block++) {
            const uint8_t *levels = row->weights + (block - row->first_block) * row->plan->weight_bytes;
            if (size == 8) multiply_tile(row, block, levels, pixel, 8, groups, stride);
            else if (size == 4) multiply_tile(row, block, levels, pixel, 4, groups, stride);
            else if (size == 2) multiply_tile(row, block, levels, pixel, 2, groups, stride);
            else multiply_tile(row, block, levels, pixel, 1, groups, stride);
        }
    }
}

/* Frequent shapes are compiled with constants. */
static void multiply_row(const Row *row) {
    int64_t block = row->conv->channel_block, stride = row->conv->stride_w;
    if (block == 64 && stride == 1) multiply_tiles(row, 16, 64);
    else if (block == 64 && stride == 2) multiply_tiles(row, 16, 128);
    else if (block == 64) multiply_tiles(row, 16, 64 * stride);
    else if (stride == 1) multiply_tiles(row, 8, 32);
    else multiply_tiles(row, 8, 32 * stride);
}
