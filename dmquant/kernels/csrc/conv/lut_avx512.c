/* Products by lookup: for each pixel a table of the 16 sums of +-a of four channels, shared by all outputs and all taps.
 *
 * Four tables (16 channels) are one register; a nibble of weight bits and two constant bits index it, so one vpermb looks up
 * 64 sums, 256 products, and one vpdpbusd by ones adds the four groups of an output. 4 * max|a| must fit a signed byte: up to
 * 5-bit activations. Where 8 * max|a| fits as well (4 bits), two lookups are added before they are widened. Six bits need
 * unsigned tables: sums of the codes whose bit is set. A weight of two bits is twice the lookups: level = sign 0 + 2 * sign 1.
 * Needs AVX-512 F, BW, VL, DQ, VNNI and VBMI. */
#define CHANNEL_BYTES 4
#define ALWAYS_SUMS(conv) is_unsigned(conv)
#define is_unsigned(conv) ((conv)->act_max > 31)
#include "conv/row_driver.h"
#include "conv/epilogue_avx512.h"
#include "simd/dot_avx512vnni.h"

enum { SIGNED, PAIRED, UNSIGNED };   /* of tables: read below */

/* Entry e of group g sums the channels 4 g + j over the bits j of e: (shuffle, mask) of each j. */
typedef struct {
    __m512i channel[4];
    __mmask64 mask[4];
} Entries;

INLINE Entries entries(void) {
    Entries table = {.mask = {0xaaaaaaaaaaaaaaaa, 0xcccccccccccccccc, 0xf0f0f0f0f0f0f0f0, 0xff00ff00ff00ff00}};
    __m512i first = _mm512_maskz_set1_epi32(0x00f0, 0x04040404);
    first = _mm512_mask_set1_epi32(first, 0x0f00, 0x08080808);
    first = _mm512_mask_set1_epi32(first, 0xf000, 0x0c0c0c0c);
    for (int j = 0; j < 4; j++) table.channel[j] = _mm512_add_epi8(first, _mm512_set1_epi8((char)j));
    return table;
}

/* 16 channels -> four tables of the sum of those whose bit is set. */
INLINE __m512i tabulate(const Entries *table, __m128i a) {
    __m512i all = _mm512_broadcast_i32x4(a);
    __m512i x0 = _mm512_maskz_shuffle_epi8(table->mask[0], all, table->channel[0]);
    __m512i x1 = _mm512_maskz_shuffle_epi8(table->mask[1], all, table->channel[1]);
    __m512i x2 = _mm512_maskz_shuffle_epi8(table->mask[2], all, table->channel[2]);
    __m512i x3 = _mm512_maskz_shuffle_epi8(table->mask[3], all, table->channel[3]);
    return _mm512_add_epi8(_mm512_add_epi8(x0, x1), _mm512_add_epi8(x2, x3));
}

/* The sum of +-a is twice the sum of those whose bit is set, less the sum of all, which is entry 15. */
INLINE __m512i center(__m512i set) {
    return _mm512_sub_epi8(_mm512_add_epi8(set, set), _mm512_shuffle_epi8(set, _mm512_set1_epi8(15)));
}

/* Padding is a = 0: a table of zeros, or of the zero point where tables are unsigned. */
static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block), bytes = conv->channel_block * CHANNEL_BYTES;
    if (!count) return;
    memset(cells, 0, count * bytes);
    if (!is_unsigned(conv)) return;
    Entries table = entries();
    for (int64_t c = 0; c < real; c += 16) {
        __mmask16 mask = c + 16 <= real ? 0xffff : (__mmask16)((1u << (real - c)) - 1);
        _mm512_storeu_si512(cells + 4 * c, tabulate(&table, _mm_maskz_set1_epi8(mask, (char)zero)));
    }
    for (int64_t p = 1; p < count; p++) memcpy(cells + p * bytes, cells, bytes);
}

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t count, uint8_t *cells, int32_t *sums) {
    Entries table = entries();
    float act_zero = conv->act_zero[n * conv->act_stride];
    __m512 inverse = _mm512_set1_ps(1.0f / conv->act_scale[n * conv->act_stride]);
    __m512 low = _mm512_set1_ps(-act_zero), high = _mm512_set1_ps((float)conv->act_max - act_zero);
    __m512i zero = _mm512_set1_epi32((int)act_zero);
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    for (int64_t p = 0; p < count; p++, x += conv->channels) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t c = 0; c < conv->channel_block; c += 16, cells += 64) {
            __mmask16 mask = c + 16 <= real ? 0xffff : c >= real ? 0 : (__mmask16)((1u << (real - c)) - 1);
            __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), inverse);
            __m512i a = _mm512_maskz_cvtps_epi32(mask, _mm512_min_ps(_mm512_max_ps(value, low), high));
            if (is_unsigned(conv))
                _mm512_storeu_si512(cells, tabulate(&table, _mm512_cvtepi32_epi8(_mm512_maskz_add_epi32(mask, a, zero))));
            else
                _mm512_storeu_si512(cells, center(tabulate(&table, _mm512_cvtepi32_epi8(a))));
            if (sums) sum = _mm512_add_epi32(sum, a);
        }
        if (sums) sums[p] += _mm512_reduce_add_epi32(sum);
    }
}

/* Read as they lie: one bit of each weight is one bit of an index. */
static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights) {
    (void)conv, (void)to, (void)weights;
    return plane + from * plan->weight_bytes / 8;
}

