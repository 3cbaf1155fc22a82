/* edgekit's firmware runtime: int8 kernels, start-up, host link. C11, no allocation, no recursion, no library besides libgcc and memcpy.
 *
 * Activations are int8, NHWC, batch 1. A stored integer q stands for scale * (q - zero_point).
 * Weights are int8, or packed int4/int2 in groups of 32 bits: byte i of a group holds the weights i, i + 4 (and i + 8, i + 12 of 2
 * bits), low bits first, two's complement. Each row starts with a group of its own; what the last group has over is 0.
 * Parameter structs are `static const`, so they and what they point to stay in flash.
 *
 * Requantization is TFLite's ("gemmlowp double rounding"). real = acc * multiplier * 2^(shift - 31), multiplier in [0, 2^31), usually
 * from 2^30 on, shift in [-31, 8] (positive is left):
 *     a = acc << max(shift, 0);   h = (a * multiplier + 2^30) >> 31   (64 bit);   y = h / 2^max(-shift, 0), ties away from zero
 * Contract: |a| < 2^30. Whoever writes the parameters proves it: (|bias| + 128 * sum |w|) << max(shift, 8 - weight_bits, 0) < 2^30 for
 * each channel.
 *
 * Weighted layers whose shifts all lie in [-16, -1] (MVE: [-31, -1]), with act_min -128 and act_max 127, requantize in fewer instructions.
 *
 * `bias` of weighted layers is FOLDED: bias[o] - in_zp * sum(w[o]); so kernels multiply plain x by w, and padding is x = in_zp.
 *
 * Weight arrays: aligned to 16 and readable up to a multiple of 4 bytes (round the array up; the content of the rest is free).
 * Scratch: aligned to 16; sizes are those of edgekit.firmware_sim.kernels: conv2d_scratch(), .... NULL where that is 0. Contents are free.
 * x, y and scratch do not overlap, with two exceptions. A kernel marked "in place": there y may equal x (or a). Weighted layers without
 * groups, pools and means go through x from its beginning, so y may lie over x if it starts far enough below: by what
 * targets/cortex_m/trails.py computes from the order of their reads and writes. Change that order and you change those distances.
 */
#ifndef EDGEKIT_H
#define EDGEKIT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Kernel set: chosen by the compiler's -mcpu, or by -DEK_SET=... (a set the core cannot run does not compile). */
#define EK_PORTABLE 0
#define EK_DSP 1
#define EK_MVE 2
#ifndef EK_SET
#if defined(__ARM_FEATURE_MVE)
#define EK_SET EK_MVE
#elif defined(__ARM_FEATURE_DSP)
#define EK_SET EK_DSP
#else
#define EK_SET EK_PORTABLE
#endif
#endif

/* ---- Weighted layers */

typedef struct {
    const void *weights;       /* OHWI: out_c rows of kernel_h * kernel_w * (in_c / groups) */
    const int32_t *bias;       /* out_c, folded */
    const int32_t *multiplier; /* out_c */
    const int8_t *shift;       /* out_c */
    uint16_t in_h, in_w, in_c;
    uint16_t out_h, out_w, out_c;
    uint16_t kernel_h, kernel_w;
    uint16_t stride_h, stride_w;
    uint16_t dilation_h, dilation_w;
    uint16_t pad_top, pad_left; /* bottom and right follow from the output's size */
    uint16_t groups;            /* 1: dense */
    uint8_t weight_bits;        /* 8, 4 or 2 */
    int8_t in_zp, out_zp;
    int8_t act_min, act_max; /* clamp of the output: -128, 127 without an activation */
} ek_conv2d;

/* Dense, grouped, dilated, strided, any padding; pointwise layers (1x1, no padding, groups 1) take a fast path by themselves.
 * conv1d is in_h = kernel_h = 1. */
void ek_conv2d_s8(const ek_conv2d *p, const int8_t *x, int8_t *y, void *scratch);

