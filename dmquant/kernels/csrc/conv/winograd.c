/* 3x3 convolution at stride 1 by Winograd's F(2x2, 3x3) in integers, by vpdpbusd: 16 products for each tile of 2 x 2 outputs
 * instead of 36. Needs AVX-512 F, BW, VL, DQ and VNNI, or AVX2, FMA and AVX-VNNI.
 *
 * Lavin and Gray, 2016, with G doubled so that everything is an integer. With 4 x 4 codes d of a tile and 3 x 3 levels g
 *     V = B^T d B,  U = (2 G) g (2 G)^T,  4 * outputs = A^T (U * V summed over channels) A.
 * V and U have 16 positions, four lines of four. Ranges: with weights of up to 4 bits |U| <= 72, with activations of up to 5
 * bits |V| <= 124, so both fit s8; V is stored plus OFFSET as u8, and sums start with -OFFSET * (U summed over channels).
 * Channel blocks have 64 channels. Where an image ends within a tile, the outputs beyond it are dropped. */
#define POSITIONS 16
#define OFFSET 128
#define START_BYTES (POSITIONS * 32 * 4)    /* of what sums start with: [position][output] of int32 */
#define UNPACKED_BYTES(plan) (POSITIONS * (plan).channel_blocks * LEVELS_BYTES + START_BYTES)
#define GROUP_BYTES (512 << 10)
#define BAND_BYTES (5 << 19)        /* U is computed again for each band: a few large bands beat those that fit L2 */
#define BAND_STEP 2
#define BUFFER_RATIO 5              /* V has four times the bytes of the cells */
#define SUPPORTS(conv) ((conv)->kernel_h == 3 && (conv)->kernel_w == 3 && (conv)->stride_h == 1 && (conv)->stride_w == 1)

#include "conv/winograd_simd.h"

#define VECTOR_BYTES (int64_t)sizeof(Vector)
#define VECTOR_INTS (VECTOR_BYTES / 4)
#define PARTS (128 / VECTOR_BYTES)          /* vectors of the levels of 32 outputs and four channels */
#define PRODUCTS (32 * TILE_GROUP)          /* int32 of one position */

/* 2 x 2 outputs and the 4 x 4 cells they need. */
typedef struct {
    int32_t position;               /* first cell, counted from the first cell of the band */
    int32_t image;                  /* 0 if all images have the same grid and bias */
    int32_t pixel;                  /* first output pixel, counted from the first of the band */
    int32_t height, width;          /* outputs that exist, 1 or 2 */
} Tile;

/* Up to TILE_GROUP tiles times one block of outputs. */
typedef struct {
    const Band *band;
    const Tile *tiles;
    int64_t count, block;
    const uint8_t *v;               /* [position][channel block][tile][64 channels], position_bytes() for each position */
    const uint8_t *u;               /* [position][channel block][LEVELS_BYTES], then what sums start with */
} TileGroup;

/* One more cache line for each position: otherwise all 16 would fall into one set of the cache. */
INLINE int64_t position_bytes(const Plan *plan) { return plan->channel_blocks * TILE_GROUP * 64 + CACHE_LINE; }
static int64_t group_bytes(const Plan *plan) { return POSITIONS * position_bytes(plan); }

/* Groups of tiles in a band, at most: each image in it may begin and end with half a tile. */
static int64_t count_groups(const ConvParams *conv, const Plan *plan) {
    int64_t lines = (plan->band_rows + plan->band_rows / conv->out_height + 3) / 2;
    return round_up(lines * ((conv->out_width + 1) / 2), TILE_GROUP) / TILE_GROUP;
}

/* V of all groups, then the tiles. */
static int64_t tile_buffer_bytes(const ConvParams *conv, const Plan *plan) {
    return count_groups(conv, plan) * (group_bytes(plan) + TILE_GROUP * (int64_t)sizeof(Tile));
}

INLINE Tile *tiles_of(const Band *band) {
    return (Tile *)(band->scratch->tile_buffer + count_groups(band->conv, band->plan) * group_bytes(band->plan));
}

