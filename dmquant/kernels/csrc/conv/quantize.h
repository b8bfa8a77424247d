/* Cells of u8 codes, of whatever instruction set. */
#ifndef DMQUANT_CONV_QUANTIZE_H
#define DMQUANT_CONV_QUANTIZE_H
#define CHANNEL_BYTES 1
#define ALWAYS_SUMS(conv) 0
#include "conv/driver.h"

static void fill_padding(const ConvParams *conv, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = min(conv->block, conv->channels - k * conv->block);
    /* channels that only fill a block are zero codes: their weights are not */
    for (int64_t p = 0; p < count; p++, cells += conv->block) {
        memset(cells, (int)zero, real);
        memset(cells + real, 0, conv->block - real);
    }
}
#endif
