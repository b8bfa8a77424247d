/* Scratch memory of kernels. */
#ifndef DMQUANT_SIMD_SCRATCH_H
#define DMQUANT_SIMD_SCRATCH_H
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define CACHE_LINE 64                     /* bytes of a cache line */

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/* One block of memory for each thread, kept for its next call: pages that come and go cost more than the arithmetic. */
static uint8_t *alloc(size_t need) {
    static _Thread_local uint8_t *memory;
    static _Thread_local size_t held;
    if (need > held) {
        free(memory);
        memory = aligned_alloc(CACHE_LINE, round_up((int64_t)need, CACHE_LINE));
        held = memory ? need : 0;
        if (memory) memset(memory, 0, need);
    }
    return memory;
}

/* The next `bytes` of a block, which begin at a cache line. */
INLINE void *carve(uint8_t **next, int64_t bytes) {
    uint8_t *first = *next;
    *next += round_up(bytes, CACHE_LINE);
    return first;
}
#endif
