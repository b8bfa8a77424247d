/* What Python hands to a kernel: one convolution of float images, channels last, with packed weights.
 *
 * A weight is a sum over planes of (level - shift) * scale with whole levels and shifts; an activation is a = code - zero. The
 * sum of level * a is a whole number and exact in every kernel, and all kernels end with the same float expression, so they
 * agree bit for bit. The fields are those that ops.py packs. A linear layer is a 1x1 convolution. */
#ifndef DMQUANT_CONV_PARAMS_H
#define DMQUANT_CONV_PARAMS_H
#include <stdint.h>

typedef struct {
    const float *x;             /* (images, height, width, channels) */
    float *out;                 /* (images, out_height, out_width, outputs) */
    const uint8_t *weight;      /* (planes, plane_bytes), blocked: see blocking.py */
    const int32_t *weight_sums;      /* (planes, outputs): sums of levels */
    const float *scale;         /* (planes, outputs), of weights */
    const float *zero;          /* (outputs), of weights; NULL where all shifts are zero */
    const float *bias;          /* (outputs), or as many for each image, or NULL */
    const float *act_scale;     /* of each image; one for all if act_stride is 0 */
    const float *act_zero;
    const float *gain, *offset; /* (images, channels): x * gain + offset is quantized instead of x; or NULL */
    const float *factor;        /* (channels), of what they make of x, or NULL */
    const float *residual;      /* added to the output, of its shape; or NULL */
    const float *skip;        /* (images, height, width, beside_channels): the last channels, those before are in x; or NULL */
    int64_t activation;           /* what is done to x * gain + offset: see norm/norm.h; GATED reads 2 * channels of x */
    int64_t upsample;               /* each pixel of x is read so often in each direction: height and width are zoomed */
    int64_t bias_stride;        /* `outputs` where each image has its own bias, else 0 */
    int64_t act_stride;
    int64_t act_max;            /* the largest code */
    int64_t bits;               /* of a weight in each plane */
    int64_t planes, plane_bytes;
    int64_t half_scale;             /* 1 where the scale is that of a code, and levels are twice as fine: 1 and 2 bits */
    int64_t block;              /* channels of a block, 32 or 64 */
    int64_t images, height, width, channels, outputs;
    int64_t skip_channels;    /* of `channels`; 0 where all are in x */
    int64_t last_width;         /* pixels of the last row: a linear layer's rows need not come out even */
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, out_height, out_width;
    int64_t threads;
    double epsilon;             /* of a layer norm over the channels, before the gain: see norm/layer_norm.h; 0: none */
} ConvParams;

/* 0; or 1 where memory ran out, and `out` is unfinished; or 2 where the kernel is not made for such a window. */
int dmquant_run(const ConvParams *conv);

/* Levels of code c: 2 c - (2^bits - 1) up to 2 bits, else c - 2^(bits - 1). */
static inline int level_step(int64_t bits) { return bits <= 2 ? 2 : 1; }
static inline int level_min(int64_t bits) { return bits <= 2 ? 1 - (1 << bits) : -(1 << (bits - 1)); }
#endif
