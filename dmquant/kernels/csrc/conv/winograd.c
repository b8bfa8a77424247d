/* 3x3 convolutions at stride 1 by Winograd's F(2x2, 3x3) in whole numbers, and vpdpbusd: 16 products instead of 36 for a
 * square of 2 x 2 outputs. Needs AVX-512 F, BW, VL, DQ and VNNI, or AVX2, FMA and AVX-VNNI.
 *
 * With d the 4 x 4 codes under a square and g the 3 x 3 levels (Lavin and Gray 2016, with their G doubled)
 *   V = B^T d B,  U = (2 G) g (2 G)^T,  and A^T (sum of U * V over the channels) A is 4 times what is wanted,
 * all of it whole. With weights of up to 4 bits |U| <= 72, with activations of up to 5 |V| <= 124: both are bytes. Where an image
 * ends within a square, what is read beyond it reaches no output that is kept. */
#define POSITIONS 16                /* of U and V: four lines of four */
#define OFFSET 128                  /* is added to V, which vpdpbusd takes unsigned, and taken off the sums again */
#define TOTALS_BYTES (POSITIONS * 32 * 4)
#define UNPACKED_BYTES(plan) (POSITIONS * (plan).channel_blocks * LEVELS_BYTES + TOTALS_BYTES)
#define GROUP_BYTES (512 << 10)
#define BAND_BYTES (5 << 19)       /* U is made anew for each band: few are better than small ones */
#define BAND_STEP 2
#define SUPPORTS(conv) ((conv)->kernel_h == 3 && (conv)->kernel_w == 3 && (conv)->stride_h == 1 && (conv)->stride_w == 1)
#define BUFFER_RATIO 5                    /* V is four times the cells */

#include "conv/winograd_simd.h"

#define BYTES (int64_t)sizeof(Vector)
#define INTS (BYTES / 4)
#define PARTS (128 / BYTES)         /* of the levels of 32 outputs and four channels */
#define PRODUCTS (32 * UNIT)        /* of a position */

typedef struct {
    int32_t position, image;        /* of its first cell, in cells */
    int32_t pixel;                  /* its first one, of the band */
    int32_t tall, wide;             /* its outputs, 1 or 2 each way */
} Square;

/* V of a unit lies as [position][channel block][square][64 channels]; a line is added to each position, or all would fall into
 * one set of the cache. */
INLINE int64_t position_bytes(const Plan *plan) { return plan->channel_blocks * UNIT * 64 + CACHE_LINE; }
static int64_t unit_bytes(const Plan *plan) { return POSITIONS * position_bytes(plan); }

/* At most, of a band: each image that it touches may begin and end with half a square. */
static int64_t units_of(const ConvParams *conv, const Plan *plan) {
    int64_t lines = (plan->band_rows + plan->band_rows / conv->out_height + 3) / 2;
    return round_up(lines * ((conv->out_width + 1) / 2), UNIT) / UNIT;
}

/* V, then the squares. */
static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan) {
    return units_of(conv, plan) * (unit_bytes(plan) + UNIT * (int64_t)sizeof(Square));
}

INLINE Square *squares_of(const Band *band) {
    return (Square *)(band->scratch->tile_buffer + units_of(band->conv, band->plan) * unit_bytes(band->plan));
}

/* Squares squares[0..count] against block `block` of outputs. */
typedef struct {
    const Band *band;
    const Square *squares;
    int64_t count, block;
    const uint8_t *v, *u;           /* u: [position][channel block][levels], then what sums start with */
} Unit;

INLINE Vector plus(Vector a, Vector b) { return OF(add_epi8)(a, b); }
INLINE Vector minus(Vector a, Vector b) { return OF(sub_epi8)(a, b); }
INLINE Vector sum_of(Vector a, Vector b) { return OF(add_epi32)(a, b); }
INLINE Vector difference(Vector a, Vector b) { return OF(sub_epi32)(a, b); }

/* V of one square and BYTES channels. `row`: bytes from one row of cells to the next. */
INLINE void transform_square(const uint8_t *cells, int64_t row, uint8_t *v, int64_t step) {
    const Vector offset = OF(set1_epi8)((char)OFFSET);
    Vector d[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++, cells += 64) {
        Vector a = get(cells), b = get(cells + row), c = get(cells + 2 * row), e = get(cells + 3 * row);
        d[0][x] = minus(a, c), d[1][x] = plus(b, c), d[2][x] = minus(c, b), d[3][x] = minus(b, e);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; y++, v += 4 * step) {
        Vector *a = d[y];
        keep_at(v, plus(minus(a[0], a[2]), offset));
        keep_at(v + step, plus(plus(a[1], a[2]), offset));
        keep_at(v + 2 * step, plus(minus(a[2], a[1]), offset));
        keep_at(v + 3 * step, plus(minus(a[1], a[3]), offset));
    }
}

