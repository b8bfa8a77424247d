/* Attention on codes: softmax(q k^T * scale) v, where queries, keys, probabilities and values are rounded to their grids.
 *
 * A product is a sum of u8 codes times s8 levels, whole and exact; a level is a code less `middle`. A score lacks then what its
 * key adds (sums start with it) and what its query adds, which is the same for all keys and which no softmax sees. Softmax.h is
 * float, with one rounding for each operation and sums in fixed lanes, so every variant gives the same bits. */
#ifdef _OPENMP
#include <omp.h>
#endif
#include "attention/gemm_u8s8.h"
#include "attention/softmax.h"
#include "simd/float_bits.h"

#define AHEAD 16                    /* tokens: how far keys and values are fetched before they are read */
#define NEVER (-(1 << 30))          /* score of a key that is none */

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
    int64_t chunks;                 /* of keys */
    uint8_t *key_levels, *value_levels;     /* [block of outputs][group of four][output][4] */
    int32_t *key_start, *value_start;       /* of the sums of each key, of each channel of a value */
    uint8_t *row;                   /* codes of four tokens, as they come */
    uint8_t *queries;               /* codes of ROWS */
    int32_t *sums;                  /* (ROWS, sum_step): scores of a chunk, then products with values */
    int64_t sum_step;
    float *shares;                  /* (chunks, ROWS, CHUNK), later codes of probabilities in the first quarter of each chunk */
    float *totals;                  /* of the shares (ROWS, LANES) */
    float *shifts;                  /* (ROWS): what is taken off scores times their factor */
} Head;

#define SHARES (ROWS * CHUNK)       /* of a chunk */


static Grid grid_of(const Attention *a, int factor, int64_t at) {
    int64_t place = factor * a->images * a->heads + at, zero = (int64_t)a->grid_zero[place];
    Grid grid = {.scale = a->grid_scale[place], .zero = (float)zero, .low = (float)-zero, .high = (float)(a->max_code - zero)};
    grid.inverse = 1.0f / grid.scale;
    grid.middle = (int32_t)max(a->max_code - 127, min(zero, 128));
    return grid;
}

/* The quantizer's expression for LANES channels, clamped before it is rounded: the limits are whole, so the order does not
 * matter. The lowest byte of MAGIC is zero: what is added to it shows in that byte. */
INLINE void encode_part(const Grid grid, const float *x, int32_t middle, uint8_t *codes) {
    F32x16 value = max_f32(mul_f32(load_f32(x), set1_f32(grid.inverse)), set1_f32(grid.low));
    value = add_f32(min_f32(value, set1_f32(grid.high)), set1_f32(MAGIC));
    store_u8(codes, add_i32(f32_as_i32(value), set1_i32((int32_t)grid.zero - middle)));
}

/* Codes of `count` channels, less `middle`. */
static void encode(const Grid grid, const float *x, int64_t count, int32_t middle, uint8_t *codes) {
    if (count < LANES) {
        float some[LANES] = {0};
        uint8_t found[LANES];
        memcpy(some, x, 4 * count);
        encode_part(grid, some, middle, found);
        memcpy(codes, found, count);
        return;
    }
    for (int64_t i = 0; i < count - LANES + 1; i += LANES) encode_part(grid, x + i, middle, codes + i);
    encode_part(grid, x + count - LANES, middle, codes + count - LANES);    /* some of them once more */
}

/* A token, some time before it is read or written: tokens of a head lie far apart. */
INLINE void fetch(const float *x, int64_t channels) {
    for (int64_t c = 0; c < channels; c += CACHE_LINE / 4) __builtin_prefetch(x + c);
}

/* Keys are outputs, their channels the depth. */
static void lay_keys(const Attention *a, const float *key, Head *head) {
    const Grid *grid = &head->grid[KEY];
    uint8_t *row = head->row;
    memset(head->key_levels, 0, head->keys * head->depth);
    memset(row, 0, head->depth);
    for (int64_t t = 0; t < head->keys; t++) {
        int32_t sum = 0;
        head->key_start[t] = NEVER;
        if (t >= a->keys) continue;
        fetch(key + (t + AHEAD) * a->key_token, a->channels);
        encode(*grid, key + t * a->key_token, a->channels, grid->middle, row);
        for (int64_t c = 0; c < a->channels; c++) sum += (int8_t)row[c];
        uint8_t *levels = head->key_levels + t / OUTPUTS * OUTPUTS * head->depth + t % OUTPUTS * 4;
        for (int64_t c = 0; c < a->channels; c += 4) memcpy(levels + OUTPUTS * c, row + c, 4);
        head->key_start[t] = -sum * (int32_t)head->grid[QUERY].zero;
    }
}