INLINE Vector add_8(Vector a, Vector b) { return MM(add_epi8)(a, b); }
INLINE Vector sub_8(Vector a, Vector b) { return MM(sub_epi8)(a, b); }
INLINE Vector add_32(Vector a, Vector b) { return MM(add_epi32)(a, b); }
INLINE Vector sub_32(Vector a, Vector b) { return MM(sub_epi32)(a, b); }

/* Writes V of one tile and VECTOR_BYTES channels. row: bytes from one row of cells to the next; step: from one position to the
 * next. */
INLINE void transform_input(const uint8_t *cells, int64_t row, uint8_t *v, int64_t step) {
    const Vector offset = MM(set1_epi8)((char)OFFSET);
    Vector d[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++, cells += 64) {
        Vector a = load_vector(cells), b = load_vector(cells + row);
        Vector c = load_vector(cells + 2 * row), e = load_vector(cells + 3 * row);
        d[0][x] = sub_8(a, c), d[1][x] = add_8(b, c), d[2][x] = sub_8(c, b), d[3][x] = sub_8(b, e);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; y++, v += 4 * step) {
        Vector *a = d[y];
        store_vector(v, add_8(sub_8(a[0], a[2]), offset));
        store_vector(v + step, add_8(add_8(a[1], a[2]), offset));
        store_vector(v + 2 * step, add_8(sub_8(a[2], a[1]), offset));
        store_vector(v + 3 * step, add_8(sub_8(a[1], a[3]), offset));
    }
}

static void transform_inputs(const Band *band, const Tile *tiles, int64_t count) {
    const Plan *plan = band->plan;
    int64_t row = plan->row_cells * 64, step = position_bytes(plan);
    for (int64_t i = 0; i < count; i++) {
        uint8_t *v = band->scratch->tile_buffer + i / TILE_GROUP * group_bytes(plan) + i % TILE_GROUP * 64;
        const uint8_t *cells = band->scratch->cells + (int64_t)tiles[i].position * 64;
        for (int64_t k = 0; k < plan->channel_blocks; k++, cells += plan->block_bytes, v += TILE_GROUP * 64)
            for (int64_t c = 0; c < 64; c += VECTOR_BYTES) transform_input(cells + c, row, v + c, step);
    }
}

/* Lists the tiles of a band, sums a over windows, and computes V. */
static int64_t prepare_band(const Band *band) {
    const ConvParams *conv = band->conv;
    Tile *tiles = tiles_of(band);
    int64_t count = 0, width = conv->out_width;
    for (int64_t r = 0, height; r < band->num_rows; r += height) {
        int64_t image = (band->first_row + r) / conv->out_height, first = band->scratch->input_rows[r] * band->plan->row_cells;
        height = min(2, min(band->num_rows, (image + 1) * conv->out_height - band->first_row) - r);
        for (int64_t x = 0; x < width; x += 2)
            tiles[count++] = (Tile){
                .position = (int32_t)(first + x), .image = conv->act_stride || conv->bias_stride ? (int32_t)image : 0,
                .pixel = (int32_t)(r * width + x), .height = (int32_t)height, .width = (int32_t)min(2, width - x),
            };
        for (int64_t y = r; conv->zero && y < r + height; y++)
            sum_windows(conv, band->plan, band->scratch->pixel_sums + band->scratch->input_rows[y] * band->plan->row_cells, width,
                        band->scratch->window_sums + y * width);
    }
    transform_inputs(band, tiles, count);
    return count;
}

/* U = (2 G) g (2 G)^T by bytes, for 3 x 3 levels g. */
INLINE void transform_weights(const Vector g[9], Vector u[POSITIONS]) {
    Vector t[3][4];
#pragma GCC unroll 3
    for (int y = 0; y < 3; y++) {
        Vector ends = add_8(g[3 * y], g[3 * y + 2]);
        t[y][0] = add_8(g[3 * y], g[3 * y]), t[y][3] = add_8(g[3 * y + 2], g[3 * y + 2]);
        t[y][1] = add_8(ends, g[3 * y + 1]), t[y][2] = sub_8(ends, g[3 * y + 1]);
    }
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++) {
        Vector ends = add_8(t[0][x], t[2][x]);
        u[x] = add_8(t[0][x], t[0][x]), u[12 + x] = add_8(t[2][x], t[2][x]);
        u[4 + x] = add_8(ends, t[1][x]), u[8 + x] = sub_8(ends, t[1][x]);
    }
}

