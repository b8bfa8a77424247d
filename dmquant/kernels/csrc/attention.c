/* Attention on codes: softmax(q k^T * scale) v, where queries, keys, probabilities and values are rounded to their grids.
 *
 * A product is a sum of u8 codes times s8 levels, whole and exact; a level is a code less `middle`. A score lacks then what its
 * key adds (subtracted as its `excess`) and what its query adds, which is the same for all keys and which no softmax sees.
 * Scores are compared as whole numbers; the softmax is plain C in float, one rounding for each operation written and sums in
 * fixed lanes, so every variant of products.h gives the same bits. */
#ifdef _OPENMP
#include <omp.h>
#endif
#include "memory.h"
#include "normal.h"
#include "products.h"

#define LANES 64                    /* partial sums of a softmax */
#define NEVER (1 << 30)             /* excess of a key that is none */

enum { QUERY, KEY, PROBABILITY, VALUE };

/* What Python hands over; mirrors the structure of attention.py. A head of an image is `channels` floats of each token. */
typedef struct {
    const float *query, *key, *value;
    float *out;                     /* (images, queries, heads, channels) */
    const float *grid_scale, *grid_zero;        /* (4, images, heads) */
    int64_t images, heads, queries, keys, channels;
    int64_t query_image, query_head, query_token;   /* floats from one to the next; channels lie side by side */
    int64_t key_image, key_head, key_token;
    int64_t value_image, value_head, value_token;
    int64_t max_code, threads;
    double scale;                   /* of scores */
} Attention;

typedef struct {
    float scale, inverse, zero, low, high;
    int32_t middle;                 /* as near to the zero as levels of a byte allow */
} Grid;

typedef struct {
    Grid grid[4];
    int64_t image, head;
    int64_t depth, keys;            /* channels and keys with what fills them up */
    uint8_t *key_levels, *value_levels;     /* [block of outputs][group of four][output][4] */
    int32_t *key_excess, *value_excess;     /* of each key, of each channel of a value */
    uint8_t *queries;               /* codes (ROWS, depth) */
    int32_t *scores;                /* (ROWS, score_step) */
    uint8_t *codes;                 /* of probabilities (ROWS, code_step) */
    int64_t score_step, code_step;  /* no power of two: rows would share their places in the cache */
    int32_t sums[ROWS];             /* of the probabilities' a, for each query */
} Head;

/* All blocks of outputs. */
static void multiply_blocks(const Attention *a, const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth,
                            int64_t outputs, int32_t *sums, int64_t width) {
    for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * depth, sums += OUTPUTS)
        multiply(codes, step, levels, depth, a->max_code, sums, width);
}

static Grid grid_of(const Attention *a, int factor, int64_t at) {
    int64_t place = factor * a->images * a->heads + at, zero = (int64_t)a->grid_zero[place];
    Grid grid = {.scale = a->grid_scale[place], .zero = (float)zero, .low = (float)-zero, .high = (float)(a->max_code - zero)};
    grid.inverse = 1.0f / grid.scale;
    grid.middle = (int32_t)most(a->max_code - 127, least(zero, 128));
    return grid;
}

/* The quantizer's expression, clamped before it is rounded: the limits are whole, so the order does not matter. */
INLINE int32_t round_on(const Grid grid, float x) {
    float value = x * grid.inverse;
    value = value > grid.low ? value : grid.low;
    float rounded = (value < grid.high ? value : grid.high) + MAGIC;
    int32_t bits, base = 0x4b400000;        /* of MAGIC */
    memcpy(&bits, &rounded, 4);
    return bits - base;
}

INLINE void encode_part(const Grid grid, const float *x, int32_t middle, uint8_t *codes) {
    for (int l = 0; l < 16; l++) codes[l] = (uint8_t)(round_on(grid, x[l]) + (int32_t)grid.zero - middle);
}

/* Codes of `count` channels, less `middle`. */
static void encode(const Grid grid, const float *x, int64_t count, int32_t middle, uint8_t *codes) {
    if (count < 16) {
        for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)(round_on(grid, x[i]) + (int32_t)grid.zero - middle);
        return;
    }
    for (int64_t i = 0; i < count - 15; i += 16) encode_part(grid, x + i, middle, codes + i);
    encode_part(grid, x + count - 16, middle, codes + count - 16);      /* some of them once more */
}

