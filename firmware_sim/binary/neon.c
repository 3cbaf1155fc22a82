/* aarch64: CNT counts the bits of each byte. Four registers hold the same word of 8 outputs; what differs is added in bytes, which
 * hold 31 words, and leaves them once for all outputs together. */
#include "internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

enum { BYTE_WORDS = 31, SUM_WORDS = 7 /* that many, and the sum of four bytes fits a byte */ };

/* N words in a row, each in both halves of a register. */
INLINE void broadcast(uint8x16_t v[4], const uint8_t *p, const int N)
{
    const uint64_t *words = (const uint64_t *)(const void *)p;
    if (N == 4) {
        uint64x2x4_t all = vld4q_dup_u64(words);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++)
            v[n] = vreinterpretq_u8_u64(all.val[n]);
    } else if (N == 3) {
        uint64x2x3_t all = vld3q_dup_u64(words);
#pragma GCC unroll 3
        for (int n = 0; n < 3; n++)
            v[n] = vreinterpretq_u8_u64(all.val[n]);
    } else if (N == 2) {
        uint64x2x2_t all = vld2q_dup_u64(words);
        v[0] = vreinterpretq_u8_u64(all.val[0]), v[1] = vreinterpretq_u8_u64(all.val[1]);
    } else {
        v[0] = vreinterpretq_u8_u64(vld1q_dup_u64(words));
    }
}

/* P pixels, of which some words have been read. */
typedef struct {
    uint8x16_t low[2][4]; /* pixel; outputs 2 r and 2 r + 1, 8 bytes each */
    int32x4_t acc[2][2];
    int pending; /* words in low */
} sums;

/* What differs for each of 8 outputs. */
INLINE int16x8_t sum_of(const uint8x16_t low[4], int words)
{
    uint16x8_t n;
    if (words <= SUM_WORDS)
        n = vpaddlq_u8(vpaddq_u8(vpaddq_u8(low[0], low[1]), vpaddq_u8(low[2], low[3])));
    else
        n = vpaddq_u16(vpaddq_u16(vpaddlq_u8(low[0]), vpaddlq_u8(low[1])), vpaddq_u16(vpaddlq_u8(low[2]), vpaddlq_u8(low[3])));
    return vreinterpretq_s16_u16(n);
}

/* What may differ at most for a bit to be set, where fewer than 32 words are counted. */
INLINE int16x8_t most_of(int32x4_t ones, const int32_t *threshold)
{
    return vcombine_s16(vqshrn_n_s32(vqsubq_s32(ones, vld1q_s32(threshold)), 1),
                        vqshrn_n_s32(vqsubq_s32(ones, vld1q_s32(threshold + 4)), 1));
}

INLINE uint8_t byte_of(uint16x8_t set)
{
    const uint16x8_t place = {1, 2, 4, 8, 16, 32, 64, 128};
    return (uint8_t)vaddvq_u16(vandq_u16(set, place));
}

/* acc -= 2 * what differs */
INLINE void flush(sums *s, const int P)
{
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) {
        const int16x8_t differing = sum_of(s->low[p], s->pending);
        s->acc[p][0] = vmlsl_n_s16(s->acc[p][0], vget_low_s16(differing), 2);
        s->acc[p][1] = vmlsl_high_n_s16(s->acc[p][1], differing, 2);
    }
}

INLINE void begin(sums *s, const int P)
{
    s->pending = 0;
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
        s->low[p][0] = s->low[p][1] = s->low[p][2] = s->low[p][3] = vdupq_n_u8(0);
}

INLINE void add(sums *s, const uint8_t *w, uint8x16_t xv[2][4], uint8x16_t mv[2][4], const int P, const int N, const int masked)
{
    if (s->pending + N > BYTE_WORDS) {
        /* Else GCC computes a part of what follows for every word, as it is done at the end anyway. */
#pragma GCC unroll 8
        for (int i = 0; i < 4 * P; i++)
            __asm("" : "+w"(s->low[i / 4][i % 4]));
        flush(s, P);
        begin(s, P);
    }
    s->pending += N;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        const uint8x16x4_t wv = vld1q_u8_x4(w + 64 * n);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                uint8x16_t d = veorq_u8(xv[p][n], wv.val[r]);
                s->low[p][r] = vaddq_u8(s->low[p][r], vcntq_u8(masked ? vandq_u8(d, mv[p][n]) : d));
            }
    }
}

