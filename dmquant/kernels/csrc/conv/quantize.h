/* Cells of u8 codes, one byte per channel: for all kernels that multiply codes. quantize_pixels() is defined for each instruction
 * set. */
#ifndef DMQUANT_CONV_QUANTIZE_H
#define DMQUANT_CONV_QUANTIZE_H
#define CHANNEL_BYTES 1
#define ALWAYS_SUMS(conv) 0
#include "conv/driver.h"

static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = min(conv->channel_block, conv->channels - k * conv->channel_block);
    /* channels that fill the last block up get code 0, not the zero point: levels of their weights need not be 0 */
    for (int64_t p = 0; p < count; p++, cells += conv->channel_block) {
        memset(cells, (int)zero, real);
        memset(cells + real, 0, conv->channel_block - real);
    }
}
#endif
