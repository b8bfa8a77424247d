/* Products of u8 codes times s8 levels in 256 bits: by vpdpbusd if it is compiled for AVX-VNNI, otherwise by vpmaddubsw and
 * vpmaddwd, in pairs.
 *
 * Where the products are small (4 bits times 4 to 7), the pairs of a whole block are added up in 16 bits before they are widened.
 * Needs AVX2 and FMA. */
#define CELL 1
#define ALWAYS_SUMS(job) 0
#include "half.h"
#include "pairs.h"

/* Pixels x 16 outputs in registers, and of what is left. A vpdpbusd takes five cycles, and two begin in each: eight sums would
 * wait for each other. Without it more kinds of tiles cost more, by what gcc makes of registers, than they win. */
#ifdef __AVXVNNI__
#define PIXELS 6
#define REST 2
#else
#define PIXELS 4
#define REST 1
#endif

static void fill(const Job *job, float zero, int64_t k, int64_t count, uint8_t *cells) {
    int64_t real = least(job->block, job->channels - k * job->block);
    for (int64_t p = 0; p < count; p++, cells += job->block) {
        memset(cells, (int)zero, real);
        memset(cells + real, 0, job->block - real);
    }
}

static void build(const Job *job, int64_t n, int64_t k, const float *x, int64_t count, uint8_t *cells, int32_t *sums) {
    Grid grid = grid_of(job, n);
    int64_t real = least(job->block, job->channels - k * job->block);
    for (int64_t p = 0; p < count; p++, x += job->channels, cells += job->block) {
        __m256i sum = _mm256_setzero_si256(), a;
        for (int64_t c = 0; c < job->block; c += 8) {
            _mm_storel_epi64((__m128i *)(cells + c), quantize(&grid, x + c, most(0, real - c), &a));
            sum = _mm256_add_epi32(sum, a);
        }
        if (sums) sums[p] += sum_eight(sum);
    }
}

/* Bit planes -> levels: 32 weights are 32 bits of each plane, spread to bytes by a shuffle and tested one bit each. */
static const uint8_t *expand(const Job *job, const Shape *s, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights) {
    int64_t bits = job->bits, count = (to - from) * s->weight_bytes / 32;
    if (bits == 8) return plane + from * s->weight_bytes;
    const uint8_t *masks = plane + from * s->weight_bytes / 8 * bits;
    /* byte i of a half takes byte i / 8 of the mask */
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i place = _mm256_set1_epi64x((long long)0x8040201008040201);
    for (int64_t i = 0; i < count; i++) {
        __m256i level = _mm256_set1_epi8((char)level_least(bits));
        for (int64_t bit = 0; bit < bits; bit++) {
            int32_t mask;
            memcpy(&mask, masks + i / 2 * 8 * bits + 8 * bit + i % 2 * 4, 4);
            __m256i at = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), spread), place);
            __m256i step = _mm256_set1_epi8((char)(level_step(bits) << bit));
            level = _mm256_add_epi8(level, _mm256_and_si256(_mm256_cmpeq_epi8(at, place), step));
        }
        _mm256_storeu_si256((__m256i *)(weights + 32 * i), level);
    }
    return weights;
}

INLINE void tile(const Row *row, int64_t block, int half, int64_t pixel, const int P, const int64_t step, const int mode) {
    const uint8_t *levels = row->weights + (block - row->from) * row->shape->weight_bytes + 64 * half;
    int64_t groups = row->job->block / 4;
    const uint8_t *first = row->cells + pixel * step;
    __m256i acc[PIXELS][2], narrow[PIXELS][2];
#pragma GCC unroll 6
    for (int p = 0; p < P; p++) acc[p][0] = acc[p][1] = _mm256_setzero_si256();
    for (int64_t i = 0; i < row->count; i++, levels += 128 * groups) {
        if (mode != NARROW) {
            multiply_groups(acc, first + row->offsets[i], step, levels, groups, P, mode);
            continue;
        }
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) narrow[p][0] = narrow[p][1] = _mm256_setzero_si256();
        multiply_groups(narrow, first + row->offsets[i], step, levels, groups, P, mode);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++)
            for (int v = 0; v < 2; v++)
                acc[p][v] = _mm256_add_epi32(acc[p][v], _mm256_madd_epi16(narrow[p][v], _mm256_set1_epi16(1)));
    }
    int64_t output = block * OUTPUTS + 16 * half;
    __m256i zero = _mm256_set1_epi32((int)row->act_zero);
    for (int v = 0; v < 2; v++, output += 8) {
        __m256i excess = _mm256_mullo_epi32(totals(row, output), zero);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) put(row, output, _mm256_sub_epi32(acc[p][v], excess), pixel + p);
    }
}

INLINE void walk_by(const Row *row, const int64_t step, const int mode) {
    for (int64_t pixel = 0, size; pixel < row->pixels; pixel += size) {
        int64_t rest = row->pixels - pixel;
        size = rest >= PIXELS ? PIXELS : rest >= REST ? REST : 1;
        for (int64_t block = row->from; block < row->to; block++)
            for (int half = 0; half < 2; half++) {
                if (size == PIXELS) tile(row, block, half, pixel, PIXELS, step, mode);
                else if (size == REST) tile(row, block, half, pixel, REST, step, mode);
                else tile(row, block, half, pixel, 1, step, mode);
            }
    }
}

INLINE void walk(const Row *row, const int mode) {
    int64_t step = row->job->stride_w * row->shape->cell_bytes;
    if (step == 64) walk_by(row, 64, mode);
    else if (step == 32) walk_by(row, 32, mode);
    else walk_by(row, step, mode);
}

#ifdef __AVXVNNI__
static void row_of_tiles(const Row *row) { walk(row, FOURS); }
#else
static void row_of_tiles(const Row *row) {
    const Job *job = row->job;
    int64_t largest = job->act_max * -level_least(job->bits);
    if (largest * job->block / 2 <= 32767) walk(row, NARROW);
    else if (2 * largest <= 32767) walk(row, PAIRS);
    else walk(row, SINGLES);
}
#endif