/* N words of the pixels, `at` bytes behind their first. */
INLINE void add_at(sums *s, const uint8_t *w, const uint8_t *const x[2], const uint8_t *const mask[2], ptrdiff_t at, const int P,
                   const int N, const int masked)
{
    uint8x16_t xv[2][4], mv[2][4];
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) {
        broadcast(xv[p], x[p] + at, N);
        if (masked)
            broadcast(mv[p], mask[p] + at, N);
    }
    add(s, w, xv, mv, P, N, masked);
}

INLINE void add_row(sums *s, const uint8_t *w, const uint8_t *const x[2], const uint8_t *const mask[2], ptrdiff_t at, int32_t words,
                    const int P, const int masked)
{
    for (; words >= 4; words -= 4, w += 256, at += 32)
        add_at(s, w, x, mask, at, P, 4, masked);
    if (words == 3)
        add_at(s, w, x, mask, at, P, 3, masked);
    else if (words == 2)
        add_at(s, w, x, mask, at, P, 2, masked);
    else if (words == 1)
        add_at(s, w, x, mask, at, P, 1, masked);
}

INLINE void put(const sums *s, int32x4_t least, int32x4_t more, uint8_t *const bits[2], const int P)
{
#pragma GCC unroll 2
    for (int p = 0; p < P; p++)
        *bits[p] = byte_of(vuzp1q_u16(vreinterpretq_u16_u32(vcgeq_s32(s->acc[p][0], least)),
                                      vreinterpretq_u16_u32(vcgeq_s32(s->acc[p][1], more))));
}

/* The blocks of up to two pixels. What is read of the job is kept apart, for the results might overlap it. R rows of W words without
 * a tail, where that is known before; R = 0: any. */
INLINE void blocks_of(const ekb_job *job, int first, int32_t block, int32_t end, const int P, const int masked, const int R,
                      const int W)
{
    const int32_t rows = R ? R : job->rows, words = R ? W : job->words;
    const ptrdiff_t w_row = job->w_row, x_row = job->x_row, w_block = job->w_block, acc_pixel = job->acc_pixel;
    const uint8_t *x[2], *mask[2], *w = job->w + block * w_block;
    const uint8_t *tail = job->tails && !R ? job->tails + 64 * (ptrdiff_t)block : NULL;
    const int32_t *threshold = job->threshold + 8 * (ptrdiff_t)block;
    int32_t *acc = job->acc + first * acc_pixel + 8 * (ptrdiff_t)block;
    int32x4_t ones[2];
    uint8_t *bits[2];
    const int packed = job->bits[0] != NULL;
#pragma GCC unroll 2
    for (int p = 0; p < P; p++) {
        x[p] = job->x[first + p], mask[p] = job->mask[first + p], ones[p] = vdupq_n_s32(job->ones[first + p]);
        bits[p] = packed ? job->bits[first + p] + block : NULL;
    }
    for (int32_t left = end - block; left > 0; left--, w += w_block) {
        sums s;
        begin(&s, P);
#pragma GCC unroll 2
        for (int p = 0; p < P; p++)
            s.acc[p][0] = s.acc[p][1] = ones[p];
        if (R) {
#pragma GCC unroll 4
            for (int row = 0; row < R; row++)
                add_at(&s, w + row * w_row, x, mask, row * x_row, P, W, masked);
        } else
            for (int32_t row = 0; row < rows; row++)
                add_row(&s, w + row * w_row, x, mask, row * x_row, words, P, masked);
        if (!R && tail) {
            add_at(&s, tail, x, mask, 8 * (ptrdiff_t)words, P, 1, masked);
            tail += 64;
        }
        flush(&s, P);
        if (packed) {
            put(&s, vld1q_s32(threshold), vld1q_s32(threshold + 4), bits, P);
            threshold += 8, bits[0]++, bits[P - 1] += P - 1;
            continue;
        }
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            vst1q_s32(acc + p * acc_pixel, s.acc[p][0]);
            vst1q_s32(acc + p * acc_pixel + 4, s.acc[p][1]);
        }
        acc += 8;
    }
}

/* What is counted of the difference between a pixel's W words and T bytes and the weights in registers, for 8 outputs. MASK 1: only
 * where the pixel's mask has a bit; 2: only where it has none, x being 0. */
