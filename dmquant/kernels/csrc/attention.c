/* Attention on codes: softmax(q k^T * scale) v, where queries, keys, probabilities and values are rounded to their grids.
 *
 * A product is a sum of u8 codes times s8 levels, whole and exact; a level is a code less `middle`. A score lacks then what its
 * key adds (sums start with it) and what its query adds, which is the same for all keys and which no softmax sees. Softmax.h is
 * float, with one rounding for each operation and sums in fixed lanes, so every variant gives the same bits. */
#ifdef _OPENMP
#include <omp.h>
#endif
#include "products.h"
#include "softmax.h"

#define CHUNK 256                   /* keys at a time: their scores stay in the nearest cache */
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
    uint8_t *queries;               /* codes (ROWS, depth) */
    int32_t *sums;                  /* (ROWS, SUMS): scores of a chunk, then products with values */
    Part *parts;                    /* (ROWS, chunks) */
    float *shares;                  /* (ROWS, share_step) */
    uint8_t *codes;                 /* of probabilities (ROWS, code_step) */
    int64_t sum_step, share_step, code_step;    /* no power of two: rows would share their places in the cache */
} Head;

/* Blocks of outputs. */
static void multiply_blocks(const Attention *a, const uint8_t *codes, int64_t step, const uint8_t *levels, int64_t depth,
                            const int32_t *start, int64_t outputs, int32_t *sums, int64_t width) {
    for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * depth)
        multiply(codes, step, levels, depth, a->max_code, start + o, sums + o, width);
}

static Grid grid_of(const Attention *a, int factor, int64_t at) {
    int64_t place = factor * a->images * a->heads + at, zero = (int64_t)a->grid_zero[place];
    Grid grid = {.scale = a->grid_scale[place], .zero = (float)zero, .low = (float)-zero, .high = (float)(a->max_code - zero)};
    grid.inverse = 1.0f / grid.scale;
    grid.middle = (int32_t)most(a->max_code - 127, least(zero, 128));
    return grid;
}

/* The quantizer's expression for LANES channels, clamped before it is rounded: the limits are whole, so the order does not
 * matter. The lowest byte of MAGIC is zero: what is added to it shows in that byte. */
INLINE void encode_part(const Grid grid, const float *x, int32_t middle, uint8_t *codes) {
    Floats value = larger(times(load(x), all(grid.inverse)), all(grid.low));
    value = add(smaller(value, all(grid.high)), all(MAGIC));
    store_bytes(codes, add_ints(bits_of(value), all_ints((int32_t)grid.zero - middle)));
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

/* Keys are outputs, their channels the depth. */
static void lay_keys(const Attention *a, const float *key, Head *head) {
    const Grid *grid = &head->grid[KEY];
    uint8_t *row = head->queries;   /* not in use yet */
    memset(head->key_levels, 0, head->keys * head->depth);
    memset(row, 0, head->depth);
    for (int64_t t = 0; t < head->keys; t++) {
        int32_t sum = 0;
        head->key_start[t] = NEVER;
        if (t >= a->keys) continue;
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
    int64_t outputs = up(a->channels, OUTPUTS);
    uint8_t *rows = head->queries;  /* not in use yet, and as large */
    memset(head->value_start, 0, 4 * outputs);
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
                head->value_start[c + o] += (int8_t)first[c + o] + (int8_t)second[c + o];
                head->value_start[c + o] += (int8_t)third[c + o] + (int8_t)fourth[c + o];
            }
            memcpy(head->value_levels + c * head->keys + 32 * t, four, sizeof four);
        }
    }
    for (int64_t c = 0; c < outputs; c++) head->value_start[c] *= -(int32_t)head->grid[PROBABILITY].zero;
}

/* Shares of the scores of `count` queries in all keys. */
static void score(const Attention *a, Head *head, float factor, int64_t count) {
    for (int64_t i = 0; i < head->chunks; i++) {
        int64_t first = i * CHUNK, keys = least(CHUNK, a->keys - first);
        multiply_blocks(a, head->queries, head->depth, head->key_levels + first * head->depth, head->depth,
                        head->key_start + first, keys, head->sums, head->sum_step);
        for (int64_t q = 0; q < count; q++)
            share_out(head->sums + q * head->sum_step, factor, keys, head->shares + q * head->share_step + first,
                      head->parts + q * head->chunks + i);
    }
}