/* Keys are outputs, their channels the depth. */
static void lay_keys(const Attention *a, const float *key, Head *head) {
    const Grid *grid = &head->grid[KEY];
    uint8_t *row = head->queries;   /* not in use yet */
    memset(head->key_levels, 0, head->keys * head->depth);
    memset(row, 0, head->depth);
    for (int64_t t = 0; t < head->keys; t++) {
        int32_t sum = 0;
        head->key_excess[t] = NEVER;
        if (t >= a->keys) continue;
        encode(*grid, key + t * a->key_token, a->channels, grid->middle, row);
        for (int64_t c = 0; c < a->channels; c++) sum += (int8_t)row[c];
        uint8_t *levels = head->key_levels + t / OUTPUTS * OUTPUTS * head->depth + t % OUTPUTS * 4;
        for (int64_t c = 0; c < a->channels; c += 4) memcpy(levels + OUTPUTS * c, row + c, 4);
        head->key_excess[t] = sum * (int32_t)head->grid[QUERY].zero;
    }
}

/* Channels are outputs, the keys the depth: four at a time. */
static void lay_values(const Attention *a, const float *value, Head *head) {
    const Grid *grid = &head->grid[VALUE];
    int64_t outputs = up(a->channels, OUTPUTS);
    uint8_t *rows = head->queries;  /* not in use yet, and as large */
    memset(head->value_excess, 0, 4 * outputs);
    memset(rows, 0, 4 * head->depth);
    for (int64_t t = 0; t < head->keys; t += 4) {
        for (int64_t i = 0; i < 4; i++) {
            uint8_t *row = rows + i * head->depth;
            if (t + i < a->keys) encode(*grid, value + (t + i) * a->value_token, a->channels, grid->middle, row);
            else memset(row, 0, a->channels);
        }
        const uint8_t *restrict first = rows, *restrict second = first + head->depth;
        const uint8_t *restrict third = second + head->depth, *restrict fourth = third + head->depth;
        for (int64_t c = 0; c < outputs; c += OUTPUTS) {
            uint32_t four[OUTPUTS];
            for (int o = 0; o < OUTPUTS; o++) {
                four[o] = first[c + o] | second[c + o] << 8 | third[c + o] << 16 | (uint32_t)fourth[c + o] << 24;
                head->value_excess[c + o] += (int8_t)first[c + o] + (int8_t)second[c + o];
                head->value_excess[c + o] += (int8_t)third[c + o] + (int8_t)fourth[c + o];
            }
            memcpy(head->value_levels + c * head->keys + 32 * t, four, sizeof four);
        }
    }
    for (int64_t c = 0; c < outputs; c++) head->value_excess[c] *= (int32_t)head->grid[PROBABILITY].zero;
}

/* 2^x for -64 <= x <= 0, to 2e-7. */
INLINE float power(float x) {
    float z = x + MAGIC, f = x - (z - MAGIC), e = 0.00132647271f;
    e = fmaf(e, f, 0.00967151265f);
    e = fmaf(e, f, 0.0555073374f);
    e = fmaf(e, f, 0.240222421f);
    e = fmaf(e, f, 0.693146978f);
    e = fmaf(e, f, 1.0f);
    return scale_by_power(e, z);
}

/* Always in the same order. */
INLINE float sum_lanes(const float lanes[LANES]) {
    float sum[16];
    for (int l = 0; l < 16; l++) sum[l] = (lanes[l] + lanes[l + 16]) + (lanes[l + 32] + lanes[l + 48]);
    float low = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    float high = ((sum[8] + sum[9]) + (sum[10] + sum[11])) + ((sum[12] + sum[13]) + (sum[14] + sum[15]));
    return low + high;
}

/* Scores of one query -> codes of its probabilities; the sum of their a. What is 2^-64 of the best one is as good as none. The
 * scores make room for what becomes of them: a row of them just fits the nearest cache. */
static int32_t soften(const Head *head, float factor, int32_t *restrict scores, uint8_t *restrict codes) {
    const int32_t *restrict excess = head->key_excess;
    const Grid grid = head->grid[PROBABILITY];
    int32_t best = -NEVER, sum = 0;
    float lanes[LANES] = {0};
    for (int64_t t = 0; t < head->keys; t++) {
        scores[t] -= excess[t];
        best = scores[t] > best ? scores[t] : best;
    }
    for (int64_t t = 0; t < head->keys; t += LANES)
        for (int l = 0; l < LANES; l++) {
            float x = (float)(scores[t + l] - best) * factor, share = power(x > -64.0f ? x : -64.0f);
            memcpy(&scores[t + l], &share, 4);
            lanes[l] += share;
        }
    float inverse = 1.0f / sum_lanes(lanes);
    for (int64_t t = 0; t < head->keys; t++) {
        float share;
        memcpy(&share, &scores[t], 4);
        int32_t value = round_on(grid, share * inverse);
        codes[t] = (uint8_t)(value + (int32_t)grid.zero);
        sum += value;
    }
    return sum;
}

