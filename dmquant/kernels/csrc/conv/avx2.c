/* Products of u8 codes times s8 levels in 256 bits: by vpdpbusd if it is compiled for AVX-VNNI, otherwise by vpmaddubsw and
 * vpmaddwd, in pairs.
 *
 * Where the products are small (4 bits times 4 to 7), the pairs of a whole block are added up in 16 bits before they are widened.
 * Needs AVX2 and FMA. */
#include "conv/quantize_avx2.h"
#include "simd/dot_avx2.h"
#include "conv/row_driver.h"

/* Pixels x 16 outputs in registers, and of what is left. A vpdpbusd takes five cycles, and two begin in each: eight sums would
 * wait for each other. Without it more kinds of tiles cost more, by what gcc makes of registers, than they win. */
#ifdef __AVXVNNI__
#define PIXELS 6
#define REST 2
#else
#define PIXELS 4
#define REST 1
#endif

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights) {
    int64_t bits = conv->bits, count = (to - from) * plan->weight_bytes / 32;
    if (bits == 8) return plane + from * plan->weight_bytes;
    const uint8_t *masks = plane + from * plan->weight_bytes / 8 * bits;
    for (int64_t i = 0; i < count; i++)
        _mm256_storeu_si256((__m256i *)(weights + 32 * i), unpack_levels(masks + i / 2 * 8 * bits + i % 2 * 4, bits));
    return weights;
}

INLINE void tile(const Row *row, int64_t block, int half, int64_t pixel, const int P, const int64_t step, const int mode) {
    const uint8_t *levels = row->weights + (block - row->from) * row->plan->weight_bytes + 64 * half;
    int64_t groups = row->conv->block / 4;
    const uint8_t *first = row->cells + pixel * step;
    __m256i acc[PIXELS][2], narrow[PIXELS][2];
#pragma GCC unroll 6
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < row->count; i++, levels += 128 * groups) {
        if (mode != DOT_16BIT_SUMS) {
            dot_groups(acc, first + row->offsets[i], step, levels, groups, P, mode);
            continue;
        }
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) narrow[p][0] = narrow[p][1] = _mm256_setzero_si256();
        dot_groups(narrow, first + row->offsets[i], step, levels, groups, P, mode);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++)
            for (int v = 0; v < 2; v++)
                acc[p][v] = _mm256_add_epi32(acc[p][v], _mm256_madd_epi16(narrow[p][v], _mm256_set1_epi16(1)));
    }
    int64_t output = block * OUTPUTS + 16 * half;
    for (int v = 0; v < 2; v++, output += 8) {
        Epilogue o = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
        float *out = row->out + pixel * row->conv->outputs + output;
#pragma GCC unroll 6
        for (int p = 0; p < P; p++)
            store_outputs(&o, _mm256_sub_epi32(acc[p][v], o.excess), row->window_sums + pixel + p, out + p * row->conv->outputs);
    }
}

INLINE void walk_by(const Row *row, const int64_t step, const int mode) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= PIXELS ? PIXELS : rest >= REST ? REST : 1;
        for (int64_t block = row->from; block < row->to; block++)
            for (int half = 0; half < 2; half++) {
                if (size == PIXELS) tile(row, block, half, pixel, PIXELS, step, mode);
                else if (size == REST) tile(row, block, half, pixel, REST, step, mode);
                else tile(row, block, half, pixel, 1, step, mode);
            }
    }
}

INLINE void walk(const Row *row, const int mode) {
    int64_t step = row->conv->stride_w * row->plan->cell_bytes;
    if (step == 64) walk_by(row, 64, mode);
    else if (step == 32) walk_by(row, 32, mode);
    else walk_by(row, step, mode);
}

#ifdef __AVXVNNI__
static void multiply_row(const Row *row) { walk(row, DOT_VPDPBUSD); }
#else
static void multiply_row(const Row *row) {
    const ConvParams *conv = row->conv;
    int64_t largest = conv->act_max * -level_min(conv->bits);
    if (largest * conv->block / 2 <= 32767) walk(row, DOT_16BIT_SUMS);
    else if (2 * largest <= 32767) walk(row, DOT_16BIT_PAIRS);
    else walk(row, DOT_WIDENED);
}
#endif