/* Writes VECTOR_BYTES of U at each position, `step` bytes apart, and adds them to the sums of that position. masks: of the first
 * tap, those of the next are `tap` bytes away. */
INLINE void unpack_part(const uint8_t *masks, int64_t tap, const int64_t bits, uint8_t *out, int64_t step, Vector *sums) {
    Vector g[9], u[POSITIONS];
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++) g[i] = unpack_levels(masks + i * tap, bits);
    transform_weights(g, u);
#pragma GCC unroll 16
    for (int i = 0; i < POSITIONS; i++) {
        store_vector(out + i * step, u[i]);
        sums[i] = add_bytes(sums[i], u[i]);
    }
}

/* Writes U of 32 outputs, then -OFFSET times its sums over channels. masks: [channel block][tap][32 times 64 weights][bit][8
 * bytes]. */
INLINE void unpack_block(const Plan *plan, const uint8_t *masks, const int64_t bits, uint8_t *out) {
    const int64_t tap = LEVELS_BYTES / 8 * bits, step = plan->channel_blocks * LEVELS_BYTES;
    Vector sums[PARTS][POSITIONS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < plan->channel_blocks; k++, masks += 8 * tap)
        for (int64_t at = 0; at < LEVELS_BYTES; at += 128, masks += 16 * bits, out += 128)
#pragma GCC unroll 4
            for (int i = 0; i < PARTS; i++) {
                int64_t byte = i * VECTOR_BYTES;
                unpack_part(masks + byte / 64 * 8 * bits + byte % 64 / 8, tap, bits, out + byte, step, sums[i]);
            }
    out += (POSITIONS - 1) * step;
    for (int i = 0; i < POSITIONS * PARTS; i++)
        store_vector(out + i * VECTOR_BYTES, MM(mullo_epi32)(sums[i % PARTS][i / PARTS], MM(set1_epi32)(-OFFSET)));
}

static const uint8_t *unpack_weights(const ConvParams *conv, const Plan *plan, const uint8_t *plane, int64_t from, int64_t to,
                                     uint8_t *weights) {
    int64_t packed_bytes = plan->channel_blocks * plan->taps * LEVELS_BYTES / 8 * conv->bits;
    for (int64_t block = from; block < to; block++) {
        uint8_t *out = weights + (block - from) * plan->weight_bytes;
        if (conv->bits == 1) unpack_block(plan, plane + block * packed_bytes, 1, out);
        else if (conv->bits == 4) unpack_block(plan, plane + block * packed_bytes, 4, out);
        else unpack_block(plan, plane + block * packed_bytes, conv->bits, out);
    }
    return weights;
}

/* Writes the sums of U * V over channels at the four positions of a line: [position][2 halves][tile][16 outputs]. */
static void multiply_line(const TileGroup *group, int64_t line, int32_t *products) {
    const Plan *plan = group->band->plan;
    int64_t blocks = plan->channel_blocks, step = blocks * LEVELS_BYTES;
    const int32_t *start = (const int32_t *)(group->u + POSITIONS * step);
    for (int64_t i = 4 * line; i < 4 * line + 4; i++, products += PRODUCTS)
        for (int64_t first = 0; first < group->count; first += REGISTER_TILES)
            multiply_tiles(group->v + i * position_bytes(plan) + first * 64, group->u + i * step, blocks, start + 32 * i,
                           products + 16 * first);
}

/* One line of products m times A: the two columns m0 + m1 + m2 and m1 - m2 - m3. */
INLINE void transform_line(const int32_t *products, Vector z[2]) {
    Vector a = load_vector(products), b = load_vector(products + PRODUCTS);
    Vector c = load_vector(products + 2 * PRODUCTS), d = load_vector(products + 3 * PRODUCTS);
    z[0] = add_32(add_32(a, b), c), z[1] = sub_32(sub_32(b, c), d);
}