/* Up to ROWS queries of a head. */
static void attend(const Attention *a, Head *head, int64_t first) {
    const Grid *query = &head->grid[QUERY], *value = &head->grid[VALUE];
    int64_t count = least(ROWS, a->queries - first), outputs = up(a->channels, OUTPUTS);
    const float *x = a->query + head->image * a->query_image + head->head * a->query_head + first * a->query_token;
    memset(head->queries, 0, ROWS * head->depth);
    for (int64_t i = 0; i < count; i++) encode(*query, x + i * a->query_token, a->channels, 0, head->queries + i * head->depth);
    multiply_blocks(a, head->queries, head->depth, head->key_levels, head->depth, head->keys, head->scores, head->score_step);
    float factor = query->scale * head->grid[KEY].scale * (float)a->scale * 1.44269504f;     /* powers of two, not of e */
    for (int64_t i = 0; i < count; i++)
        head->sums[i] = soften(head, factor, head->scores + i * head->score_step, head->codes + i * head->code_step);
    multiply_blocks(a, head->codes, head->code_step, head->value_levels, head->keys, outputs, head->scores, outputs);
    float scale = head->grid[PROBABILITY].scale * value->scale;
    float *out = a->out + ((head->image * a->queries + first) * a->heads + head->head) * a->channels;
    for (int64_t i = 0; i < count; i++, out += a->heads * a->channels) {
        int32_t shift = head->sums[i] * (value->middle - (int32_t)value->zero);
        const int32_t *sums = head->scores + i * outputs;
        for (int64_t c = 0; c < a->channels; c++) out[c] = (float)(sums[c] - head->value_excess[c] + shift) * scale;
    }
}

static int reserve(const Attention *a, Head *head) {
    int64_t depth = up(a->channels, STEP), keys = up(a->keys, LANES);
    head->depth = depth, head->keys = keys;
    head->score_step = most(keys, depth) + LINE / 4, head->code_step = keys + LINE;
    int64_t rows = ROWS * (depth + 4 * head->score_step + head->code_step);
    uint8_t *next = keep(2 * keys * depth + 4 * (keys + depth) + rows + 8 * LINE);
    if (!next) return 1;
    head->key_levels = take(&next, keys * depth);
    head->value_levels = take(&next, keys * depth);
    head->key_excess = take(&next, 4 * keys);
    head->value_excess = take(&next, 4 * depth);
    head->queries = take(&next, ROWS * depth);
    head->scores = take(&next, 4 * ROWS * head->score_step);
    head->codes = take(&next, ROWS * head->code_step);
    return 0;
}

/* Blocks first..last of ROWS queries, counted through all heads. A head's keys and values are laid by each thread it meets. */
static int work(const Attention *a, int64_t first, int64_t last) {
    Head head = {0};
    int64_t blocks = up(a->queries, ROWS) / ROWS, held = -1;
    if (first >= last) return 0;
    if (reserve(a, &head)) return 1;
    begin_products();
    for (int64_t i = first; i < last; i++) {
        int64_t at = i / blocks;
        if (at != held) {
            head.image = at / a->heads, head.head = at % a->heads, held = at;
            for (int factor = 0; factor < 4; factor++) head.grid[factor] = grid_of(a, factor, at);
            lay_keys(a, a->key + head.image * a->key_image + head.head * a->key_head, &head);
            lay_values(a, a->value + head.image * a->value_image + head.head * a->value_head, &head);
        }
        attend(a, &head, i % blocks * ROWS);
    }
    end_products();
    return 0;
}

int dmquant_run(const Attention *a) {
    int64_t blocks = a->images * a->heads * (up(a->queries, ROWS) / ROWS);
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)least(a->threads, blocks)) if (a->threads > 1) reduction(| : failed)
    {
        int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        failed = work(a, blocks * t / all, blocks * (t + 1) / all);
    }
#else
    failed = work(a, 0, blocks);
#endif
    return failed;
}