INLINE int16x8_t differing_of(uint8x16_t wv[4][4], uint8x16_t wt[2], const uint8_t *x, const uint8_t *mask, const int W, const int T,
                              const int MASK)
{
    uint8x16_t xv[4], mv[4], low[4];
    if (MASK != 2)
        broadcast(xv, x, W);
    if (MASK)
        broadcast(mv, mask, W);
#pragma GCC unroll 4
    for (int n = 0; n < W; n++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            uint8x16_t d = MASK == 2 ? vbicq_u8(wv[n][r], mv[n]) : veorq_u8(xv[n], wv[n][r]);
            d = vcntq_u8(MASK == 1 ? vandq_u8(d, mv[n]) : d);
            low[r] = n ? vaddq_u8(low[r], d) : d;
        }
    uint8x16_t half[2] = {vpaddq_u8(low[0], low[1]), vpaddq_u8(low[2], low[3])};
    if (T) {
        uint8x16_t xt = {0}, mt = {0};
        if (MASK != 2)
            xt = vreinterpretq_u8_u32(vld1q_dup_u32((const uint32_t *)(const void *)(x + 8 * W)));
        if (MASK)
            mt = vreinterpretq_u8_u32(vld1q_dup_u32((const uint32_t *)(const void *)(mask + 8 * W)));
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) {
            uint8x16_t d = MASK == 2 ? vbicq_u8(wt[r], mt) : veorq_u8(xt, wt[r]);
            half[r] = vaddq_u8(half[r], vcntq_u8(MASK == 1 ? vandq_u8(d, mt) : d));
        }
    }
    return vreinterpretq_s16_u16(vpaddlq_u8(vpaddq_u8(half[0], half[1])));
}

/* One row of W words, and T bytes more that lie behind a block's words: a block's weights stay in registers for all pixels. MASK 2:
 * all pixels have the same mask, and their x is 0 outside it; what differs there is known once for all. */
INLINE void pixels_of(const ekb_job *job, int32_t pixels, int32_t block, int32_t end, const int packed, const int MASK, const int W,
                      const int T)
{
    const ptrdiff_t w_block = job->w_block;
    const uint8_t *w = job->w + block * w_block;
    for (; block < end; block++, w += w_block) {
        uint8x16_t wv[4][4], wt[2] = {vdupq_n_u8(0), vdupq_n_u8(0)};
#pragma GCC unroll 4
        for (int n = 0; n < W; n++)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                wv[n][r] = vld1q_u8(w + 64 * n + 16 * r);
        if (T)
            wt[0] = vld1q_u8(w + 64 * W), wt[1] = vld1q_u8(w + 64 * W + 16);
        const int16x8_t outside = MASK == 2 ? differing_of(wv, wt, NULL, job->mask[0], W, T, 2) : vdupq_n_s16(0);
        int16x8_t most = outside; /* what may differ at most where a bit is set */
        if (packed) {
            most = most_of(vdupq_n_s32(job->ones[0]), job->threshold + 8 * (ptrdiff_t)block);
            most = MASK == 2 ? vqaddq_s16(most, outside) : most;
        }
        for (int32_t p = 0; p < pixels; p++) {
            int16x8_t differing = differing_of(wv, wt, job->x[p], job->mask[p], W, T, MASK == 1);
            if (packed) {
                job->bits[p][block] = byte_of(vcgeq_s16(most, differing));
                continue;
            }
            const int32x4_t ones = vdupq_n_s32(job->ones[p]);
            int32_t *acc = job->acc + p * job->acc_pixel + 8 * (ptrdiff_t)block;
            differing = vsubq_s16(differing, outside);
            vst1q_s32(acc, vmlsl_n_s16(ones, vget_low_s16(differing), 2));
            vst1q_s32(acc + 4, vmlsl_high_n_s16(ones, differing, 2));
        }
    }
}

/* One pixel of 4 words, to bits: it stays in registers for all blocks. */
static void pixel_of_4(const ekb_job *job, int first, int32_t block, int32_t end)
{
    const ptrdiff_t w_block = job->w_block;
    const uint8_t *w = job->w + block * w_block;
    const int32_t *threshold = job->threshold + 8 * (ptrdiff_t)block;
    const int32x4_t ones = vdupq_n_s32(job->ones[first]);
    uint8_t *bits = job->bits[first];
    uint8x16_t xv[2][4];
    broadcast(xv[0], job->x[first], 4);
    for (; block < end; block++, w += w_block, threshold += 8) {
        sums s;
        begin(&s, 1);
        add(&s, w, xv, NULL, 1, 4, 0);
        bits[block] = byte_of(vcgeq_s16(most_of(ones, threshold), sum_of(s.low[0], 4)));
    }
}

