/* aarch64: CNT counts the bits of each byte; four registers hold the same word of 8 outputs. */
#include "internal.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

INLINE void flush(uint32x4_t sum[4], uint8x16_t low[4])
{
    for (int r = 0; r < 4; r++) { /* each 32-bit half of a word apart */
        sum[r] = vpadalq_u16(sum[r], vpaddlq_u8(low[r]));
        low[r] = vdupq_n_u8(0);
    }
}

INLINE void run(uint32x4_t sum[4][4], uint8x16_t low[4][4], int *pending, const ekb_job *job, const uint8_t *w, ptrdiff_t x_at,
                int32_t words, int first, const int P, const int masked)
{
    for (int32_t j = 0; j < words; j++, w += 64, x_at += 8) {
        uint8x16_t wv[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            wv[r] = vld1q_u8(w + 16 * r);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            uint8x16_t xv = vreinterpretq_u8_u64(vdupq_n_u64(ekb_word(job->x[first + p] + x_at)));
            uint8x16_t mv = masked ? vreinterpretq_u8_u64(vdupq_n_u64(ekb_word(job->mask[first + p] + x_at))) : xv;
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) {
                uint8x16_t d = veorq_u8(xv, wv[r]);
                low[p][r] = vaddq_u8(low[p][r], vcntq_u8(masked ? vandq_u8(d, mv) : d));
            }
        }
        if (++*pending == 31) {
            *pending = 0;
#pragma GCC unroll 4
            for (int p = 0; p < P; p++)
                flush(sum[p], low[p]);
        }
    }
}

INLINE void store(const ekb_job *job, int p, int32_t block, const uint32x4_t sum[4])
{
    const uint32_t place[4] = {1, 2, 4, 8};
    uint32_t byte = 0;
    for (int half = 0; half < 2; half++) {
        int32x4_t differing = vreinterpretq_s32_u32(vpaddq_u32(sum[2 * half], sum[2 * half + 1]));
        int32x4_t acc = vsubq_s32(vdupq_n_s32(job->ones), vshlq_n_s32(differing, 1));
        if (job->bits[0])
            byte |= vaddvq_u32(vandq_u32(vcgeq_s32(acc, vld1q_s32(job->threshold + 8 * block + 4 * half)), vld1q_u32(place)))
                    << 4 * half;
        else
            vst1q_s32(job->acc + p * job->acc_pixel + 8 * block + 4 * half, acc);
    }
    if (job->bits[0])
        job->bits[p][block] = (uint8_t)byte;
}

INLINE void part(const ekb_job *job, int first, int32_t block, const int P, const int masked)
{
    uint32x4_t sum[4][4];
    uint8x16_t low[4][4];
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sum[p][r] = vdupq_n_u32(0), low[p][r] = vdupq_n_u8(0);
    int pending = 0;
    const uint8_t *w = job->w + block * job->w_block;
    for (int32_t row = 0; row < job->rows; row++)
        run(sum, low, &pending, job, w + row * job->w_row, row * job->x_row, job->words, first, P, masked);
    if (job->tails)
        run(sum, low, &pending, job, job->tails + 64 * (ptrdiff_t)block, 8 * (ptrdiff_t)job->words, 1, first, P, masked);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
        flush(sum[p], low[p]);
        store(job, first + p, block, sum[p]);
    }
}

static void tile(const ekb_job *job, int32_t pixels, int32_t first_block, int32_t end_block)
{
    for (int32_t block = first_block; block < end_block; block++) {
        int32_t first = 0;
        if (job->mask[0]) {
            for (; first < pixels; first++)
                part(job, first, block, 1, 1);
            continue;
        }
        for (; first + 3 <= pixels; first += 3)
            part(job, first, block, 3, 0);
        for (; first < pixels; first++)
            part(job, first, block, 1, 0);
    }
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
