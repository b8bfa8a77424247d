/* simd.h in plain C. */
#ifndef DMQUANT_SIMD_PORTABLE_H
#define DMQUANT_SIMD_PORTABLE_H
#include <math.h>
#include <string.h>
#include "simd/float_bits.h"
#include "simd/inline.h"

typedef struct {
    float lane[LANES];
} F32x16;

typedef struct {
    int32_t lane[LANES];
} I32x16;

typedef int64_t U8Vec;

#define EACH_LANE(type, expression) \
    type out; \
    for (int l = 0; l < LANES; l++) out.lane[l] = expression; \
    return out

INLINE F32x16 load_f32(const float *x) { EACH_LANE(F32x16, x[l]); }
INLINE I32x16 load_i32(const int32_t *x) { EACH_LANE(I32x16, x[l]); }
INLINE void store_f32(float *out, F32x16 a) { memcpy(out, a.lane, sizeof a); }
INLINE void store_i32(int32_t *out, I32x16 a) { memcpy(out, a.lane, sizeof a); }
INLINE void store_u8(uint8_t *out, I32x16 a) {
    for (int l = 0; l < LANES; l++) out[l] = (uint8_t)a.lane[l];
}
INLINE F32x16 set1_f32(float x) { EACH_LANE(F32x16, x); }
INLINE I32x16 set1_i32(int32_t x) { EACH_LANE(I32x16, x); }
INLINE F32x16 add_f32(F32x16 a, F32x16 b) { EACH_LANE(F32x16, a.lane[l] + b.lane[l]); }
INLINE F32x16 sub_f32(F32x16 a, F32x16 b) { EACH_LANE(F32x16, a.lane[l] - b.lane[l]); }
INLINE F32x16 mul_f32(F32x16 a, F32x16 b) { EACH_LANE(F32x16, a.lane[l] * b.lane[l]); }
INLINE F32x16 fmadd_f32(F32x16 a, F32x16 b, F32x16 c) { EACH_LANE(F32x16, fmaf(a.lane[l], b.lane[l], c.lane[l])); }
INLINE F32x16 fmsub_f32(F32x16 a, F32x16 b, F32x16 c) { EACH_LANE(F32x16, fmaf(a.lane[l], b.lane[l], -c.lane[l])); }
INLINE F32x16 min_f32(F32x16 a, F32x16 b) { EACH_LANE(F32x16, a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE F32x16 max_f32(F32x16 a, F32x16 b) { EACH_LANE(F32x16, a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE F32x16 first_lanes(F32x16 a, int64_t count) { EACH_LANE(F32x16, l < count ? a.lane[l] : 0.0f); }
/* as unsigned numbers: overflow wraps, as it does in vector registers */
INLINE I32x16 add_i32(I32x16 a, I32x16 b) { EACH_LANE(I32x16, (int32_t)((uint32_t)a.lane[l] + (uint32_t)b.lane[l])); }
INLINE I32x16 max_i32(I32x16 a, I32x16 b) { EACH_LANE(I32x16, a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
INLINE F32x16 i32_to_f32(I32x16 a) { EACH_LANE(F32x16, (float)a.lane[l]); }
INLINE I32x16 f32_as_i32(F32x16 a) {
    I32x16 out;
    memcpy(&out, &a, sizeof out);
    return out;
}
INLINE F32x16 fract_f32(F32x16 x) { EACH_LANE(F32x16, x.lane[l] - floorf(x.lane[l])); }
INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE F32x16 scalef(F32x16 a, F32x16 x) {
    EACH_LANE(F32x16, scale_by_power(a.lane[l], clamp(floorf(x.lane[l]), -126, 127) + MAGIC));
}
INLINE U8Vec set1_u8(int64_t x) { return x; }
INLINE I32x16 store_codes(uint8_t *out, F32x16 a, F32x16 b, F32x16 c, F32x16 d, U8Vec zero, U8Vec limit) {
    const F32x16 *parts[] = {&a, &b, &c, &d};
    I32x16 sums = {{0}};
    for (int i = 0; i < 4 * LANES; i++) {
        float rounded = clamp(parts[i / LANES]->lane[i % LANES], 0, 255) + MAGIC - MAGIC;
        out[i] = (uint8_t)min((int64_t)rounded + zero, limit);
        sums.lane[i % LANES] += out[i];
    }
    return sums;
}
#endif
