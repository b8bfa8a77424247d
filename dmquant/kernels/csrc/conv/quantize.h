/* Cells of u8 codes, of whatever instruction set. */
#ifndef DMQUANT_CONV_QUANTIZE_H
#define DMQUANT_CONV_QUANTIZE_H
#define CELL 1
#define ALWAYS_SUMS(job) 0
#include "conv/driver.h"

static void fill(const Job *job, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = least(job->block, job->channels - k * job->block);
    /* channels that only fill a block are zero codes: their weights are not */
    for (int64_t p = 0; p < count; p++, cells += job->block) {
        memset(cells, (int)zero, real);
        memset(cells + real, 0, job->block - real);
    }
}
#endif
