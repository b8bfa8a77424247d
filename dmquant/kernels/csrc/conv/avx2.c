/* Convolution in registers of 256 bits: u8 codes times s8 levels, by vpdpbusd if compiled for AVX-VNNI, otherwise by vpmaddubsw
 * and vpmaddwd. Needs AVX2 and FMA. */
#include "conv/quantize_avx2.h"
#include "conv/row_driver.h"
#include "conv/epilogue_avx2.h"
#include "conv/unpack_avx2.h"
#include "simd/dot_avx2.h"

/* Pixels x 16 outputs whose sums are in registers, and pixels of the tiles for the rest of a row. vpdpbusd has a latency of five
 * cycles and two start in each, so ten or more sums are needed, not eight. Without it, larger tiles and more sizes of tiles lose
 * more by gcc's register allocation than they win. */
#ifdef __AVXVNNI__
#define PIXELS 6
#define REST 2
#else
#define PIXELS 4
#define REST 1
#endif

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    int64_t bits = conv->bits, count = (to - from) * plan->weight_bytes / 32;
    if (bits == 8) return plane + from * plan->weight_bytes;
    const uint8_t *masks = plane + from * plan->weight_bytes / 8 * bits;
    for (int64_t i = 0; i < count; i++)
        _mm256_storeu_si256((__m256i *)(weights + 32 * i), unpack_levels(masks + i / 2 * 8 * bits + i % 2 * 4, bits));
    return weights;
}

/* P pixels from `pixel` on, `stride` bytes apart, times the first or the second half of an output block. mode: see dot_avx2.h;
 * for DOT_16BIT_SUMS the int16 sums of each channel block are widened. Weights are [channel block][tap][group][32 outputs][4]. */
INLINE void multiply_tile(const Row *row, int64_t block, int half, int64_t pixel, const int P, const int64_t stride,
                          const int mode) {
    const uint8_t *levels = row->weights + (block - row->first_block) * row->plan->weight_bytes + 64 * half;
    int64_t groups = row->conv->channel_block / 4;
    const uint8_t *first = row->cells + pixel * stride;
    __m256i acc[PIXELS][2], narrow[PIXELS][2];
#pragma GCC unroll 6
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < row->num_offsets; i++, levels += 128 * groups) {
        if (mode != DOT_16BIT_SUMS) {
            dot_groups(acc, first + row->tap_offsets[i], stride, levels, groups, P, mode);
            continue;
        }
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) narrow[p][0] = narrow[p][1] = _mm256_setzero_si256();
        dot_groups(narrow, first + row->tap_offsets[i], stride, levels, groups, P, mode);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++)
            for (int v = 0; v < 2; v++)
                acc[p][v] = _mm256_add_epi32(acc[p][v], _mm256_madd_epi16(narrow[p][v], _mm256_set1_epi16(1)));
    }
    int64_t output = block * OUTPUTS + 16 * half;
    for (int v = 0; v < 2; v++, output += 8) {
        Epilogue e = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
        float *out = row->out + pixel * row->conv->outputs + output;
#pragma GCC unroll 6
        for (int p = 0; p < P; p++)
            store_outputs(&e, _mm256_sub_epi32(acc[p][v], e.zero_sums), row->window_sums + pixel + p,
                          out + p * row->conv->outputs);
    }
}

INLINE void multiply_tiles(const Row *row, const int64_t stride, const int mode) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= PIXELS ? PIXELS : rest >= REST ? REST : 1;
        for (int64_t block = row->first_block; block < row->end_block; block++)
            for (int half = 0; half < 2; half++) {
                if (size == PIXELS) multiply_tile(row, block, half, pixel, PIXELS, stride, mode);
                else if (size == REST) multiply_tile(row, block, half, pixel, REST, stride, mode);
                else multiply_tile(row, block, half, pixel, 1, stride, mode);
            }
    }
}

/* Frequent strides are compiled as constants. */
INLINE void multiply_in_mode(const Row *row, const int mode) {
    int64_t stride = row->conv->stride_w * row->plan->cell_bytes;
    if (stride == 64) multiply_tiles(row, 64, mode);
    else if (stride == 32) multiply_tiles(row, 32, mode);
    else multiply_tiles(row, stride, mode);
}

#ifdef __AVXVNNI__
static void multiply_row(const Row *row) { multiply_in_mode(row, DOT_VPDPBUSD); }
#else
static void multiply_row(const Row *row) {
    const ConvParams *conv = row->conv;
    int64_t largest = conv->act_max * -level_min(conv->bits);       /* |code * level| */
    if (largest * conv->channel_block / 2 <= 32767) multiply_in_mode(row, DOT_16BIT_SUMS);
    else if (2 * largest <= 32767) multiply_in_mode(row, DOT_16BIT_PAIRS);
    else multiply_in_mode(row, DOT_WIDENED);
}
#endif