static void transform_cells(const Band *band, const Square *squares, int64_t count) {
    const Plan *plan = band->plan;
    int64_t row = plan->row_cells * 64, step = position_bytes(plan);
    for (int64_t i = 0; i < count; i++) {
        uint8_t *v = band->scratch->tile_buffer + i / UNIT * unit_bytes(plan) + i % UNIT * 64;
        const uint8_t *cells = band->scratch->cells + (int64_t)squares[i].position * 64;
        for (int64_t k = 0; k < plan->channel_blocks; k++, cells += plan->block_bytes, v += UNIT * 64)
            for (int64_t c = 0; c < 64; c += BYTES) transform_square(cells + c, row, v + c, step);
    }
}

/* The squares of a band, and their V. */
static int64_t prepare_band(const Band *band) {
    const ConvParams *conv = band->conv;
    Square *squares = squares_of(band);
    int64_t count = 0, width = conv->out_width;
    for (int64_t r = 0, tall; r < band->num_rows; r += tall) {
        int64_t image = (band->first_row + r) / conv->out_height, top = band->scratch->input_rows[r] * band->plan->row_cells;
        tall = min(2, min(band->num_rows, (image + 1) * conv->out_height - band->first_row) - r);
        for (int64_t x = 0; x < width; x += 2)
            squares[count++] = (Square){
                .position = (int32_t)(top + x), .image = conv->act_stride || conv->bias_stride ? (int32_t)image : 0,
                .pixel = (int32_t)(r * width + x), .tall = (int32_t)tall, .wide = (int32_t)min(2, width - x),
            };
        for (int64_t y = r; conv->zero && y < r + tall; y++)
            sum_windows(conv, band->plan, band->scratch->pixel_sums + band->scratch->input_rows[y] * band->plan->row_cells, width,
                    band->scratch->window_sums + y * width);
    }
    transform_cells(band, squares, count);
    return count;
}

/* U from nine levels each. */
INLINE void transform_levels(const Vector g[9], Vector u[POSITIONS]) {
    Vector t[3][4];
#pragma GCC unroll 3
    for (int y = 0; y < 3; y++) {
        Vector ends = plus(g[3 * y], g[3 * y + 2]);
        t[y][0] = plus(g[3 * y], g[3 * y]), t[y][3] = plus(g[3 * y + 2], g[3 * y + 2]);
        t[y][1] = plus(ends, g[3 * y + 1]), t[y][2] = minus(ends, g[3 * y + 1]);
    }
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++) {
        Vector ends = plus(t[0][x], t[2][x]);
        u[x] = plus(t[0][x], t[0][x]), u[12 + x] = plus(t[2][x], t[2][x]);
        u[4 + x] = plus(ends, t[1][x]), u[8 + x] = minus(ends, t[1][x]);
    }
}

/* BYTES of U at each position, from `bits` masks of each tap; also added to the sums of that position. */
INLINE void expand_part(const uint8_t *masks, int64_t tap, const int64_t bits, uint8_t *out, int64_t step, Vector *total) {
    Vector g[9], u[POSITIONS];
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++) g[i] = unpack_levels(masks + i * tap, bits);
    transform_levels(g, u);
#pragma GCC unroll 16
    for (int i = 0; i < POSITIONS; i++) {
        keep_at(out + i * step, u[i]);
        total[i] = add_bytes(total[i], u[i]);
    }
}

/* U of 32 outputs, of each 64 of which lie `bits` masks of 64 bits for each tap; then -OFFSET times its sums. */
INLINE void expand_block(const Plan *plan, const uint8_t *masks, const int64_t bits, uint8_t *out) {
    const int64_t tap = LEVELS_BYTES / 8 * bits, step = plan->channel_blocks * LEVELS_BYTES;
    Vector total[PARTS][POSITIONS];
    memset(total, 0, sizeof total);
    for (int64_t k = 0; k < plan->channel_blocks; k++, masks += 8 * tap)
        for (int64_t at = 0; at < LEVELS_BYTES; at += 128, masks += 16 * bits, out += 128)
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++) {
                int64_t byte = i * BYTES;
                expand_part(masks + byte / 64 * 8 * bits + byte % 64 / 8, tap, bits, out + byte, step, total[i]);
            }
    out += (POSITIONS - 1) * step;
    for (int i = 0; i < POSITIONS * PARTS; i++)
        keep_at(out + i * BYTES, OF(mullo_epi32)(total[i % PARTS][i / PARTS], OF(set1_epi32)(-OFFSET)));
}

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to, uint8_t *weights) {
    int64_t packed_bytes = plan->channel_blocks * plan->taps * LEVELS_BYTES / 8 * conv->bits;
    for (int64_t block = from; block < to; block++) {
        uint8_t *out = weights + (block - from) * plan->weight_bytes;
        if (conv->bits == 1) expand_block(plan, plane + block * packed_bytes, 1, out);
        else if (conv->bits == 4) expand_block(plan, plane + block * packed_bytes, 4, out);
        else expand_block(plan, plane + block * packed_bytes, conv->bits, out);
    }
    return weights;
}

