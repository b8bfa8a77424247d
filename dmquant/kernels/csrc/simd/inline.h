/* Forced inlining and integer arithmetic on sizes. */
#ifndef DMQUANT_SIMD_INLINE_H
#define DMQUANT_SIMD_INLINE_H
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/* The least multiple of `step` that is not below `value`. */
INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
#endif
