/* One head of one image: its grids, its keys and values as levels in the layout of gemm_u8s8.h, and scratch memory. */
#ifndef DMQUANT_ATTENTION_HEAD_H
#define DMQUANT_ATTENTION_HEAD_H
#include "attention/gemm_u8s8.h"
#include "attention/params.h"
#include "attention/softmax.h"
#include "simd/float_bits.h"
#include "simd/scratch.h"

#define AHEAD 16                    /* tokens: distance of prefetches of keys and values */
#define NO_KEY (-(1 << 30))         /* score of the keys that fill the last block up */
#define CHUNK_EXPS (ROWS * CHUNK)   /* exponentials of a chunk */

/* The grid of one operand. A value is (code - zero) * scale, and level = code - level_zero is what fits s8. */
typedef struct {
    float scale, inverse;           /* inverse: 1 / scale */
    float zero;
    float low, high;                /* limits of code - zero: -zero and max_code - zero */
    int32_t level_zero;             /* the zero point, limited to max_code - 127..128 */
} Grid;

/* Arrays of one thread; each begins at a cache line. */
typedef struct {
    Grid grid[4];
    int64_t image, head;
    int64_t depth;                  /* channels, rounded up to DEPTH_STEP */
    int64_t keys;                   /* keys, rounded up to DEPTH_STEP */
    int64_t chunks;                 /* of CHUNK keys */
    uint8_t *key_levels;            /* [keys / OUTPUTS][depth / 4][OUTPUTS keys][4 channels] */
    uint8_t *value_levels;          /* [channels / OUTPUTS][keys / 4][OUTPUTS channels][4 keys] */
    int32_t *key_start;             /* (keys): what the scores of a key start with */
    int32_t *value_start;           /* (depth): what the outputs of a channel start with */
    uint8_t *row;                   /* (4, depth): codes or levels of four tokens */
    uint8_t *queries;               /* [depth / SPAN][ROWS][SPAN]: codes of ROWS queries */
    int32_t *sums;                  /* (ROWS, sum_step): scores of a chunk, later sums of outputs */
    int64_t sum_step;
    float *exps;                    /* (chunks, ROWS, CHUNK); later codes of probabilities in the first quarter of each chunk */
    float *exp_sums;                /* (ROWS, LANES): partial sums of exponentials over the keys */
    float *shifts;                  /* (ROWS): pivot * factor, subtracted from score * factor */
} Head;

/* Returns 0, or 1 if memory runs out. */
static int alloc_head(const AttentionParams *attn, Head *head) {
    int64_t depth = round_up(attn->channels, DEPTH_STEP), keys = round_up(attn->keys, DEPTH_STEP), wide = round_up(depth, SPAN);
    head->depth = depth, head->keys = keys, head->chunks = round_up(keys, CHUNK) / CHUNK;
    head->sum_step = max(CHUNK, round_up(depth, OUTPUTS));
    int64_t sums = 4 * ROWS * head->sum_step, exps = 4 * head->chunks * CHUNK_EXPS;
    int64_t rows = 4 * wide + ROWS * (wide + 4 * LANES + 4) + sums + exps;
    uint8_t *next = alloc(2 * keys * depth + 4 * (keys + depth) + rows + 10 * CACHE_LINE);
    if (!next) return 1;
    head->key_levels = carve(&next, keys * depth);
    head->value_levels = carve(&next, keys * depth);
    head->key_start = carve(&next, 4 * keys);
    head->value_start = carve(&next, 4 * depth);
    head->row = carve(&next, 4 * wide);
    head->queries = carve(&next, ROWS * wide);
    head->sums = carve(&next, sums);
    head->exps = carve(&next, exps);
    head->exp_sums = carve(&next, 4 * ROWS * LANES);
    head->shifts = carve(&next, 4 * ROWS);
    return 0;
}

/* index: image * heads + head. */
static Grid grid_of(const AttentionParams *attn, int operand, int64_t index) {
    int64_t at = operand * attn->images * attn->heads + index, zero = (int64_t)attn->grid_zero[at];
    Grid grid = {.scale = attn->grid_scale[at], .zero = (float)zero, .low = (float)-zero, .high = (float)(attn->max_code - zero)};
    grid.inverse = 1.0f / grid.scale;
    grid.level_zero = (int32_t)max(attn->max_code - 127, min(zero, 128));
    return grid;
}

/* Writes code - level_zero of LANES channels as bytes. Values are clamped before they are rounded: the limits are integers, so
 * the result is that of the quantizers. Adding MAGIC rounds, and the lowest byte of the float is then code - zero, modulo 256. */
