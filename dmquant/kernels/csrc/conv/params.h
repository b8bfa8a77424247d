/* Arguments of a convolution with packed weights. Images are float32, channels last; a linear layer is a 1x1 convolution.
 *
 * Shapes: B images, C channels, H x W input pixels (after upsampling), H' x W' output pixels, O outputs, K taps.
 *
 * x is quantized to u8 codes, a = code - act_zero. A weight is a sum over planes of (level - shift) * scale, with s8 levels and
 * integer shifts. Sums of level * a over C and K are exact integers, and all kernels end with the same expression,
 *     out = fma(sum, scale * act_scale, bias or the sum of earlier planes) + residual,
 * so they give the same bits. Sums must fit int32: C * K * 128 * 255 < 2^31, or 65793 products at 8 bits.
 *
 * Layouts of a plane of weights, with O and C filled up to whole blocks by code 0:
 *     codes below 8 bits    [O / 32][C / channel_block][K][channel_block / 4][2 halves][bit][64 bits], where bit 4 o + j of the
 *                           last is that of channel j of output o of 16
 *     codes of 8 bits       [O / 32][C / channel_block][K][channel_block / 4][32 outputs][4 channels] of s8 levels
 *     lookup kernels        [bit][O / 32][C / channel_block][K][channel_block / 16][64 bytes] of nibbles, one for each output and
 *                           group of four channels: see lut_avx512.c and lut_avx2.c */
#ifndef DMQUANT_CONV_PARAMS_H
#define DMQUANT_CONV_PARAMS_H
#include <stdint.h>

/* Python packs the fields in this order: pointers, int64, one double. */
typedef struct {
    const float *x;             /* (B, H, W, C), or 2 C for GATED; H and W before upsampling */
    float *out;                 /* (B, H', W', O) */
    const uint8_t *weight;      /* (planes, plane_bytes), (O, C, K) in the layouts above */
    const int32_t *weight_sums; /* (planes, O): levels summed over C and K */
    const float *scale;         /* (planes, O), of weights */
    const float *zero;          /* (O): zero points of weight codes; NULL where all shifts are 0 */
    const float *bias;          /* (O), (B, O), or NULL */
    const float *act_scale;     /* (B), or one value if act_stride is 0 */
    const float *act_zero;      /* the same: integers from 0 to act_max */
    const float *gain, *offset; /* (B, C): prologue, see norm/norm.h; both NULL: none */
    const float *factor;        /* (C), of the prologue, or NULL */
    const float *residual;      /* (B, H', W', O), added to out; or NULL */
    int64_t activation;         /* of the prologue; GATED reads 2 * channels from x */
    int64_t upsample;           /* nearest-neighbour factor; x has height / upsample rows of width / upsample pixels */
    int64_t bias_stride;        /* outputs if each image has its own bias, else 0 */
    int64_t act_stride;         /* 1 if each image has its own grid, else 0 */
    int64_t act_max;            /* largest activation code, 2^bits - 1 */
    int64_t bits;               /* of a weight code in each plane, 1 to 8 */
    int64_t planes, plane_bytes;
    int64_t half_scale;         /* 1 if a step of codes is two steps of levels (1 and 2 bits): scale is multiplied by 0.5 */
    int64_t channel_block;      /* channels of a block, 32 or 64; the last one may be partly filled */
    int64_t images, height, width, channels, outputs;       /* B, H, W, C, O */
    int64_t pixel_stride;       /* floats from one pixel of x to the next: C, 2 C for GATED, more if x is a slice of channels */
    int64_t last_width;         /* width of the last row of an image: shorter where pixels of a linear layer do not fill it */
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, out_height, out_width;
    int64_t threads;
    double epsilon;             /* of the prologue's layer norm; 0: none */
} ConvParams;

/* Writes out. Returns 0, 1 if memory ran out (out is incomplete), or 2 if the kernel does not support the window. */
int dmquant_run(const ConvParams *conv);

/* The level of code c is level_step * c + level_min: 2 c - (2^bits - 1) up to 2 bits, else c - 2^(bits - 1). */
static inline int level_step(int64_t bits) { return bits <= 2 ? 2 : 1; }
static inline int level_min(int64_t bits) { return bits <= 2 ? 1 - (1 << bits) : -(1 << (bits - 1)); }
#endif
