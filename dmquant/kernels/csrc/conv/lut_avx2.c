/* Convolution by lookup, as lut_avx512.c, in registers of 256 bits: vpshufb looks up 32 outputs in the table of four channels.
 *
 * Tables are unsigned: sums of the codes whose bit is set. As many are added as fit a byte (four up to 4-bit codes, two of 5
 * bits, one of 6), then widened to uint16; those sums are added to int32 before they overflow. Needs AVX2 and FMA. */
#define CHANNEL_BYTES 4
#define ALWAYS_SUMS(conv) 1
#include "conv/epilogue_avx2.h"
#include "conv/row_driver.h"

/* Two tables of two groups of four codes (in both halves of the register). Entry e is the sum of the codes whose bit in e is
 * set: for each bit j a shuffle takes channel j into the entries that have it, and 0 (by a negative index) into the others. */
INLINE __m256i make_tables(__m256i codes) {
    const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 0x04040404, 0x04040404, 0x04040404, 0x04040404);
    const __m256i unset[4] = {
        _mm256_set1_epi16(0x00ff), _mm256_set1_epi32(0x0000ffff), _mm256_set1_epi64x(0x00000000ffffffff),
        _mm256_setr_epi64x(-1, 0, -1, 0),
    };
    __m256i tables = _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
        __m256i channel = _mm256_or_si256(_mm256_add_epi8(first, _mm256_set1_epi8((char)j)), unset[j]);
        tables = _mm256_add_epi8(tables, _mm256_shuffle_epi8(codes, channel));
    }
    return tables;
}

/* Writes the two tables of eight codes, 32 bytes. */
INLINE void store_tables(__m128i codes, uint8_t *cells) {
    _mm256_storeu_si256((__m256i *)cells, make_tables(_mm256_broadcastsi128_si256(codes)));
}

/* a = 0: tables of the zero point. */
static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    int64_t bytes = conv->channel_block * CHANNEL_BYTES;
    uint8_t codes[64] __attribute__((aligned(16))) = {0};
    if (!count) return;
    memset(codes, (int)zero, real);
    for (int64_t c = 0; c < conv->channel_block; c += 8)
        store_tables(_mm_loadl_epi64((const __m128i *)(codes + c)), cells + 4 * c);
    for (int64_t p = 1; p < count; p++) memcpy(cells + p * bytes, cells, bytes);
}

static void quantize_pixels(const ConvParams *conv, int64_t n, int64_t k, const float *x, int64_t stride, int64_t count,
                            uint8_t *cells, int32_t *sums) {
    ActGrid grid = grid_of(conv, n);
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    for (int64_t p = 0; p < count; p++, x += stride) {
        __m256i sum = _mm256_setzero_si256(), a;
        for (int64_t c = 0; c < conv->channel_block; c += 8, cells += 32) {
            store_tables(round_8(&grid, x + c, max(0, real - c), &a), cells);
            sum = _mm256_add_epi32(sum, a);
        }
        sums[p] += reduce_add_8(sum);
    }
}

/* Weights are used where they are: one bit of each is one bit of an index. */
static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    (void)conv, (void)to, (void)weights;
    return plane + from * plan->weight_bytes / 8;
}

/* Adds the uint16 sums of one bit to the int32 sums of 32 outputs, 2^bit times, and clears them. both: even output + 256 * odd
 * output, modulo 2^16; odd: odd outputs. */
INLINE void flush(__m256i *both, __m256i *odd, int bit, int32_t sums[OUTPUTS]) {
    uint16_t of_even[16], of_odd[16];
    _mm256_storeu_si256((__m256i *)of_even, _mm256_sub_epi16(*both, _mm256_slli_epi16(*odd, 8)));
    _mm256_storeu_si256((__m256i *)of_odd, *odd);
    for (int i = 0; i < 16; i++) {
        sums[2 * i] += of_even[i] << bit;
        sums[2 * i + 1] += of_odd[i] << bit;
    }
    *both = *odd = _mm256_setzero_si256();
}

INLINE __m256i look_up(const uint8_t *table, __m256i index) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), index);
}

/* Adds the byte sums of 32 outputs to uint16 sums, as flush() reads them. */
INLINE void widen(__m256i sum, __m256i *both, __m256i *odd) {
    *both = _mm256_add_epi16(*both, sum);
    *odd = _mm256_add_epi16(*odd, _mm256_srli_epi16(sum, 8));
}

/* Adds the lookups of one bit plane to the sums of P pixels and 32 outputs. nibbles: [channel block][tap][16 channels][2 pairs
 * of groups][32 outputs], the low nibble for the first group of the pair. together: lookups whose sum fits a byte. Each step
 * of 16 channels adds up to 16 * act_max to a sum. */