/* Codes of the probabilities of query q, from its shares; the sum of their a. */
static int32_t soften(const Attention *a, const Head *head, float factor, int64_t q) {
    Part *parts = head->parts + q * head->chunks;
    const Grid grid = head->grid[PROBABILITY];
    Floats inverse = all(weigh(parts, head->chunks, factor) * grid.inverse), zero = all(MAGIC + grid.zero);
    Floats limit = all(MAGIC + (float)a->max_code);
    Ints sums = all_ints(0);
    for (int64_t i = 0; i < head->chunks; i++) {
        int64_t first = i * CHUNK, keys = least(CHUNK, a->keys - first);
        sums = round_shares(head->shares + q * head->share_step + first, keys, times(load(parts[i].weight), inverse), zero, limit,
                            head->codes + q * head->code_step + first, sums);
    }
    return (int32_t)sum_lanes(to_floats(sums));     /* below 2^24: exact */
}

/* Up to ROWS queries of a head. */
static void attend(const Attention *a, Head *head, int64_t first) {
    const Grid *query = &head->grid[QUERY], *value = &head->grid[VALUE];
    int64_t count = least(ROWS, a->queries - first), outputs = up(a->channels, OUTPUTS);
    const float *x = a->query + head->image * a->query_image + head->head * a->query_head + first * a->query_token;
    int32_t shifts[ROWS];
    float *out = a->out + ((head->image * a->queries + first) * a->heads + head->head) * a->channels;
    for (int64_t i = 0; i < ROWS; i++)      /* what is read next and written last lies far apart */
        for (int64_t c = 0; c < a->channels; c += LINE / 4) {
            __builtin_prefetch(x + (i + ROWS) * a->query_token + c);
            __builtin_prefetch(out + i * a->heads * a->channels + c, 1);
        }
    for (int64_t i = 0; i < count; i++) encode(*query, x + i * a->query_token, a->channels, 0, head->queries + i * head->depth);
    float factor = query->scale * head->grid[KEY].scale * (float)a->scale * 1.44269504f;     /* powers of two, not of e */
    factor = factor < 64.0f ? factor : 64.0f;
    score(a, head, factor, count);
    for (int64_t i = 0; i < count; i++) shifts[i] = soften(a, head, factor, i) * (value->middle - (int32_t)value->zero);
    multiply_blocks(a, head->codes, head->code_step, head->value_levels, head->keys, head->value_start, outputs, head->sums,
                    head->sum_step);
    float scale = head->grid[PROBABILITY].scale * value->scale;
    for (int64_t i = 0; i < count; i++, out += a->heads * a->channels) {
        const int32_t *sums = head->sums + i * head->sum_step;
        for (int64_t c = 0; c < a->channels; c++) out[c] = (float)(sums[c] + shifts[i]) * scale;
    }
}

static int reserve(const Attention *a, Head *head) {
    int64_t depth = up(a->channels, STEP), keys = up(a->keys, STEP), room = up(keys, CHUNK);
    head->depth = depth, head->keys = keys, head->chunks = room / CHUNK;
    head->sum_step = most(CHUNK, depth) + LINE / 4, head->share_step = keys + LINE / 4, head->code_step = keys + LINE;
    int64_t parts = ROWS * head->chunks * (int64_t)sizeof(Part);
    int64_t rows = ROWS * (depth + 4 * head->sum_step + 4 * head->share_step + head->code_step);
    uint8_t *next = keep(2 * keys * depth + 4 * (keys + depth) + parts + rows + 10 * LINE);
    if (!next) return 1;
    head->key_levels = take(&next, keys * depth);
    head->value_levels = take(&next, keys * depth);
    head->key_start = take(&next, 4 * keys);
    head->value_start = take(&next, 4 * depth);
    head->queries = take(&next, ROWS * depth);
    head->sums = take(&next, 4 * ROWS * head->sum_step);
    head->parts = take(&next, parts);
    head->shares = take(&next, 4 * ROWS * head->share_step);
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
            memset(head.queries, 0, ROWS * head.depth);
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
