/* Arguments of an attention on codes. Shapes: B images, N queries, M keys, C channels of a head. */
#ifndef DMQUANT_ATTENTION_PARAMS_H
#define DMQUANT_ATTENTION_PARAMS_H
#include <stdint.h>

enum { QUERY, KEY, PROBABILITY, VALUE };    /* operands, in the order of their grids */

/* Python packs the fields in this order: pointers, int64, one double. Strides are in floats; the channels of a token of a head
 * lie side by side. C and M are at most 2^14, so three sums of that many products 255 * 128 fit int32. */
typedef struct {
    const float *query;             /* (B, heads, N, C), by strides */
    const float *key, *value;       /* (B, heads, M, C), by strides */
    float *out;                     /* (B, N, heads, C), contiguous */
    const float *grid_scale;        /* (4 operands, B, heads) */
    const float *grid_zero;         /* the same: integers from 0 to max_code */
    int64_t images, heads, queries, keys, channels;
    int64_t query_image, query_head, query_token;
    int64_t key_image, key_head, key_token;
    int64_t value_image, value_head, value_token;
    int64_t max_code;               /* 2^bits - 1, of all four operands */
    int64_t threads;
    double scale;                   /* of scores: softmax(q k^T * scale) */
} AttentionParams;

/* Writes out. Returns 0, or 1 if memory ran out (out is incomplete). */
int dmquant_run(const AttentionParams *attn);
#endif
