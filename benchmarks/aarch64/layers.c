/* One layer, run twice (the first call takes what only a first call takes); the second is counted, from counted() to finished().
 *
 * Argument: kernel. Standard input: 10 int32s (fully connected: 0 | convolution: side of the image, a padding of 1 included for int8;
 * inputs, outputs, taps of a side, bytes of x, weight, threshold or bias, scale, result, zero point), then x, weight, threshold or
 * bias, scale. Standard output: the result. */
#include "binary.h"

#include <arm_neon.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t side, in, out, kernel, sizes[5], zero_point;
} header;

typedef struct {
    header h;
    int8_t *x, *w, *y;
    int32_t *bias;
    float *scale;
} layer;

static void *take(int32_t bytes)
{
    void *p = malloc((size_t)bytes + 64);
    if (bytes && fread(p, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(2);
    return p;
}

static inline void put4(const layer *l, int32_t o, int32x4_t acc, int8_t *y)
{
    float32x4_t v = vmulq_f32(vcvtq_f32_s32(vaddq_s32(acc, vld1q_s32(l->bias + o))), vld1q_f32(l->scale + o));
    int16x4_t n = vqmovn_s32(vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(l->h.zero_point)));
    int8x8_t q = vqmovn_s16(vcombine_s16(n, n));
    vst1_lane_s32((int32_t *)(void *)y, vreinterpret_s32_s8(q), 0);
}

#ifdef __ARM_FEATURE_DOTPROD
#define NAME(v80, dot) dot
static inline int32x4_t mac(int32x4_t acc, int8x16_t x, int8x16_t w) { return vdotq_s32(acc, x, w); }
#else
#define NAME(v80, dot) v80
static inline int32x4_t mac(int32x4_t acc, int8x16_t x, int8x16_t w) /* no -128 among the weights: two products fit int16 */
{
    return vpadalq_s16(acc, vmlal_high_s8(vmull_s8(vget_low_s8(x), vget_low_s8(w)), x, w));
}
#endif

/* 4 outputs at a time, 16 inputs a step; x is `rows` runs of `run` bytes. */
static inline void outputs4(const layer *l, const int8_t *x, ptrdiff_t x_row, int32_t rows, int32_t run, int8_t *y)
{
    const ptrdiff_t all = (ptrdiff_t)rows * run;
    const int8_t *w = l->w;
    for (int32_t o = 0; o < l->h.out; o += 4, w += 3 * all) {
        int32x4_t a = vdupq_n_s32(0), b = a, c = a, d = a;
        for (int32_t r = 0; r < rows; r++)
            for (const int8_t *p = x + r * x_row, *end = p + run; p < end; p += 16, w += 16) {
                int8x16_t v = vld1q_s8(p);
                a = mac(a, v, vld1q_s8(w)), b = mac(b, v, vld1q_s8(w + all));
                c = mac(c, v, vld1q_s8(w + 2 * all)), d = mac(d, v, vld1q_s8(w + 3 * all));
            }
        put4(l, o, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)), y + o);
    }
}

static void NAME(simple_v80, simple_dot)(const layer *l)
{
    const header *h = &l->h;
    const int32_t size = h->side ? h->side - h->kernel + 1 : 1, wide = h->side ? h->side * h->in : 0;
    for (int32_t i = 0; i < size; i++)
        for (int32_t j = 0; j < size; j++)
            outputs4(l, l->x + i * wide + j * h->in, wide, h->kernel, h->kernel * h->in, l->y + (i * size + j) * h->out);
}