typedef void kernel(const ekb_job *, int, int32_t, int32_t);

#define BLOCKS(P, M, R, W) \
    static void blocks_##P##_##M##_##R##_##W(const ekb_job *job, int first, int32_t block, int32_t end) \
    { \
        blocks_of(job, first, block, end, P, M, R, W); \
    }
#define PIXELS(B, M, W, T) \
    static void pixels_##B##_##M##_##W##_##T(const ekb_job *job, int pixels, int32_t block, int32_t end) \
    { \
        pixels_of(job, pixels, block, end, B, M, W, T); \
    }
#define MASKS(W, T) PIXELS(0, 0, W, T) PIXELS(0, 1, W, T) PIXELS(0, 2, W, T) PIXELS(1, 0, W, T) PIXELS(1, 1, W, T) PIXELS(1, 2, W, T)
BLOCKS(1, 0, 0, 0) BLOCKS(2, 0, 0, 0) BLOCKS(1, 1, 0, 0) BLOCKS(2, 0, 3, 3)
MASKS(1, 0) MASKS(2, 0) MASKS(4, 0) MASKS(4, 4)

/* One row with kernels of its own: linear layers and 1x1 kernels of 64, 128 and 256 inputs, and 3x3 kernels of 32. */
static const struct {
    int32_t words, tail;
    kernel *kernels[2][3]; /* to integers or bits, mask */
} shapes[] = {
#define ROW(W, T) \
    {W, T, {{pixels_0_0_##W##_##T, pixels_0_1_##W##_##T, pixels_0_2_##W##_##T}, \
            {pixels_1_0_##W##_##T, pixels_1_1_##W##_##T, pixels_1_2_##W##_##T}}}
    ROW(1, 0), ROW(2, 0), ROW(4, 0), ROW(4, 4)};

static kernel *of_shape(const ekb_job *job, int32_t pixels)
{
    const int mask = !job->mask[0] ? 0 : pixels > 1 && job->mask[1] == job->mask[0] ? 2 : 1;
    const int32_t tail = job->tails ? job->tail : 0;
    if (job->rows != 1 || (job->tails && !tail) || (pixels == 1 && job->words == 4 && !tail && !mask && job->bits[0]))
        return NULL;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (shapes[i].words == job->words && shapes[i].tail == tail)
            return shapes[i].kernels[job->bits[0] != NULL][mask];
    return NULL;
}

static void tile(const ekb_job *job, int32_t pixels, int32_t first_block, int32_t end_block)
{
    int32_t first = 0;
    kernel *own = first_block < end_block ? of_shape(job, pixels) : NULL;
    if (own) {
        own(job, pixels, first_block, end_block);
        return;
    }
    kernel *two = job->rows == 3 && job->words == 3 && !job->tails ? blocks_2_0_3_3 : blocks_2_0_0_0;
    kernel *one = job->rows == 1 && job->words == 4 && !job->tails && job->bits[0] ? pixel_of_4 : blocks_1_0_0_0;
    for (; !job->mask[0] && first + 2 <= pixels; first += 2)
        two(job, first, first_block, end_block);
    for (; first < pixels; first++)
        (job->mask[0] ? blocks_1_1_0_0 : one)(job, first, first_block, end_block);
}

static void requantize(const int32_t *acc, const int32_t *bias, const float *multiplier, int32_t n, const ekb_end *end, int8_t *out)
{
    const float32x4_t low = vdupq_n_f32((float)(end->low - end->out_zp)), high = vdupq_n_f32((float)(end->high - end->out_zp));
    const int32x4_t zp = vdupq_n_s32(end->out_zp);
    for (int32_t i = 0; i < n; i += 8) {
        int16x4_t part[2];
        for (int k = 0; k < 2; k++) {
            int32x4_t sum = vaddq_s32(vld1q_s32(acc + i + 4 * k), vld1q_s32(bias + i + 4 * k));
            float32x4_t v = vmulq_f32(vcvtq_f32_s32(sum), vld1q_f32(multiplier + i + 4 * k));
            part[k] = vqmovn_s32(vaddq_s32(vcvtnq_s32_f32(vminq_f32(vmaxq_f32(v, low), high)), zp));
        }
        vst1_s8(out + i, vqmovn_s16(vcombine_s16(part[0], part[1])));
    }
}

static int always(void) { return 1; }

const ekb_variant ekb_neon = {"neon", always, tile, NULL, NULL, 0, requantize};
#endif