/* Depthwise with multiplier 1 (groups = in_c = out_c): the same struct, weights 1HWC: kernel_h * kernel_w rows of in_c. */
void ek_depthwise_s8(const ek_conv2d *p, const int8_t *x, int8_t *y, void *scratch);

typedef struct {
    const void *weights;       /* out_n rows of in_n */
    const int32_t *bias;       /* out_n, folded */
    const int32_t *multiplier; /* out_n */
    const int8_t *shift;       /* out_n */
    uint16_t rows;             /* how many vectors of in_n lie in x (1, or a sequence) */
    uint16_t in_n, out_n;
    uint8_t weight_bits;
    int8_t out_zp, act_min, act_max;
} ek_linear;

void ek_linear_s8(const ek_linear *p, const int8_t *x, int8_t *y, void *scratch);

/* ---- 1-bit layers
 *
 * Packed signs: bit 1 is +1, bit 0 is -1. A position holds ceil(channels / 32) words, channel c in bit c % 32 of word c / 32; bits behind the
 * last channel are 0. acc = sum of w * x over the taps inside the input, an exact integer: taps outside add nothing.
 *
 * Weights lie in rows, packed as signs are: out_c rows of kernel_h * kernel_w times ceil(in_c / groups / 32) words. y = acc >= thresholds[o] (int32,
 * packed out), or clamp(requantized(acc + base[o]) + out_zp) (int8 out). With ek_binary_vectors() they are transposed: in_c rows of
 * ceil(out_c / 32) words, readable 12 bytes further, and with s[o] the sum of o's weights and k = in_c the constants are
 *   thresholds: 2 * planes rows of ceil(out_c / 32) words, each row a bit of a number an output: first k + (t + s) / 2, then k + 1 + (s - t) / 2;
 *               t: the threshold clipped to [-k, k + 1], raised to s's parity (no output: 2k + 1, 0)
 *   base:       2 * out_c: bias - s - 2k, then bias + s + 2k.
 * planes = max(8, bits of 2k + 2), even, at most 16, k = kernel_h * kernel_w * in_c / groups. */
typedef struct {
    const void *weights;
    const void *thresholds;    /* NULL: int8 out */
    const int32_t *base;       /* int8 out: these three; else NULL */
    const int32_t *multiplier; /* out_c */
    const int8_t *shift;       /* out_c */
    uint16_t in_h, in_w, in_c;
    uint16_t out_h, out_w, out_c;
    uint16_t kernel_h, kernel_w;
    uint16_t stride_h, stride_w;
    uint16_t dilation_h, dilation_w;
    uint16_t pad_top, pad_left; /* bottom and right follow from the output's size */
    uint16_t groups;
    uint8_t planes;
    int8_t out_zp, act_min, act_max;
} ek_binary;
#ifndef EK_BAND_BYTES
#define EK_BAND_BYTES 16384 /* what ek_binary_planes() may take of scratch for the inputs of the positions at hand, if 32 do not take more */
#endif
/* x: packed; y: packed or int8 (NHWC). */
void ek_binary_vectors(const ek_binary *p, const void *x, void *y, void *scratch); /* linear: 1x1, out_h * out_w vectors; 32 outputs at once */
void ek_binary_planes(const ek_binary *p, const void *x, void *y, void *scratch);  /* 32 positions at once; kernels below 256 x 256 */
void ek_binary_rows(const ek_binary *p, const void *x, void *y, void *scratch);    /* one output after the other */

/* `batch` times a, m rows of k signs, with the transpose of b, n rows of k. The results are looked up: `table` has them for the sums -k, -k + 2, ... k,
 * and with a_unsigned, where a bit of a is 1 or 0, behind them for -k + 1, -k + 3, ... k - 1. k < 2^14;
 * planes: of k as ek_binary's, with a_unsigned those of k / 2. */
typedef struct {
    const int8_t *table;
    uint16_t batch, m, n, k;
    uint8_t planes, a_unsigned;
} ek_binary_matmul;
void ek_binary_matmul_s8(const ek_binary_matmul *p, const void *a, const void *b, int8_t *y, void *scratch);

