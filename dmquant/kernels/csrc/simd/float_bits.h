/* Rounding to integers and scaling by powers of two through the bits of a float, in plain C that compilers vectorize. */
#ifndef DMQUANT_SIMD_FLOAT_BITS_H
#define DMQUANT_SIMD_FLOAT_BITS_H
#include <string.h>
#include "simd/inline.h"

/* 1.5 * 2^23. For |x| < 2^22, x + MAGIC is x rounded to an integer, ties to even, and its low mantissa bits hold that integer. */
#define MAGIC 12582912.0f

/* x * 2^n, by adding n to the exponent of x. `biased` is n + MAGIC. The result must be a normal number. */
INLINE float scale_by_power(float x, float biased) {
    uint32_t exponent, bits;
    memcpy(&exponent, &biased, 4);
    memcpy(&bits, &x, 4);
    bits += exponent << 23;
    memcpy(&x, &bits, 4);
    return x;
}
#endif