INLINE void add_lookups(const Row *row, const uint8_t *nibbles, const uint8_t *first, int bit, const int P, const int together,
                        int32_t sums[][OUTPUTS]) {
    int64_t stride = row->conv->stride_w * row->plan->cell_bytes, steps = row->conv->channel_block / 16;
    int64_t room = 65535 / (16 * row->conv->act_max), used = 0;       /* steps that fit uint16 */
    const __m256i low = _mm256_set1_epi8(15);
    __m256i both[4], odd[4];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) both[p] = odd[p] = _mm256_setzero_si256();
    for (int64_t i = 0; i < row->num_offsets; i++) {
        const uint8_t *tables = first + row->tap_offsets[i];
        for (int64_t k = 0; k < steps; k++, nibbles += 64, used++) {
            if (used == room) {
                for (int p = 0; p < P; p++) flush(&both[p], &odd[p], bit, sums[p]);
                used = 0;
            }
            __m256i v0 = _mm256_loadu_si256((const __m256i *)nibbles);
            __m256i v1 = _mm256_loadu_si256((const __m256i *)(nibbles + 32));
            __m256i i0 = _mm256_and_si256(v0, low), i1 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), low);
            __m256i i2 = _mm256_and_si256(v1, low), i3 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), low);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                const uint8_t *t = tables + p * stride + 64 * k;
                __m256i s0 = look_up(t, i0), s1 = look_up(t + 16, i1), s2 = look_up(t + 32, i2), s3 = look_up(t + 48, i3);
                if (together == 1) widen(s1, &both[p], &odd[p]), widen(s3, &both[p], &odd[p]);
                if (together >= 2) s0 = _mm256_add_epi8(s0, s1), s2 = _mm256_add_epi8(s2, s3);
                if (together == 4) s0 = _mm256_add_epi8(s0, s2);
                else widen(s2, &both[p], &odd[p]);
                widen(s0, &both[p], &odd[p]);
            }
        }
    }
    for (int p = 0; p < P; p++) flush(&both[p], &odd[p], bit, sums[p]);
}

/* Writes the outputs of a block from sums of weight code * activation code: see from_unsigned() in lut_avx512.c. */
INLINE void store_block(const Row *row, int64_t block, int64_t pixel, const int32_t sums[OUTPUTS]) {
    int32_t top = (1 << row->conv->bits) - 1, inputs = (int32_t)(row->conv->channels * row->plan->taps);
    const int32_t *window_sum = row->window_sums + pixel;
    __m256i rest = _mm256_set1_epi32(top * (inputs * (int32_t)row->act_zero + *window_sum));
    for (int64_t v = 0, output = block * OUTPUTS; v < OUTPUTS; v += 8, output += 8) {
        Epilogue e = load_epilogue(row->conv, row->plane, output, row->act_scale, row->act_zero, row->bias);
        __m256i twice = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(sums + v)), 1);
        twice = _mm256_sub_epi32(twice, _mm256_add_epi32(e.zero_sums, rest));
        store_outputs(&e, twice, window_sum, row->out + pixel * row->conv->outputs + output);
    }
}

/* P pixels from `pixel` on times one output block. */
INLINE void multiply_tile(const Row *row, int64_t block, int64_t pixel, const int P, const int together) {
    const Plan *plan = row->plan;
    int32_t sums[4][OUTPUTS] = {{0}};
    for (int bit = 0; bit < row->conv->bits; bit++) {
        const uint8_t *nibbles = row->weights + (bit * plan->output_blocks + block - row->first_block) * (plan->weight_bytes / 8);
        add_lookups(row, nibbles, row->cells + pixel * row->conv->stride_w * plan->cell_bytes, bit, P, together, sums);
    }
    for (int p = 0; p < P; p++) store_block(row, block, pixel + p, sums[p]);
}

/* The row in tiles of 4 pixels, the rest one by one. */
INLINE void multiply_tiles(const Row *row, const int together) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        size = row->pixels - pixel >= 4 ? 4 : 1;
        for (int64_t block = row->first_block; block < row->end_block; block++) {
            if (size == 4) multiply_tile(row, block, pixel, 4, together);
            else multiply_tile(row, block, pixel, 1, together);
        }
    }
}

static void multiply_row(const Row *row) {
    if (row->conv->act_max <= 15) multiply_tiles(row, 4);
    else if (row->conv->act_max <= 31) multiply_tiles(row, 2);
    else multiply_tiles(row, 1);
}