typedef struct {
    const int16_t *threshold; /* n of them, or one */
    uint32_t positions;
    uint16_t channels, n;
} ek_binarize;
void ek_binarize_s8(const ek_binarize *p, const int8_t *x, void *y); /* bit = x >= threshold */

/* ---- Spiking layers: spikes int8 (counts), currents and membranes int16, all steps of a sequence in one call. */

typedef struct {
    const int8_t *weights; /* for each group kernel_h * kernel_w * (in_c / groups) rows of out_c / groups, filled up to a multiple of 4; aligned to 16 */
    const int16_t *bias;   /* out_c */
    uint16_t steps;
    uint16_t in_h, in_w, in_c;
    uint16_t out_h, out_w, out_c;
    uint16_t kernel_h, kernel_w;
    uint16_t stride_h, stride_w;
    uint16_t dilation_h, dilation_w;
    uint16_t pad_top, pad_left;
    uint16_t groups;
} ek_spiking;
/* y = bias + sum of w * x over the taps inside: only spikes that are there cost. No partial sum may leave int16. x: steps images of spikes. A linear
 * layer is a 1x1 convolution of a 1x1 image. scratch: 4 bytes for each input of an output and 16 more. */
void ek_spiking_s16(const ek_spiking *p, const int8_t *x, int16_t *y, void *scratch);

typedef struct {
    const int16_t *threshold, *decay, *v_init; /* `period` each: neuron i has constants i % period. decay: Q15, 32767: no leak */
    uint32_t n, period;                        /* neurons: a multiple of the period */
    uint32_t x_step;                           /* currents from one step to the next: n, or 0 for a current that is the same in each */
    uint16_t steps;
    uint8_t leak;             /* 0: no decay is less than 32767; 1: all are; 2: some */
    uint8_t zero, max_spikes; /* zero: reset to 0, else the threshold is subtracted for each spike */
} ek_neurons;
/* v = sat16(((v * decay + 2^14) >> 15) + x); s = v >= threshold (floor(v / threshold), at most max_spikes); reset. scratch: 2 * n bytes. */
void ek_neurons_s16(const ek_neurons *p, const int16_t *x, int8_t *spikes, void *scratch);
/* The same for one step a call, membranes v (n) kept by the caller. */
void ek_neurons_reset_s16(const ek_neurons *p, int16_t *v);
void ek_neurons_step_s16(const ek_neurons *p, const int16_t *x, int8_t *spikes, int16_t *v);

typedef struct {
    const int16_t *decay; /* `period`, as above */
    uint32_t n, period, x_step;
    uint16_t steps;
} ek_fade;
/* Currents that fade: y = sat16(((y of the step before * decay + 2^14) >> 15) + x), from 0. y may be x where x_step is n. */
void ek_fade_s16(const ek_fade *p, const int16_t *x, int16_t *y);
void ek_fade_reset_s16(int16_t *y, uint32_t n);
void ek_fade_step_s16(const ek_fade *p, const int16_t *x, int16_t *y); /* y holds the step before */

typedef struct {
    const int8_t *weights; /* of the layer from the spikes back to their neurons, as ek_spiking's */
    const int16_t *bias;
    const int16_t *threshold, *decay, *v_init, *decay_syn; /* as ek_neurons'; decay_syn 0: the current does not stay */
    uint32_t n, period, x_step;
    uint16_t steps;
    uint16_t in_h, in_w, in_c;
    uint16_t kernel_h, kernel_w;
    uint16_t pad_top, pad_left;
    uint16_t groups;
    uint8_t leak, zero, max_spikes;
} ek_recurrent;
/* Recurrent neurons: from the second step on bias + weights * spikes of the step before is added to x; then the current fades by decay_syn, and the
 * neurons go on as ek_neurons_s16. state: 6 * n bytes, kept from step to step. scratch: as ek_spiking_s16's, and the state, rounded up to 4 bytes, before it. */