/* Transforms line 1 or 2. lines: after line 1 its two columns; after line 2 lines 1 + 2, then lines 1 - 2, two columns each. */
static void combine_line(const int32_t *products, int32_t *lines, int line) {
    for (int64_t i = 0; i < PRODUCTS; i += VECTOR_INTS, lines += VECTOR_INTS) {
        Vector z[2];
        transform_line(products + i, z);
        for (int x = 0; x < 2; x++) {
            Vector first = line == 1 ? MM(set1_epi32)(0) : load_vector(lines + x * PRODUCTS);
            store_vector(lines + x * PRODUCTS, add_32(first, z[x]));
            if (line == 2) store_vector(lines + (2 + x) * PRODUCTS, sub_32(first, z[x]));
        }
    }
}

/* Writes VECTOR_INTS outputs from `output` on of row y of each tile. Row 0 is line 0 + (lines 1 + 2), row 1 is (lines 1 - 2) -
 * line 3; products: of line 0 or 3. */
static void store_row(const TileGroup *group, const int32_t *products, const int32_t *lines, int y, int64_t output) {
    const Band *band = group->band;
    const ConvParams *conv = band->conv;
    float *out = conv->out + first_output_pixel(conv, band->first_row) * conv->outputs + output;
    int64_t image = -1;
    Epilogue e;
    for (int64_t i = 0; i < group->count; i++, products += 16, lines += 16) {
        const Tile *tile = &group->tiles[i];
        if (y >= tile->height) continue;
        if (tile->image != image) {
            int64_t n = tile->image * conv->act_stride;
            image = tile->image;
            e = load_epilogue(conv, band->plane, output, conv->act_scale[n], conv->act_zero[n], bias_of(conv, image));
        }
        int64_t pixel = tile->pixel + y * conv->out_width;
        Vector z[2];
        transform_line(products, z);
        for (int x = 0; x < tile->width; x++, pixel++) {
            Vector others = load_vector(lines + (2 * y + x) * PRODUCTS), sum = y ? sub_32(others, z[x]) : add_32(others, z[x]);
            store_outputs(&e, sub_32(MM(srai_epi32)(sum, 2), e.zero_sums), band->scratch->window_sums + pixel,
                          out + pixel * conv->outputs);
        }
    }
}

static void store_rows(const TileGroup *group, const int32_t *products, const int32_t *lines, int y) {
    for (int64_t at = 0; at < 32; at += VECTOR_INTS) {
        int64_t first = at / 16 * 16 * TILE_GROUP + at % 16;
        store_row(group, products + first, lines + first, y, group->block * OUTPUTS + at);
    }
}

/* Lines 1 and 2 come first, for both rows of outputs need them. Products of one line at a time take 8 KB of stack, not 32. */
static void multiply_group(const TileGroup *group) {
    int32_t products[4 * PRODUCTS] __attribute__((aligned(64))), lines[4 * PRODUCTS] __attribute__((aligned(64)));
    multiply_line(group, 1, products);
    combine_line(products, lines, 1);
    multiply_line(group, 2, products);
    combine_line(products, lines, 2);
    multiply_line(group, 0, products);
    store_rows(group, products, lines, 0);
    multiply_line(group, 3, products);
    store_rows(group, products, lines, 1);
}

static void multiply_band(const Band *band) {
    const Tile *tiles = tiles_of(band);
    for (int64_t i = 0; i < band->tiles; i += TILE_GROUP)
        for (int64_t block = band->first_block; block < band->end_block; block++) {
            TileGroup group = {
                .band = band, .tiles = tiles + i, .count = min(TILE_GROUP, band->tiles - i), .block = block,
                .v = band->scratch->tile_buffer + i / TILE_GROUP * group_bytes(band->plan),
                .u = band->weights + (block - band->first_block) * band->plan->weight_bytes,
            };
            multiply_group(&group);
        }
}