/* 64 bytes of nibbles: those of outputs 0-15 are low, those of outputs 16-31 high. */
INLINE __m512i low_index(__m512i nibbles) {
    return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), _mm512_set1_epi32(0x30201000), 0xEA);
}

INLINE __m512i high_index(__m512i nibbles) { return low_index(_mm512_srli_epi16(nibbles, 4)); }

INLINE void accumulate(const Row *row, __m512i acc[8][2], const uint8_t *nibbles, const uint8_t *first, const int P,
                       const int steps, const int64_t stride, const int mode) {
    const __m512i ones = _mm512_set1_epi8(1);
    const int paired = mode == PAIRED;
    for (int64_t i = 0; i < row->num_offsets; i++, nibbles += 64 * steps) {
        const uint8_t *tables = first + row->tap_offsets[i];
#pragma GCC unroll 4
        for (int k = 0; k < steps; k += 1 + paired) {
            __m512i v0 = _mm512_loadu_si512(nibbles + 64 * k), v1 = _mm512_loadu_si512(nibbles + 64 * (k + paired));
            __m512i a0 = low_index(v0), a1 = high_index(v0), b0 = low_index(v1), b1 = high_index(v1);
#pragma GCC unroll 8
            for (int p = 0; p < P; p++) {
                __m512i t0 = _mm512_loadu_si512(tables + p * stride + 64 * k), t1;
                __m512i s0 = _mm512_permutexvar_epi8(a0, t0), s1 = _mm512_permutexvar_epi8(a1, t0);
                if (paired) {
                    t1 = _mm512_loadu_si512(tables + p * stride + 64 * (k + 1));
                    s0 = _mm512_add_epi8(s0, _mm512_permutexvar_epi8(b0, t1));
                    s1 = _mm512_add_epi8(s1, _mm512_permutexvar_epi8(b1, t1));
                }
                if (mode == UNSIGNED) {
                    VPDPBUSD(acc[p][0], s0, ones);
                    VPDPBUSD(acc[p][1], s1, ones);
                } else {
                    VPDPBUSD(acc[p][0], ones, s0);
                    VPDPBUSD(acc[p][1], ones, s1);
                }
            }
        }
    }
}

/* The sum of level * a, from the sum over bits of 2^bit times the codes whose bit is set: level = 2 * sum of 2^bit - most. */
INLINE __m512i from_set(const Row *row, __m512i set, const Epilogue *o, int32_t window_sums) {
    int32_t top = (1 << row->conv->bits) - 1, inputs = (int32_t)(row->conv->channels * row->plan->taps);
    __m512i rest = _mm512_set1_epi32(top * (inputs * (int32_t)row->act_zero + window_sums));
    return _mm512_sub_epi32(_mm512_slli_epi32(set, 1), _mm512_add_epi32(o->zero_sums, rest));
}

INLINE void tile(const Row *row, int64_t block, int64_t pixel, const int P, const int steps, const int64_t stride,
                 const int mode) {
    const Plan *plan = row->plan;
    __m512i acc[8][2];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm512_setzero_si512();
    for (int64_t bit = row->conv->bits - 1; bit >= 0; bit--) {
        const uint8_t *nibbles = row->weights + (bit * plan->output_blocks + block - row->first_block) * (plan->weight_bytes / 8);
        accumulate(row, acc, nibbles, row->cells + pixel * stride, P, steps, stride, mode);
        if (bit == 0) break;
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            acc[p][0] = _mm512_slli_epi32(acc[p][0], 1);
            acc[p][1] = _mm512_slli_epi32(acc[p][1], 1);
        }
    }
    int64_t output = block * OUTPUTS;
    Epilogue o0 = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
    Epilogue o1 = load_epilogue(row->conv, row->plane, output + 16, row->act_scale, row->act_zero, row->bias);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        const int32_t *window_sums = row->window_sums + pixel + p;
        float *out = row->out + (pixel + p) * row->conv->outputs + output;
        if (mode == UNSIGNED) {
            acc[p][0] = from_set(row, acc[p][0], &o0, *window_sums);
            acc[p][1] = from_set(row, acc[p][1], &o1, *window_sums);
        }
        store_outputs(&o0, acc[p][0], window_sums, out);
        store_outputs(&o1, acc[p][1], window_sums, out + 16);
    }
}

INLINE void walk(const Row *row, const int steps, const int64_t stride, const int mode) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        for (int64_t block = row->first_block; block < row->end_block; block++) {
            if (size == 8) tile(row, block, pixel, 8, steps, stride, mode);
            else if (size == 4) tile(row, block, pixel, 4, steps, stride, mode);
            else if (size == 2) tile(row, block, pixel, 2, steps, stride, mode);
            else tile(row, block, pixel, 1, steps, stride, mode);
        }
    }
}

static void multiply_row(const Row *row) {
    const ConvParams *conv = row->conv;
    float largest = row->act_zero > (float)conv->act_max - row->act_zero ? row->act_zero : (float)conv->act_max - row->act_zero;
    int64_t stride = conv->stride_w * row->plan->cell_bytes;
    if (is_unsigned(conv) && conv->channel_block == 32) walk(row, 2, stride, UNSIGNED);
    else if (is_unsigned(conv)) walk(row, 4, stride, UNSIGNED);
    else if (conv->channel_block == 32) walk(row, 2, stride, 8 * largest > 127 ? SIGNED : PAIRED);
    else if (8 * largest > 127) walk(row, 4, stride, SIGNED);
    else if (conv->stride_w == 1) walk(row, 4, 256, PAIRED);
    else walk(row, 4, stride, PAIRED);
}
