/* Convolution by lookup, for weights of 1 or 2 bits and activations of up to 6.
 *
 * For each pixel and each group of four channels there is a table of 16 bytes: entry e is the sum of +a of the channels whose
 * bit in e is set and -a of the others. All outputs and taps share it. Four tables (16 channels) fill a register. A nibble of
 * weight bits and the number of its group are an index of vpermb, which looks up 64 sums (256 products); vpdpbusd with ones
 * adds those of the four groups. A weight of two bits takes two lookups: level = sum over bits of 2^bit * (+-1).
 *
 * Ranges: 4 max|a| must fit s8, so signed tables go up to 5 bits (PAIRED: 8 max|a| fits as well, and two lookups are added
 * before they are widened). With 6 bits tables are unsigned: sums of the codes whose bit is set, at most 4 * 63. Needs AVX-512
 * F, BW, VL, DQ, VNNI and VBMI. */
#define CHANNEL_BYTES 4
#define ALWAYS_SUMS(conv) is_unsigned(conv)
#define is_unsigned(conv) ((conv)->act_max > 31)
#include "conv/row_driver.h"
#include "conv/epilogue_avx512.h"
#include "simd/dot_avx512vnni.h"

enum { SIGNED, PAIRED, UNSIGNED };  /* modes: see above */

/* How tables are made: for bit j of the entries, which channel each byte takes, and which entries have that bit. */
typedef struct {
    __m512i channel[4];             /* byte 16 g + e: channel 4 g + j */
    __mmask64 mask[4];              /* bit 16 g + e: bit j of e */
} Shuffles;

INLINE Shuffles make_shuffles(void) {
    Shuffles shuffles = {.mask = {0xaaaaaaaaaaaaaaaa, 0xcccccccccccccccc, 0xf0f0f0f0f0f0f0f0, 0xff00ff00ff00ff00}};
    __m512i first = _mm512_maskz_set1_epi32(0x00f0, 0x04040404);
    first = _mm512_mask_set1_epi32(first, 0x0f00, 0x08080808);
    first = _mm512_mask_set1_epi32(first, 0xf000, 0x0c0c0c0c);
    for (int j = 0; j < 4; j++) shuffles.channel[j] = _mm512_add_epi8(first, _mm512_set1_epi8((char)j));
    return shuffles;
}

/* 16 bytes, one for each channel -> four tables of the sums of those whose bit is set. */
INLINE __m512i make_tables(const Shuffles *shuffles, __m128i values) {
    __m512i all = _mm512_broadcast_i32x4(values);
    __m512i x0 = _mm512_maskz_shuffle_epi8(shuffles->mask[0], all, shuffles->channel[0]);
    __m512i x1 = _mm512_maskz_shuffle_epi8(shuffles->mask[1], all, shuffles->channel[1]);
    __m512i x2 = _mm512_maskz_shuffle_epi8(shuffles->mask[2], all, shuffles->channel[2]);
    __m512i x3 = _mm512_maskz_shuffle_epi8(shuffles->mask[3], all, shuffles->channel[3]);
    return _mm512_add_epi8(_mm512_add_epi8(x0, x1), _mm512_add_epi8(x2, x3));
}

/* Sums of +-a from sums of a: twice those whose bit is set, less the sum of all, which is entry 15. */
INLINE __m512i to_signed(__m512i tables) {
    return _mm512_sub_epi8(_mm512_add_epi8(tables, tables), _mm512_shuffle_epi8(tables, _mm512_set1_epi8(15)));
}

/* a = 0: signed tables of zeros, or unsigned ones of the zero point. */
static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    int64_t bytes = conv->channel_block * CHANNEL_BYTES;
    if (!count) return;
    memset(cells, 0, count * bytes);
    if (!is_unsigned(conv)) return;
    Shuffles shuffles = make_shuffles();
    for (int64_t c = 0; c < real; c += 16) {
        __mmask16 mask = c + 16 <= real ? 0xffff : (__mmask16)((1u << (real - c)) - 1);
        _mm512_storeu_si512(cells + 4 * c, make_tables(&shuffles, _mm_maskz_set1_epi8(mask, (char)zero)));
    }
    for (int64_t p = 1; p < count; p++) memcpy(cells + p * bytes, cells, bytes);
}

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums) {
    Shuffles shuffles = make_shuffles();
    float act_zero = conv->act_zero[n * conv->act_stride];
    __m512 inverse = _mm512_set1_ps(1.0f / conv->act_scale[n * conv->act_stride]);
    __m512 low = _mm512_set1_ps(-act_zero), high = _mm512_set1_ps((float)conv->act_max - act_zero);
    __m512i zero = _mm512_set1_epi32((int)act_zero);
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    for (int64_t p = 0; p < count; p++, x += stride) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t c = 0; c < conv->channel_block; c += 16, cells += 64) {
            __mmask16 mask = c + 16 <= real ? 0xffff : c >= real ? 0 : (__mmask16)((1u << (real - c)) - 1);
            __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + c), inverse);
            __m512i a = _mm512_maskz_cvtps_epi32(mask, _mm512_min_ps(_mm512_max_ps(value, low), high));
            if (is_unsigned(conv))
                _mm512_storeu_si512(cells, make_tables(&shuffles, _mm512_cvtepi32_epi8(_mm512_maskz_add_epi32(mask, a, zero))));
            else
                _mm512_storeu_si512(cells, to_signed(make_tables(&shuffles, _mm512_cvtepi32_epi8(a))));
            if (sums) sum = _mm512_add_epi32(sum, a);
        }
        if (sums) sums[p] += _mm512_reduce_add_epi32(sum);
    }
}

