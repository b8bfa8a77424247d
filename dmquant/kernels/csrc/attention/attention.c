/* Attention on codes: softmax(q k^T * scale) v, with queries, keys, probabilities and values rounded to grids of their own.
 *
 * Products are exact integers, sums of u8 codes times s8 levels. Of the score sum (code_q - zero_q) * (code_k - zero_k) over
 * the channels, with code_k = level + level_zero, the kernel computes
 *     sum code_q * level + key_start,  key_start = -zero_q * sum level.
 * The rest, (level_zero - zero_k) * sum (code_q - zero_q), is the same for all keys and does not change the softmax. The
 * softmax is float32, each operation is rounded once and sums have a fixed order, so every variant gives the same bits. */
#ifdef _OPENMP
#include <omp.h>
#endif
#include "attention/head.h"

/* Scores of ROWS queries in chunk i of keys -> head->sums. */
static void compute_scores(const AttentionParams *attn, const Head *head, int64_t i) {
    int64_t first = i * CHUNK;
    gemm_u8s8(head->queries, ROWS * SPAN, head->key_levels + first * head->depth, head->depth, attn->max_code,
              head->key_start + first, min(CHUNK, attn->keys - first), head->sums, head->sum_step);
}

/* Raises the shift of query q to its largest score in chunk i of keys; chunk 0 sets it. */
static void raise_shift(const AttentionParams *attn, const Head *head, float factor, int64_t q, int64_t i) {
    float shift = max_score(head->sums + q * head->sum_step, min(CHUNK, attn->keys - i * CHUNK)) * factor;
    head->shifts[q] = i && head->shifts[q] > shift ? head->shifts[q] : shift;
}

/* Whether the exponentials of query q have not overflowed. */
INLINE int is_in_range(const Head *head, int64_t q) {
    return reduce_add(load_f32(head->exp_sums + q * LANES)) < EXP_SUM_LIMIT;
}

/* Exponentials of `count` queries and all keys -> head->exps, and their sums. Shifts are those given, or else the largest
 * scores of the first chunk. Returns whether all are in range. */
static int exp_queries(const AttentionParams *attn, const Head *head, float factor, int64_t count, int has_shifts) {
    F32x16 factors = set1_f32(factor);
    int are_in_range = 1;
    memset(head->exp_sums, 0, 4 * ROWS * LANES);
    for (int64_t i = 0; i < head->chunks; i++) {
        int64_t keys = attn->keys - i * CHUNK, step = head->sum_step;
        float *exps = head->exps + i * CHUNK_EXPS;
        compute_scores(attn, head, i);
        for (int64_t q = 0; q < count && !i && !has_shifts; q++) raise_shift(attn, head, factor, q, i);
        for (int64_t q = 0; q < count && keys >= CHUNK; q++)
            exp_chunk(head->sums + q * step, factors, head->shifts[q], CHUNK, exps + q * CHUNK, head->exp_sums + q * LANES);
        for (int64_t q = 0; q < count && keys < CHUNK; q++)
            exp_chunk(head->sums + q * step, factors, head->shifts[q], keys, exps + q * CHUNK, head->exp_sums + q * LANES);
    }
    for (int64_t q = 0; q < count; q++) are_in_range &= is_in_range(head, q);
    return are_in_range;
}

/* Exponentials of `count` queries -> codes of their probabilities, in place: the SPAN bytes of a query's codes end before the
 * floats of the next query begin. Writes the sums over the keys of code - zero to sums (count). */
static void quantize_rows(const AttentionParams *attn, const Head *head, int64_t count, int32_t *sums) {
    const Grid grid = head->grid[PROBABILITY];
    U8Vec zero = set1_u8((int64_t)grid.zero), limit = set1_u8(attn->max_code);
    int32_t lanes[ROWS][LANES] = {{0}};
    float factors[ROWS];
    for (int64_t q = 0; q < count; q++) factors[q] = 1.0f / reduce_add(load_f32(head->exp_sums + q * LANES)) * grid.inverse;
    for (int64_t i = 0; i < head->chunks; i++) {
        const float *exps = head->exps + i * CHUNK_EXPS;
        uint8_t *codes = (uint8_t *)exps;
        for (int64_t q = 0; q < count; q++) {
            I32x16 found = quantize_probabilities(exps + q * CHUNK, factors[q], zero, limit, codes + q * SPAN);
            store_i32(lanes[q], add_i32(load_i32(lanes[q]), found));
        }
    }
    for (int64_t q = 0; q < count; q++) {
        sums[q] = (int32_t)-grid.zero * (int32_t)(head->chunks * CHUNK);
        for (int l = 0; l < LANES; l++) sums[q] += lanes[q][l];
    }
}