void ek_recurrent_s16(const ek_recurrent *p, const int16_t *x, int8_t *spikes, void *scratch);
void ek_recurrent_reset_s16(const ek_recurrent *p, int16_t *state);
void ek_recurrent_step_s16(const ek_recurrent *p, const int16_t *x, int8_t *spikes, int16_t *state, void *scratch);

typedef struct {
    const int8_t *weights; /* as ek_conv2d's */
    const int32_t *bias;   /* folded */
    const float *multiplier;
    uint16_t steps;
    uint16_t in_h, in_w, in_c;
    uint16_t out_h, out_w, out_c;
    uint16_t kernel_h, kernel_w;
    uint16_t stride_h, stride_w;
    uint16_t dilation_h, dilation_w;
    uint16_t pad_top, pad_left;
    uint16_t groups;
    int8_t in_zp;
} ek_current;
/* Currents of real-valued inputs: y = sat16(round_half_even((float)(bias + sum of w * x) * multiplier)). */
void ek_current_s16(const ek_current *p, const int8_t *x, int16_t *y);

typedef struct {
    const uint16_t *delay; /* `period`, in steps */
    uint32_t n, period;
    uint16_t steps, longest;
} ek_delay;
/* y of step t is x of step t - delay, 0 before the first. */
void ek_delay_s8(const ek_delay *p, const int8_t *x, int8_t *y);
/* One step a call; line: longest * n bytes that are on their way, the last step first. y is not x. */
void ek_delay_reset_s8(const ek_delay *p, int8_t *line);
void ek_delay_step_s8(const ek_delay *p, const int8_t *x, int8_t *y, int8_t *line);

typedef struct {
    uint16_t steps, in_h, in_w, channels, out_h, out_w;
    uint16_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
} ek_spike_pool;
void ek_spike_pool_s8(const ek_spike_pool *p, const int8_t *x, int8_t *y);                     /* sums of spikes */
void ek_add_currents_s16(const int16_t *a, const int16_t *b, int16_t *y, uint32_t n);         /* y = sat16(a + b); y may be a or b */
/* y = sat16(x + amplitude[i % channels] * s), only where there are spikes; y may be x. n is a multiple of channels. */
void ek_add_spikes_s16(const int16_t *x, const int8_t *s, int16_t *y, const int16_t *amplitude, uint32_t n, uint32_t channels);
void ek_accumulate_s16(const int16_t *x, int32_t *y, uint32_t n, uint32_t steps);              /* y = sum over the steps */
void ek_accumulate_s8(const int8_t *x, int32_t *y, uint32_t n, uint32_t steps);                /* the same of spikes */
/* 1 if 1 / sum of 2^-((max - y) * scale / 2^24) is above 2^24 / limit: softmax's largest value, n at most 255. */
int ek_sure_s32(const int32_t *y, uint32_t n, uint32_t scale, uint32_t limit);
void ek_accumulate_reset_s16(int32_t *y, uint32_t n);
void ek_accumulate_step_s16(const int16_t *x, int32_t *y, uint32_t n);                         /* y += x */
void ek_accumulate_step_s8(const int8_t *x, int32_t *y, uint32_t n);

/* ---- Elementwise. In place: y may be a (not b). b repeats every b_n elements (n is a multiple of b_n): b_n = n without broadcast,
 * b_n = channels for a vector of channels. */

typedef struct {
    uint32_t n, b_n;
    int32_t a_multiplier, b_multiplier, out_multiplier;
    int8_t a_shift, b_shift, out_shift; /* TFLite's add: inputs are shifted left by 20, then requantized to the greater scale twice */
    int8_t a_zp, b_zp, out_zp, act_min, act_max;
} ek_add;
/* s = 2 * max(a_scale, b_scale): a_* is a_scale / s, b_* is b_scale / s, out_* is s / (2^20 * out_scale). shift <= 0 in all three. */
void ek_add_s8(const ek_add *p, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    uint32_t n, b_n;
    int32_t multiplier; /* a_scale * b_scale / out_scale */
    int8_t shift, a_zp, b_zp, out_zp, act_min, act_max;
} ek_mul;
void ek_mul_s8(const ek_mul *p, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    uint32_t n;
    int32_t multiplier; /* in_scale / out_scale */
    int8_t shift, in_zp, out_zp, act_min, act_max;
} ek_requant;
void ek_requant_s8(const ek_requant *p, const int8_t *x, int8_t *y); /* in place */

