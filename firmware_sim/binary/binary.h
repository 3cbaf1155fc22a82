/* 1-bit layers: convolution, linear layer, matrix product and sign, exact to the integer on every processor.
 *
 * Activations: bytes, channels last, least significant bit first; bit 1 is +1, bit 0 is -1, bits behind the last channel are 0.
 * acc = sum(w * x) over the taps inside the image, w and x in {-1, +1}.
 *
 * Weights, in the layout that all variants share: each group of a convolution by itself, its outputs in blocks of 8. A row is the
 * ceil(C / groups / 8) bytes of every tap, one tap after the other, `bytes` in all. A block of n outputs (8; fewer in the last) is
 * bytes / 8 times n 64-bit words, one of each row, then n times bytes % 8 bytes, the rest of each row: as many bytes as the rows
 * themselves, so a weight takes one bit. Little-endian.
 */
#ifndef EK_BINARY_H
#define EK_BINARY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int32_t batch, height, width, channels;           /* of the input; ceil(channels / 8) bytes a pixel */
    int32_t out_height, out_width, out_channels;
    int32_t kernel[2], stride[2], padding[2], dilation[2], groups;
} ekb_conv;

/* What becomes of the sums. With `bits`: packed, bit = acc >= threshold[o]. Else integers:
 * clamp(round_half_even((float)(acc + bias[o]) * (scale[o] / out_scale)) + out_zp, low, high). */
typedef struct {
    uint8_t *bits;
    const int32_t *threshold;
    int8_t *integers;
    const float *scale;
    const int32_t *bias;
    float out_scale;
    int32_t out_zp, low, high;
} ekb_end;

/* Each returns 0, or -1 if memory ran out. */

/* x: batch, height, width, bytes. Out: batch, out_height, out_width, bytes; or batch, out_channels, out_height, out_width. */
int ekb_conv2d(const ekb_conv *shape, const uint8_t *x, const uint8_t *weight, const ekb_end *end);

/* x: rows of ceil(features / 8) bytes. Out: rows of ceil(outputs / 8) bytes, or of outputs integers. */
int ekb_linear(int32_t rows, int32_t features, int32_t outputs, const uint8_t *x, const uint8_t *weight, const ekb_end *end);

/* a: batch, m rows; b: batch, n rows; rows of ceil(features / 8) bytes, both in the layout of activations. Out: batch, m, n integers.
 * With a_unsigned a bit of a is 1 or 0. end->scale points to one number; end->bias is not read. */
int ekb_matmul(int32_t batch, int32_t m, int32_t n, int32_t features, int a_unsigned, const uint8_t *a, const uint8_t *b,
               const ekb_end *end);

/* x: (outer, channels, inner), to be packed along channels; out: (outer, inner, ceil(channels / 8)). thresholds: one, or one for
 * each channel. */
void ekb_binarize_int8(int32_t outer, int32_t channels, int32_t inner, const int8_t *x, const int16_t *threshold, int32_t thresholds,
                       uint8_t *out);
void ekb_binarize_float(int32_t outer, int32_t channels, int32_t inner, const float *x, const float *threshold, int32_t thresholds,
                        uint8_t *out);

/* Rows of `bytes` bytes each to the layout of weights above. */
void ekb_pack_weights(int32_t outputs, int32_t bytes, const uint8_t *rows, uint8_t *packed);

/* Name of the variant in use: "avx512", "avx2", "popcnt", "neon" or "portable". The best one that the processor has, or what the
 * environment variable EDGEKIT_BINARY_ISA says when it is first asked. */
const char *ekb_isa(void);

/* Use another variant; -1, and no change, if there is none of that name or the processor does not have it. Not for use while a
 * layer runs in another thread. NULL: the best one. */
int ekb_choose_isa(const char *name);

#ifdef __cplusplus
}
#endif
#endif