#ifdef __ARM_FEATURE_DOTPROD
/* 16 outputs of P places at a time. Weights: 16 outputs, 4 inputs of each together, so that a lane of x serves a register of them. */
static inline __attribute__((always_inline)) void block16(const layer *l, const int8_t *x, ptrdiff_t x_row, int8_t *y, const int P)
{
    const header *h = &l->h;
    const int8_t *w = l->w;
    for (int32_t o = 0; o < h->out; o += 16) {
        int32x4_t acc[4][4];
        for (int p = 0; p < P; p++)
            acc[p][0] = acc[p][1] = acc[p][2] = acc[p][3] = vdupq_n_s32(0);
        for (int32_t r = 0; r < h->kernel; r++)
            for (const int8_t *at = x + r * x_row, *end = at + h->kernel * h->in; at < end; at += 16, w += 256) {
                int8x16_t v[4];
#pragma GCC unroll 4
                for (int p = 0; p < P; p++)
                    v[p] = vld1q_s8(at + p * h->in);
#define LANE(k) \
    { \
        int8x16x4_t wv = vld1q_s8_x4(w + 64 * k); \
        _Pragma("GCC unroll 4") for (int p = 0; p < P; p++) _Pragma("GCC unroll 4") for (int q = 0; q < 4; q++) \
            acc[p][q] = vdotq_laneq_s32(acc[p][q], wv.val[q], v[p], k); \
    }
                LANE(0) LANE(1) LANE(2) LANE(3)
            }
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
                put4(l, o + 4 * q, acc[p][q], y + p * h->out + o + 4 * q);
    }
}

static void blocked_dot(const layer *l)
{
    const header *h = &l->h;
    if (!h->side) {
        block16(l, l->x, 0, l->y, 1);
        return;
    }
    const int32_t size = h->side - h->kernel + 1, wide = h->side * h->in;
    for (int32_t i = 0; i < size; i++)
        for (int32_t j = 0; j < size; j += 4)
            block16(l, l->x + i * wide + j * h->in, wide, l->y + (i * size + j) * h->out, 4);
}
#endif

static void binary(const layer *l)
{
    const header *h = &l->h;
    ekb_end end = {.bits = (uint8_t *)l->y, .threshold = l->bias};
    if (!h->side) {
        ekb_linear(1, h->in, h->out, (uint8_t *)l->x, (uint8_t *)l->w, &end);
        return;
    }
    const int32_t k = h->kernel;
    ekb_conv s = {1, h->side, h->side, h->in, h->side, h->side, h->out, {k, k}, {1, 1}, {k / 2, k / 2}, {1, 1}, 1};
    ekb_conv2d(&s, (uint8_t *)l->x, (uint8_t *)l->w, &end);
}

__attribute__((noinline)) void counted(void (*run)(const layer *), const layer *l) { run(l); __asm volatile("" ::: "memory"); }
__attribute__((noinline)) void finished(void) { __asm volatile("" ::: "memory"); }

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const layer *);
    } kernels[] = {
        {"binary", binary},
        {NAME("simple_v80", "simple_dot"), NAME(simple_v80, simple_dot)},
#ifdef __ARM_FEATURE_DOTPROD
        {"blocked_dot", blocked_dot},
#endif
    };
    layer l;
    if (fread(&l.h, 4, 10, stdin) != 10)
        return 2;
    l.x = take(l.h.sizes[0]), l.w = take(l.h.sizes[1]), l.bias = take(l.h.sizes[2]), l.scale = take(l.h.sizes[3]);
    l.y = calloc(1, (size_t)l.h.sizes[4]);
    if (argc > 1 && !strcmp(argv[1], "binary")) { /* to the order of binary.h, as a .pte has them */
        int32_t bytes = l.h.sizes[1] / l.h.out;
        uint8_t *packed = malloc((size_t)l.h.sizes[1]);
        ekb_pack_weights(l.h.out, bytes, (uint8_t *)l.w, packed);
        l.w = (int8_t *)packed;
    }
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (argc > 1 && !strcmp(argv[1], kernels[i].name)) {
            kernels[i].run(&l);
            counted(kernels[i].run, &l);
            finished();
            fwrite(l.y, 1, (size_t)l.h.sizes[4], stdout);
            return 0;
        }
    return 4;
}