INLINE void quantize_lanes(const Grid grid, const float *x, int32_t level_zero, uint8_t *codes) {
    F32x16 value = max_f32(mul_f32(load_f32(x), set1_f32(grid.inverse)), set1_f32(grid.low));
    value = add_f32(min_f32(value, set1_f32(grid.high)), set1_f32(MAGIC));
    store_u8(codes, add_i32(f32_as_i32(value), set1_i32((int32_t)grid.zero - level_zero)));
}

/* The same for `count` channels; level_zero 0 gives codes. */
static void quantize_token(const Grid grid, const float *x, int64_t count, int32_t level_zero, uint8_t *codes) {
    if (count < LANES) {
        float padded[LANES] = {0};
        uint8_t found[LANES];
        memcpy(padded, x, 4 * count);
        quantize_lanes(grid, padded, level_zero, found);
        memcpy(codes, found, count);
        return;
    }
    for (int64_t i = 0; i < count - LANES + 1; i += LANES) quantize_lanes(grid, x + i, level_zero, codes + i);
    quantize_lanes(grid, x + count - LANES, level_zero, codes + count - LANES);     /* the last ones, some a second time */
}

/* Prefetches a token: tokens of a head lie far apart. */
INLINE void prefetch_token(const float *x, int64_t channels) {
    for (int64_t c = 0; c < channels; c += CACHE_LINE / 4) __builtin_prefetch(x + c);
}

/* Keys -> key_levels, with keys as outputs and channels as depth, and key_start = -(zero of queries) * sum of levels. */
static void pack_keys(const AttentionParams *attn, const float *key, Head *head) {
    const Grid *grid = &head->grid[KEY];
    uint8_t *row = head->row;
    memset(head->key_levels, 0, head->keys * head->depth);
    memset(row, 0, head->depth);
    for (int64_t t = 0; t < head->keys; t++) {
        int32_t sum = 0;
        head->key_start[t] = NO_KEY;
        if (t >= attn->keys) continue;
        prefetch_token(key + (t + AHEAD) * attn->key_token, attn->channels);
        quantize_token(*grid, key + t * attn->key_token, attn->channels, grid->level_zero, row);
        for (int64_t c = 0; c < attn->channels; c++) sum += (int8_t)row[c];
        uint8_t *levels = head->key_levels + t / OUTPUTS * OUTPUTS * head->depth + t % OUTPUTS * 4;
        for (int64_t c = 0; c < attn->channels; c += 4) memcpy(levels + OUTPUTS * c, row + c, 4);
        head->key_start[t] = -sum * (int32_t)head->grid[QUERY].zero;
    }
}

/* Values -> value_levels, with channels as outputs and keys as depth, four keys at a time, and value_start = -(zero of
 * probabilities) * sum of levels. */
static void pack_values(const AttentionParams *attn, const float *value, Head *head) {
    const Grid *grid = &head->grid[VALUE];
    int64_t outputs = round_up(attn->channels, OUTPUTS);
    uint8_t *rows = head->row;
    memset(head->value_start, 0, 4 * outputs);
    memset(rows, 0, 4 * head->depth);
    for (int64_t t = 0; t < head->keys; t += 4) {
        for (int64_t i = 0; i < 4; i++) {
            uint8_t *row = rows + i * head->depth;
            prefetch_token(value + (t + i + AHEAD) * attn->value_token, attn->channels);
            if (t + i < attn->keys)
                quantize_token(*grid, value + (t + i) * attn->value_token, attn->channels, grid->level_zero, row);
            else
                memset(row, 0, attn->channels);
        }
        const uint8_t *restrict first = rows, *restrict second = first + head->depth;
        const uint8_t *restrict third = second + head->depth, *restrict fourth = third + head->depth;
        for (int64_t c = 0; c < outputs; c += OUTPUTS) {
            uint32_t four[OUTPUTS];
            for (int o = 0; o < OUTPUTS; o++) {
                four[o] = first[c + o] | second[c + o] << 8 | third[c + o] << 16 | (uint32_t)fourth[c + o] << 24;
                head->value_start[c + o] += (int8_t)first[c + o] + (int8_t)second[c + o];
                head->value_start[c + o] += (int8_t)third[c + o] + (int8_t)fourth[c + o];
            }
            memcpy(head->value_levels + c * head->keys + 32 * t, four, sizeof four);
        }
    }
    for (int64_t c = 0; c < outputs; c++) head->value_start[c] *= -(int32_t)head->grid[PROBABILITY].zero;
}
#endif
