/* Rounding and scaling of floats by their bits, in plain C that compilers make vectors of. */
#ifndef DMQUANT_SIMD_FLOAT_BITS_H
#define DMQUANT_SIMD_FLOAT_BITS_H
#include <stdint.h>
#include <string.h>

#define MAGIC 12582912.0f           /* 1.5 * 2^23: added to, it rounds to whole numbers, ties to even */

/* x times 2^n, by its exponent; n is what MAGIC was added to. */
static inline __attribute__((always_inline)) float scale_by_power(float x, float n) {
    uint32_t exponent, bits;
    memcpy(&exponent, &n, 4);
    memcpy(&bits, &x, 4);
    bits += exponent << 23;
    memcpy(&x, &bits, 4);
    return x;
}
#endif