/* Weights are used where they are: one bit of each is one bit of an index. */
static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    (void)conv, (void)to, (void)weights;
    return plane + from * plan->weight_bytes / 8;
}

/* Indices of vpermb from 64 bytes of nibbles, [output][group]: those of outputs 0-15 are low, those of outputs 16-31 high. Bits 4
 * and 5 of an index are the group. */
INLINE __m512i low_index(__m512i nibbles) {
    return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi8(15), _mm512_set1_epi32(0x30201000), 0xEA);
}

INLINE __m512i high_index(__m512i nibbles) { return low_index(_mm512_srli_epi16(nibbles, 4)); }

/* Adds the lookups of one bit plane to the sums of P pixels, `stride` bytes apart, and 32 outputs. nibbles: [channel block][tap]
 * [16 channels][16 outputs][4 groups], low nibbles for outputs 0-15, high ones for 16-31. steps: of 16 channels, in a block. */
INLINE void add_lookups(const Row *row, __m512i acc[8][2], const uint8_t *nibbles, const uint8_t *first, const int P,
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

/* Sums of level * a from those of UNSIGNED tables, which are sums of weight code * activation code. With level = 2 * weight
 * code - top and a = activation code - zero they are 2 * sums - top * (sum of activation codes) - zero * weight_sums. */
INLINE __m512i from_unsigned(const Row *row, __m512i sums, const Epilogue *e, int32_t window_sum) {
    int32_t top = (1 << row->conv->bits) - 1, inputs = (int32_t)(row->conv->channels * row->plan->taps);
    __m512i rest = _mm512_set1_epi32(top * (inputs * (int32_t)row->act_zero + window_sum));
    return _mm512_sub_epi32(_mm512_slli_epi32(sums, 1), _mm512_add_epi32(e->zero_sums, rest));
}

/* P pixels from `pixel` on times one output block: bits from the highest down, doubling the sums in between. */
INLINE void multiply_tile(const Row *row, int64_t block, int64_t pixel, const int P, const int steps, const int64_t stride,
                          const int mode) {
    const Plan *plan = row->plan;
    __m512i acc[8][2];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm512_setzero_si512();
    for (int64_t bit = row->conv->bits - 1; bit >= 0; bit--) {
        const uint8_t *nibbles = row->weights + (bit * plan->output_blocks + block - row->first_block) * (plan->weight_bytes / 8);
        add_lookups(row, acc, nibbles, row->cells + pixel * stride, P, steps, stride, mode);
        if (bit == 0) break;
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            acc[p][0] = _mm512_slli_epi32(acc[p][0], 1);
            acc[p][1] = _mm512_slli_epi32(acc[p][1], 1);
        }
    }
    int64_t output = block * OUTPUTS;
    Epilogue e0 = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
    Epilogue e1 = load_epilogue(row->conv, row->plane, output + 16, row->act_scale, row->act_zero, row->bias);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
        const int32_t *window_sum = row->window_sums + pixel + p;
        float *out = row->out + (pixel + p) * row->conv->outputs + output;
        if (mode == UNSIGNED) {
            acc[p][0] = from_unsigned(row, acc[p][0], &e0, *window_sum);
            acc[p][1] = from_unsigned(row, acc[p][1], &e1, *window_sum);
        }
        store_outputs(&e0, acc[p][0], window_sum, out);
        store_outputs(&e1, acc[p][1], window_sum, out + 16);
    }
}

/* The row in tiles of 8 pixels, the rest in tiles of 4, 2 and 1. */
INLINE void multiply_tiles(const Row *row, const int steps, const int64_t stride, const int mode) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        for (int64_t block = row->first_block; block < row->end_block; block++) {
            if (size == 8) multiply_tile(row, block, pixel, 8, steps, stride, mode);
            else if (size == 4) multiply_tile(row, block, pixel, 4, steps, stride, mode);
            else if (size == 2) multiply_tile(row, block, pixel, 2, steps, stride, mode);
            else multiply_tile(row, block, pixel, 1, steps, stride, mode);
        }
    }
}

/* Frequent shapes are compiled with constants. */
static void multiply_row(const Row *row) {
    const ConvParams *conv = row->conv;
    float largest = row->act_zero > (float)conv->act_max - row->act_zero ? row->act_zero : (float)conv->act_max - row->act_zero;
    int64_t stride = conv->stride_w * row->plan->cell_bytes;
    if (is_unsigned(conv) && conv->channel_block == 32) multiply_tiles(row, 2, stride, UNSIGNED);
    else if (is_unsigned(conv)) multiply_tiles(row, 4, stride, UNSIGNED);
    else if (conv->channel_block == 32) multiply_tiles(row, 2, stride, 8 * largest > 127 ? SIGNED : PAIRED);
    else if (8 * largest > 127) multiply_tiles(row, 4, stride, SIGNED);
    else if (conv->stride_w == 1) multiply_tiles(row, 4, 256, PAIRED);
    else multiply_tiles(row, 4, stride, PAIRED);
}