/* Computes the outputs of up to ROWS queries of a head, from query `first` on. */
static void attend(const AttentionParams *attn, Head *head, int64_t first) {
    const Grid *query = &head->grid[QUERY], *value = &head->grid[VALUE];
    int64_t count = min(ROWS, attn->queries - first);
    const float *x = attn->query + head->image * attn->query_image + head->head * attn->query_head + first * attn->query_token;
    int32_t probability_sums[ROWS];
    float *out = attn->out + ((head->image * attn->queries + first) * attn->heads + head->head) * attn->channels;
    for (int64_t i = 0; i < ROWS; i++) {    /* the next queries, and these outputs */
        prefetch_token(x + (i + ROWS) * attn->query_token, attn->channels);
        prefetch_token(out + i * attn->heads * attn->channels, attn->channels);
    }
    memset(head->row, 0, head->depth);
    for (int64_t i = 0; i < count; i++) {
        quantize_token(*query, x + i * attn->query_token, attn->channels, 0, head->row);
        for (int64_t c = 0; c < attn->channels; c += SPAN)
            memcpy(head->queries + c * ROWS + i * SPAN, head->row + c, SPAN);
    }
    float factor = query->scale * head->grid[KEY].scale * (float)attn->scale * 1.44269504f;     /* 1 / ln 2: powers of two */
    factor = factor < 64.0f ? factor : 64.0f;
    unsigned mode = flush_denormals();
    if (!exp_queries(attn, head, factor, count, 0)) {
        for (int64_t i = 0; i < head->chunks; i++) {
            compute_scores(attn, head, i);
            for (int64_t q = 0; q < count; q++)     /* only where needed: no query's bits depend on the others in its block */
                if (!is_in_range(head, q)) raise_shift(attn, head, factor, q, i);
        }
        exp_queries(attn, head, factor, count, 1);
    }
    quantize_rows(attn, head, count, probability_sums);
    restore_denormals(mode);
    gemm_u8s8((uint8_t *)head->exps, 4 * CHUNK_EXPS, head->value_levels, head->keys, attn->max_code, head->value_start,
              attn->channels, head->sums, head->sum_step);
    float scale = head->grid[PROBABILITY].scale * value->scale;
    for (int64_t i = 0; i < count; i++, out += attn->heads * attn->channels) {
        const int32_t *sums = head->sums + i * head->sum_step;
        int32_t shift = probability_sums[i] * (value->level_zero - (int32_t)value->zero);
        for (int64_t c = 0; c < attn->channels; c++) out[c] = (float)(sums[c] + shift) * scale;
    }
}

/* Computes blocks first..last of ROWS queries, counted through all heads of all images, on one thread. Where threads share a
 * head, each packs its keys and values for itself. Returns 0, or 1 if memory runs out. */
static int attend_blocks(const AttentionParams *attn, int64_t first, int64_t last) {
    Head head = {0};
    int64_t blocks = round_up(attn->queries, ROWS) / ROWS, packed = -1;
    if (first >= last) return 0;
    if (alloc_head(attn, &head)) return 1;
    begin_gemm();
    for (int64_t i = first; i < last; i++) {
        int64_t index = i / blocks;
        if (index != packed) {
            head.image = index / attn->heads, head.head = index % attn->heads, packed = index;
            for (int operand = 0; operand < 4; operand++) head.grid[operand] = grid_of(attn, operand, index);
            pack_keys(attn, attn->key + head.image * attn->key_image + head.head * attn->key_head, &head);
            pack_values(attn, attn->value + head.image * attn->value_image + head.head * attn->value_head, &head);
            memset(head.queries, 0, ROWS * round_up(head.depth, SPAN));
        }
        attend(attn, &head, i % blocks * ROWS);
    }
    end_gemm();
    return 0;
}

int dmquant_run(const AttentionParams *attn) {
    int64_t blocks = attn->images * attn->heads * (round_up(attn->queries, ROWS) / ROWS);
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads((int)min(attn->threads, blocks)) if (attn->threads > 1) reduction(| : failed)
    {
        int64_t t = omp_get_thread_num(), all = omp_get_num_threads();
        failed = attend_blocks(attn, blocks * t / all, blocks * (t + 1) / all);
    }
#else
    failed = attend_blocks(attn, 0, blocks);
#endif
    return failed;
}
