/* GEMM of u8 codes and s8 levels into int32 sums, ROWS rows of codes at a time: by AMX, AVX-512 VNNI, AVX-VNNI, AVX2 or plain
 * C, whichever is the best that the compiler's flags allow.
 *
 *   codes     [depth / SPAN][ROWS][SPAN], `stride` bytes from one span to the next
 *   levels    [outputs / OUTPUTS][depth / 4][OUTPUTS][4]
 *   sums      (ROWS, width): start[output] + the sum over the depth of code * level
 *
 * The depth is a multiple of DEPTH_STEP; of a last span that is shorter only the depth is read. Blocks of outputs are computed
 * as a whole: levels, start and the rows of sums extend to a multiple of OUTPUTS. max_code: the largest code. Sums must fit
 * int32. */
#ifndef DMQUANT_ATTENTION_GEMM_U8S8_H
#define DMQUANT_ATTENTION_GEMM_U8S8_H

#define OUTPUTS 32                  /* outputs of a block of levels */
#define SPAN 64                     /* codes of a row that lie side by side */

#if defined(__AMX_INT8__)
#include "attention/gemm_amx.h"
#else
#if defined(__AVX512VNNI__)
#include "attention/gemm_avx512vnni.h"
#elif defined(__AVX2__)
#include "attention/gemm_avx2.h"
#else
#include "attention/gemm_portable.h"
#endif

static void begin_gemm(void) {}
static void end_gemm(void) {}

static void gemm_u8s8(const uint8_t *codes, int64_t stride, const uint8_t *levels, int64_t depth, int64_t max_code,
                      const int32_t *start, int64_t outputs, int32_t *sums, int64_t width) {
    for (int64_t o = 0; o < outputs; o += OUTPUTS, levels += OUTPUTS * depth)
        gemm_block(codes, stride, levels, depth, max_code, start + o, sums + o, width);
}
#endif
#endif