void ek_clamp_s8(const int8_t *x, int8_t *y, uint32_t n, int8_t low, int8_t high);        /* in place; relu, relu6 at one scale */
void ek_lut_s8(const int8_t *table, const int8_t *x, int8_t *y, uint32_t n);              /* in place; y = table[x + 128] */
void ek_quantize_f32(const float *x, int8_t *y, uint32_t n, float inverse_scale, int8_t zero_point); /* round half to even; NaN: -128 */
void ek_dequantize_f32(const int8_t *x, float *y, uint32_t n, float scale, int8_t zero_point);

typedef struct {
    const uint32_t *table; /* 256: table[d] = round(2^22 * exp(-d * in_scale)), d = row maximum - x */
    uint16_t rows, n;      /* n <= 1023 */
    int32_t multiplier;    /* of 1 / (2^20 * out_scale) */
    int8_t shift, out_zp;
} ek_softmax;
void ek_softmax_s8(const ek_softmax *p, const int8_t *x, int8_t *y); /* in place */

/* ---- Pools */

typedef struct {
    int32_t multiplier; /* in_scale / (out_scale * divisor) */
    int8_t shift;
    uint16_t divisor; /* the number of elements this row is for */
} ek_divisor;

typedef struct {
    const ek_divisor *divisors; /* average only: one row for each divisor that occurs */
    uint16_t n_divisors;
    uint16_t in_h, in_w, channels, out_h, out_w;
    uint16_t kernel_h, kernel_w, stride_h, stride_w;
    uint16_t dilation_h, dilation_w;                 /* maximum only; 1 for an average */
    uint16_t pad_top, pad_left, pad_bottom, pad_right;
    uint8_t include_pad; /* average: divide by the window's elements inside the padded input (1), or inside the input (0) */
    int8_t in_zp, out_zp, act_min, act_max;
} ek_pool;
/* Average: sum over the window's elements inside the input of (x - in_zp), requantized by the row of its divisor, + out_zp. */
void ek_average_pool_s8(const ek_pool *p, const int8_t *x, int8_t *y);
void ek_max_pool_s8(const ek_pool *p, const int8_t *x, int8_t *y); /* one scale: no requantization; padding never wins */

typedef struct {
    uint32_t positions; /* height * width */
    uint16_t channels;
    int32_t multiplier; /* in_scale / (out_scale * positions) */
    int8_t shift, in_zp, out_zp, act_min, act_max;
} ek_mean;
void ek_mean_s8(const ek_mean *p, const int8_t *x, int8_t *y); /* mean over height and width; y may be x */

/* ---- Moves */

/* One input of a concatenation: y[i * y_stride + j] = requantized x[i * n + j], i < outer, j < n. Point y at the input's place. */
typedef struct {
    uint32_t outer, n, y_stride; /* elements */
    int32_t multiplier;          /* in_scale / out_scale; 0: copy */
    int8_t shift, in_zp, out_zp, act_min, act_max;
} ek_concat;
void ek_concat_s8(const ek_concat *p, const int8_t *x, int8_t *y);

typedef struct {
    uint16_t in_h, in_w, channels;
    uint16_t top, bottom, left, right;
    int8_t value; /* in_zp for the real 0 */
} ek_pad;
void ek_pad_s8(const ek_pad *p, const int8_t *x, int8_t *y);

