/* Products by vpdpbusd: u8 codes times s8 levels, four channels at a time, 8 pixels x 32 outputs in registers.
 * Needs AVX-512 F, BW, VL, DQ and VNNI. */
#include "conv/unpack_avx512.h"
#include "conv/row_driver.h"
#include "conv/epilogue_avx512.h"
#include "simd/dot_avx512vnni.h"

INLINE void tile(const Row *row, int64_t block, const uint8_t *levels, int64_t pixel, const int P, const int groups,
                 const int64_t step) {
    __m512i acc[8][2];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm512_setzero_si512();
    const uint8_t *first = row->cells + pixel * step;
    for (int64_t i = 0; i < row->count; i++, levels += 128 * groups)
        dot_groups(acc, first + row->offsets[i], step, levels, groups, P);
    int64_t output = block * OUTPUTS;
    Epilogue o0 = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
    Epilogue o1 = load_epilogue(row->conv, row->plane, output + 16, row->act_scale, row->act_zero, row->bias);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        const int32_t *window_sums = row->window_sums + pixel + p;
        float *out = row->out + (pixel + p) * row->conv->outputs + output;
        store_outputs(&o0, _mm512_sub_epi32(acc[p][0], o0.excess), window_sums, out);
        store_outputs(&o1, _mm512_sub_epi32(acc[p][1], o1.excess), window_sums, out + 16);
    }
}

INLINE void walk(const Row *row, const int groups, const int64_t step) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        for (int64_t block = row->from; block < row->to; block++) {
            const uint8_t *levels = row->weights + (block - row->from) * row->plan->weight_bytes;
            if (size == 8) tile(row, block, levels, pixel, 8, groups, step);
            else if (size == 4) tile(row, block, levels, pixel, 4, groups, step);
            else if (size == 2) tile(row, block, levels, pixel, 2, groups, step);
            else tile(row, block, levels, pixel, 1, groups, step);
        }
    }
}

static void multiply_row(const Row *row) {
    int64_t block = row->conv->block, stride = row->conv->stride_w;
    if (block == 64 && stride == 1) walk(row, 16, 64);
    else if (block == 64 && stride == 2) walk(row, 16, 128);
    else if (block == 64) walk(row, 16, 64 * stride);
    else if (stride == 1) walk(row, 8, 32);
    else walk(row, 8, 32 * stride);
}
