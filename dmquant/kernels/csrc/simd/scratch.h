/* Scratch memory: one buffer for each thread and each kernel library, carved into arrays that begin at cache lines. */
#ifndef DMQUANT_SIMD_SCRATCH_H
#define DMQUANT_SIMD_SCRATCH_H
#include <stdlib.h>
#include <string.h>
#include "simd/inline.h"

#define CACHE_LINE 64               /* bytes */

/* Returns this thread's buffer of at least `bytes` bytes, aligned to a cache line, or NULL where memory runs out. The content is
 * that of earlier calls (zero at first). The buffer grows and is never freed: page faults for a new one at each call would cost
 * more time than the arithmetic. */
static uint8_t *alloc(size_t bytes) {
    static _Thread_local uint8_t *buffer;
    static _Thread_local size_t capacity;
    if (bytes > capacity) {
        free(buffer);
        buffer = aligned_alloc(CACHE_LINE, round_up((int64_t)bytes, CACHE_LINE));
        capacity = buffer ? bytes : 0;
        if (buffer) memset(buffer, 0, bytes);
    }
    return buffer;
}

/* Returns *next and advances it by `bytes`, rounded up to whole cache lines. */
INLINE void *carve(uint8_t **next, int64_t bytes) {
    uint8_t *first = *next;
    *next += round_up(bytes, CACHE_LINE);
    return first;
}
#endif