/* Any permutation, slice or layout change of up to 4 axes: y is dense of `shape`, read from x[offset + sum(index * stride)]. */
typedef struct {
    uint32_t shape[4];
    int32_t stride[4]; /* elements of x */
    int32_t offset;
} ek_gather;
void ek_gather_s8(const ek_gather *p, const int8_t *x, int8_t *y);

/* ---- Building blocks for kernels of your own */

int32_t ek_requantize(int32_t acc, int32_t multiplier, int shift);
void ek_unpack(const uint8_t *packed, int8_t *out, uint32_t n, int bits); /* bits 4 or 2; starts with a group */

/* ---- Integrity */

typedef struct {
    const void *data;
    uint32_t bytes;
    uint32_t crc; /* CRC-32 of zlib and PNG: zlib.crc32 */
} ek_segment;

uint32_t ek_crc32(const void *data, uint32_t bytes);
void ek_check_weights(const ek_segment *segments, uint32_t n);    /* ends with EK_EXIT_WEIGHTS if one differs, naming its index */
void ek_check_arena(const void *arena, uint32_t have, uint32_t need); /* ends with EK_EXIT_ARENA if too small or not aligned to 16 */

/* ---- The program
 *
 * startup.c (Reset_Handler) enables the FPU, paints the stack, copies .data, clears .bss, turns fault handlers, stack limit and MPU
 * guards on, calls ek_main(), logs the stack's high-water mark and ends with ek_main()'s value. The application writes ek_main():
 *
 *     static uint8_t arena[MODEL_ARENA_BYTES] EK_ARENA;
 *     int ek_main(void) {
 *         model_init(arena, sizeof arena);              // ek_check_arena(), ek_check_weights()
 *         while (ek_input(input, MODEL_INPUT_BYTES)) {  // a batch of samples per boot
 *             model_run(...);
 *             ek_output(output, MODEL_OUTPUT_BYTES);
 *         }
 *         return 0;
 *     }
 */
int ek_main(void);

/* The hooks below are in semihost.c for QEMU (and any debugger with semihosting). For a real board leave semihost.c out and write them:
 * a UART, USB or sensor for input, and for ek_exit a loop, a reset, or a LED. */
int ek_input(void *destination, uint32_t bytes);     /* 1: all bytes were read; 0: the input is at its end. A part ends with EK_EXIT_INPUT */
void ek_output(const void *source, uint32_t bytes);
void ek_log(const char *text);
_Noreturn void ek_exit(int code);

void ek_log_number(const char *name, uint32_t value); /* "ek: NAME=VALUE\n", read by edgekit */
uint32_t ek_stack_used(void);                         /* bytes, high-water mark since reset */

/* Watchdog, where the board has one that its board macro names (EK_WATCHDOG_BASE, CMSDK); else both do nothing. */
void ek_watchdog_start(uint32_t ticks);
void ek_watchdog_feed(void);

#define EK_ARENA __attribute__((section(".arena"), aligned(16))) /* not cleared at reset */
#define EK_WEIGHTS __attribute__((section(".weights"), aligned(16))) /* flash, counted apart from code; all weights, biases, tables */

/* Exit codes: firmware_sim/faults.py has the sentences. */
enum {
    EK_EXIT_OK = 0,
    EK_EXIT_ARENA = 0x60,
    EK_EXIT_WEIGHTS = 0x61,
    EK_EXIT_INPUT = 0x62,
    EK_EXIT_HOST = 0x63, /* the host's files could not be opened, read or written */
    EK_EXIT_STACK = 0x64,
    EK_EXIT_WATCHDOG = 0x65,
    EK_EXIT_FLASH_WRITE = 0x66,
    EK_EXIT_INTERRUPT = 0x71, /* an interrupt nobody handles */
    EK_EXIT_HARD_FAULT = 0x73,
    EK_EXIT_MEM_MANAGE = 0x74,
    EK_EXIT_BUS_FAULT = 0x75,
    EK_EXIT_USAGE_FAULT = 0x76,
    EK_EXIT_SECURE_FAULT = 0x77
};

#ifdef __cplusplus
}
#endif
#endif