/* Channels are outputs, the keys the depth: four at a time. */
static void lay_values(const Attention *a, const float *value, Head *head) {
    const Grid *grid = &head->grid[VALUE];
    int64_t outputs = round_up(a->channels, OUTPUTS);
    uint8_t *rows = head->row;
    memset(head->value_start, 0, 4 * outputs);
    memset(rows, 0, 4 * head->depth);
    for (int64_t t = 0; t < head->keys; t += 4) {
        for (int64_t i = 0; i < 4; i++) {
            uint8_t *row = rows + i * head->depth;
            fetch(value + (t + i + AHEAD) * a->value_token, a->channels);
            if (t + i < a->keys) encode(*grid, value + (t + i) * a->value_token, a->channels, grid->middle, row);
            else memset(row, 0, a->channels);
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

/* Scores of ROWS queries in chunk i of keys. */
static void score(const Attention *a, const Head *head, int64_t i) {
    int64_t first = i * CHUNK;
    gemm_u8s8(head->queries, ROWS * SPAN, head->key_levels + first * head->depth, head->depth, a->max_code,
             head->key_start + first, min(CHUNK, a->keys - first), head->sums, head->sum_step);
}

/* The best score of a query in chunk i of keys becomes its pivot, unless it has a better one. */
static void find_pivot(const Attention *a, const Head *head, float factor, int64_t q, int64_t i) {
    float shift = best_of(head->sums + q * head->sum_step, min(CHUNK, a->keys - i * CHUNK)) * factor;
    head->shifts[q] = i && head->shifts[q] > shift ? head->shifts[q] : shift;
}

/* Whether a query's shares are not too large for its pivot. */
INLINE int is_right(const Head *head, int64_t q) { return reduce_add(load_f32(head->totals + q * LANES)) < TOO_MUCH; }

/* Shares of `count` queries in all keys, by known pivots or by those of the first chunk. Whether none is too large. */
static int share(const Attention *a, const Head *head, float factor, int64_t count, int has_pivots) {
    F32x16 steep = set1_f32(factor);
    int are_right = 1;
    memset(head->totals, 0, 4 * ROWS * LANES);
    for (int64_t i = 0; i < head->chunks; i++) {
        int64_t keys = a->keys - i * CHUNK, step = head->sum_step;
        float *shares = head->shares + i * SHARES;
        score(a, head, i);
        for (int64_t q = 0; q < count && !i && !has_pivots; q++) find_pivot(a, head, factor, q, i);
        for (int64_t q = 0; q < count && keys >= CHUNK; q++)
            share_out(head->sums + q * step, steep, head->shifts[q], CHUNK, shares + q * CHUNK, head->totals + q * LANES);
        for (int64_t q = 0; q < count && keys < CHUNK; q++)
            share_out(head->sums + q * step, steep, head->shifts[q], keys, shares + q * CHUNK, head->totals + q * LANES);
    }
    for (int64_t q = 0; q < count; q++) are_right &= is_right(head, q);
    return are_right;
}

/* Shares of `count` queries -> codes of their probabilities, in place; the sums of their a. */
static void soften(const Attention *a, const Head *head, int64_t count, int32_t *sums) {
    const Grid grid = head->grid[PROBABILITY];
    U8Vec zero = set1_u8((int64_t)grid.zero), limit = set1_u8(a->max_code);
    int32_t lanes[ROWS][LANES] = {{0}};
    float factors[ROWS];
    for (int64_t q = 0; q < count; q++) factors[q] = 1.0f / reduce_add(load_f32(head->totals + q * LANES)) * grid.inverse;
    for (int64_t i = 0; i < head->chunks; i++) {
        const float *shares = head->shares + i * SHARES;
        uint8_t *codes = (uint8_t *)shares;
        for (int64_t q = 0; q < count; q++) {   /* a row of codes ends before the next row of shares begins */
            I32x16 found = round_shares(shares + q * CHUNK, factors[q], zero, limit, codes + q * SPAN);
            store_i32(lanes[q], add_i32(load_i32(lanes[q]), found));
        }
    }
    for (int64_t q = 0; q < count; q++) {
        sums[q] = (int32_t)-grid.zero * (int32_t)(head->chunks * CHUNK);
        for (int l = 0; l < LANES; l++) sums[q] += lanes[q][l];
    }
}

/* Up to ROWS queries of a head. */
static void attend(const Attention *a, Head *head, int64_t first) {
    const Grid *query = &head->grid[QUERY], *value = &head->grid[VALUE];
    int64_t count = min(ROWS, a->queries - first);
    const float *x = a->query + head->image * a->query_image + head->head * a->query_head + first * a->query_token;
    int32_t shifts[ROWS];
    float *out = a->out + ((head->image * a->queries + first) * a->heads + head->head) * a->channels;
    for (int64_t i = 0; i < ROWS; i++) {    /* the queries after these */
        fetch(x + (i + ROWS) * a->query_token, a->channels);
        fetch(out + i * a->heads * a->channels, a->channels);
    }
    memset(head->row, 0, head->depth);
    for (int64_t i = 0; i < count; i++) {
        encode(*query, x + i * a->query_token, a->channels, 0, head->row);
        for (int64_t c = 0; c < a->channels; c += SPAN)
            memcpy(head->queries + c * ROWS + i * SPAN, head->row + c, SPAN);
    }
    float factor = query->scale * head->grid[KEY].scale * (float)a->scale * 1.44269504f;     /* powers of two, not of e */
    factor = factor < 64.0f ? factor : 64.0f;
    unsigned mode = flush_denormals();
    if (!share(a, head, factor, count, 0)) {
        for (int64_t i = 0; i < head->chunks; i++) {
            score(a, head, i);
            for (int64_t q = 0; q < count; q++)     /* no query's pivot depends on which others come with it */
                if (!is_right(head, q)) find_pivot(a, head, factor, q, i);
        }
        share(a, head, factor, count, 1);
    }
    soften(a, head, count, shifts);
    restore_denormals(mode);
    gemm_u8s8((uint8_t *)head->shares, 4 * SHARES, head->value_levels, head->keys, a->max_code, head->value_start, a->channels,
             head->sums, head->sum_step);
    float scale = head->grid[PROBABILITY].scale * value->scale;
    for (int64_t i = 0; i < count; i++, out += a->heads * a->channels) {
        const int32_t *sums = head->sums + i * head->sum_step;
        int32_t shift = shifts[i] * (value->middle - (int32_t)value->zero);
        for (int64_t c = 0; c < a->channels; c++) out[c] = (float)(sums[c] + shift) * scale;
    }
}

static int alloc_scratch(const Attention *a, Head *head) {
    int64_t depth = round_up(a->channels, STEP), keys = round_up(a->keys, STEP), wide = round_up(depth, SPAN);
    head->depth = depth, head->keys = keys, head->chunks = round_up(keys, CHUNK) / CHUNK;
    head->sum_step = max(CHUNK, round_up(depth, OUTPUTS));
    int64_t sums = 4 * ROWS * head->sum_step, shares = 4 * head->chunks * SHARES;
    int64_t rows = 4 * wide + ROWS * (wide + 4 * LANES + 4) + sums + shares;
    uint8_t *next = alloc(2 * keys * depth + 4 * (keys + depth) + rows + 10 * CACHE_LINE);
    if (!next) return 1;
    head->key_levels = carve(&next, keys * depth);
    head->value_levels = carve(&next, keys * depth);
    head->key_start = carve(&next, 4 * keys);
    head->value_start = carve(&next, 4 * depth);
    head->row = carve(&next, 4 * wide);
    head->queries = carve(&next, ROWS * wide);
    head->sums = carve(&next, sums);
    head->shares = carve(&next, shares);
    head->totals = carve(&next, 4 * ROWS * LANES);
    head->shifts = carve(&next, 4 * ROWS);
    return 0;
}

/* Blocks first..last of ROWS queries, counted through all heads. A head's keys and values are laid by each thread it meets. */
static int work(const Attention *a, int64_t first, int64_t last) {
    Head head = {0};
    int64_t blocks = round_up(a->queries, ROWS) / ROWS, held = -1;
    if (first >= last) return 0;
    if (alloc_scratch(a, &head)) return 1;
    begin_products();
    for (int64_t i = first; i < last; i++) {
        int64_t at = i / blocks;
        if (at != held) {
            head.image = at / a->heads, head.head = at % a->heads, held = at;
            for (int factor = 0; factor < 4; factor++) head.grid[factor] = grid_of(a, factor, at);
            lay_keys(a, a->key + head.image * a->key_image + head.head * a->key_head, &head);
            lay_values(a, a->value + head.image * a->value_image + head.head * a->value_head, &head);
            memset(head.queries, 0, ROWS * round_up(head.depth, SPAN));
        }
        attend(a, &head, i % blocks * ROWS);
    }
    end_products();
    return 0;
}

int dmquant_run(const Attention *a) {
    int64_t blocks = a->images * a->heads * (round_up(a->queries, ROWS) / ROWS);
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)min(a->threads, blocks)) if (a->threads > 1) reduction(| : failed)
    {
        int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        failed = work(a, blocks * t / all, blocks * (t + 1) / all);
    }
#else
    failed = work(a, 0, blocks);
#endif
    return failed;
}