/* The sums of U * V at the four positions of a line. */
static void multiply_line(const Unit *unit, int64_t line, int32_t *products) {
    const Plan *plan = unit->band->plan;
    int64_t blocks = plan->channel_blocks, step = blocks * LEVELS_BYTES;
    const int32_t *start = (const int32_t *)(unit->u + POSITIONS * step);
    for (int64_t i = 4 * line; i < 4 * line + 4; i++, products += PRODUCTS)
        for (int64_t first = 0; first < unit->count; first += TILE)
            multiply_tile(unit->v + i * position_bytes(plan) + first * 64, unit->u + i * step, blocks, start + 32 * i,
                          products + 16 * first);
}

/* One line of products times A: two columns of outputs. */
INLINE void fold(const int32_t *products, Vector z[2]) {
    Vector a = get(products), b = get(products + PRODUCTS), c = get(products + 2 * PRODUCTS), d = get(products + 3 * PRODUCTS);
    z[0] = sum_of(sum_of(a, b), c), z[1] = difference(difference(b, c), d);
}

/* kept: line 1, then lines 1 + 2 and 1 - 2; each has two columns. */
static void keep_line(const int32_t *products, int32_t *kept, int line) {
    for (int64_t i = 0; i < PRODUCTS; i += INTS, kept += INTS) {
        Vector z[2];
        fold(products + i, z);
        for (int x = 0; x < 2; x++) {
            Vector first = line == 1 ? OF(set1_epi32)(0) : get(kept + x * PRODUCTS);
            keep_at(kept + x * PRODUCTS, sum_of(first, z[x]));
            if (line == 2) keep_at(kept + (2 + x) * PRODUCTS, difference(first, z[x]));
        }
    }
}

/* The outputs of row y of each square, INTS from `output` on: 0 from line 0 and lines 1 + 2, 1 from line 3 and lines 1 - 2. */
static void put_row(const Unit *unit, const int32_t *products, const int32_t *kept, int y, int64_t output) {
    const Band *band = unit->band;
    const ConvParams *conv = band->conv;
    float *out = conv->out + first_output_pixel(conv, band->first_row) * conv->outputs + output;
    int64_t image = -1;
    Epilogue o;
    for (int64_t i = 0; i < unit->count; i++, products += 16, kept += 16) {
        const Square *square = &unit->squares[i];
        if (y >= square->tall) continue;
        if (square->image != image) {
            int64_t n = square->image * conv->act_stride;
            image = square->image;
            o = load_epilogue(conv, band->plane, output, conv->act_scale[n], conv->act_zero[n], bias_of(conv, image));
        }
        int64_t pixel = square->pixel + y * conv->out_width;
        Vector z[2];
        fold(products, z);
        for (int x = 0; x < square->wide; x++, pixel++) {
            Vector others = get(kept + (2 * y + x) * PRODUCTS), sum = y ? difference(others, z[x]) : sum_of(others, z[x]);
            store_outputs(&o, difference(OF(srai_epi32)(sum, 2), o.zero_sums), band->scratch->window_sums + pixel, out + pixel * conv->outputs);
        }
    }
}

static void put_rows(const Unit *unit, const int32_t *products, const int32_t *kept, int y) {
    for (int64_t at = 0; at < 32; at += INTS) {
        int64_t first = at / 16 * 16 * UNIT + at % 16;
        put_row(unit, products + first, kept + first, y, unit->block * OUTPUTS + at);
    }
}

static void multiply_unit(const Unit *unit) {
    int32_t products[4 * PRODUCTS] __attribute__((aligned(64))), kept[4 * PRODUCTS] __attribute__((aligned(64)));
    multiply_line(unit, 1, products);
    keep_line(products, kept, 1);
    multiply_line(unit, 2, products);
    keep_line(products, kept, 2);
    multiply_line(unit, 0, products);
    put_rows(unit, products, kept, 0);
    multiply_line(unit, 3, products);
    put_rows(unit, products, kept, 1);
}

static void multiply_band(const Band *band) {
    const Square *squares = squares_of(band);
    for (int64_t i = 0; i < band->tiles; i += UNIT)
        for (int64_t block = band->first_block; block < band->end_block; block++) {
            Unit unit = {
                .band = band, .squares = squares + i, .count = min(UNIT, band->tiles - i), .block = block,
                .v = band->scratch->tile_buffer + i / UNIT * unit_bytes(band->plan),
                .u = band->weights + (block - band->first_block) * band->plan->weight_bytes,
            };
            multiply_unit(&unit);
        }
}
