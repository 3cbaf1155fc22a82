/* Pools and the mean over positions. */
#define EK_VECTORS
#include "internal.h"

typedef struct {
    int32_t y0, y1, x0, x1; /* first and past-the-end kernel positions that lie inside the input */
    uint32_t divisor;
} extent;

static int32_t inside(int32_t start, int32_t kernel, int32_t step, int32_t size, int32_t *first) {
    int32_t from = 0, to = kernel;
    while (from < kernel && start + from * step < 0) from++;
    while (to > from && start + (to - 1) * step >= size) to--;
    *first = from;
    return to;
}

EK_NOINLINE static void sum(const ek_pool *p, const extent *e, const int8_t *x, int8_t *y) {
    const ek_divisor *d = p->divisors;
    while (d->divisor != e->divisor && d + 1 < p->divisors + p->n_divisors) d++;
    const int32_t rows = e->y1 - e->y0, columns = e->x1 - e->x0, channels = p->channels;
    const int32_t zero = rows * columns * p->in_zp;
#if EK_SET == EK_MVE
    for (int32_t c = 0; c < channels; c += 4) {
        const mve_pred16_t lanes = vctp32q((uint32_t)(channels - c));
        int32x4_t acc = vdupq_n_s32(-zero);
        const int8_t *row = x + c;
        for (int32_t i = 0; i < rows; i++, row += p->in_w * channels)
            for (int32_t j = 0; j < columns; j++) acc = vaddq_s32(acc, vldrbq_z_s32(row + j * channels, lanes));
        acc = ek_scale4(acc, vdupq_n_s32(d->multiplier), vdupq_n_s32(d->shift));
        vstrbq_p_s32(y + c, ek_clamp4(acc, p->out_zp, p->act_min, p->act_max), lanes);
    }
#else
    for (int32_t c = 0; c < channels; c++) {
        int32_t acc = -zero;
        const int8_t *row = x + c;
        for (int32_t i = 0; i < rows; i++, row += p->in_w * channels) {
            const int8_t *at = row;
            for (int32_t j = columns; j; j--, at += channels) acc += *at;
        }
        y[c] = (int8_t)ek_clamp(ek_scale(acc, d->multiplier, d->shift) + p->out_zp, p->act_min, p->act_max);
    }
#endif
}

EK_NOINLINE void ek_average_pool_s8(const ek_pool *p, const int8_t *x, int8_t *y) {
    for (int32_t oy = 0; oy < p->out_h; oy++)
        for (int32_t ox = 0; ox < p->out_w; ox++, y += p->channels) {
            const int32_t top = oy * p->stride_h - p->pad_top, left = ox * p->stride_w - p->pad_left;
            extent e;
            e.y1 = inside(top, p->kernel_h, 1, p->in_h, &e.y0);
            e.x1 = inside(left, p->kernel_w, 1, p->in_w, &e.x0);
            if (p->include_pad) { /* a window may reach beyond the far padding (ceil mode) */
                const int32_t h = p->in_h + p->pad_bottom - top, w = p->in_w + p->pad_right - left;
                e.divisor = (uint32_t)((h < p->kernel_h ? h : p->kernel_h) * (w < p->kernel_w ? w : p->kernel_w));
            } else
                e.divisor = (uint32_t)((e.y1 - e.y0) * (e.x1 - e.x0));
            sum(p, &e, x + ((top + e.y0) * p->in_w + left + e.x0) * p->channels, y);
        }
}

EK_NOINLINE void ek_max_pool_s8(const ek_pool *p, const int8_t *x, int8_t *y) {
    const int32_t channels = p->channels, line = p->in_w * channels * p->dilation_h, step = channels * p->dilation_w;
    for (int32_t oy = 0; oy < p->out_h; oy++)
        for (int32_t ox = 0; ox < p->out_w; ox++, y += channels) {
            const int32_t top = oy * p->stride_h - p->pad_top, left = ox * p->stride_w - p->pad_left;
            extent e;
            e.y1 = inside(top, p->kernel_h, p->dilation_h, p->in_h, &e.y0);
            e.x1 = inside(left, p->kernel_w, p->dilation_w, p->in_w, &e.x0);
            const int8_t *row = x + ((top + e.y0 * p->dilation_h) * p->in_w + left + e.x0 * p->dilation_w) * channels;
#if EK_SET == EK_MVE
            for (int32_t c = 0; c < channels; c += 16) {
                const mve_pred16_t lanes = vctp8q((uint32_t)(channels - c));
                int8x16_t best = vdupq_n_s8(-128);
                for (int32_t i = e.y0; i < e.y1; i++)
                    for (int32_t j = e.x0; j < e.x1; j++)
                        best = vmaxq_s8(best, vld1q_z_s8(row + c + (i - e.y0) * line + (j - e.x0) * step, lanes));
                vst1q_p(y + c, vmaxq_s8(vminq_s8(best, vdupq_n_s8(p->act_max)), vdupq_n_s8(p->act_min)), lanes);
            }
#else
            for (int32_t c = 0; c < channels; c++) {
                int32_t best = -128;
                const int8_t *from = row + c;
                for (int32_t i = e.y0; i < e.y1; i++, from += line) {
                    const int8_t *at = from;
                    for (int32_t j = e.x0; j < e.x1; j++, at += step)
                        if (*at > best) best = *at;
                }
                y[c] = (int8_t)ek_clamp(best, p->act_min, p->act_max);
            }
#endif
        }
}

EK_NOINLINE void ek_mean_s8(const ek_mean *p, const int8_t *x, int8_t *y) {
    const int32_t zero = -(int32_t)p->positions * p->in_zp;
#if EK_SET == EK_MVE
    for (uint32_t c = 0; c < p->channels; c += 4) {
        const mve_pred16_t lanes = vctp32q(p->channels - c);
        int32x4_t acc = vdupq_n_s32(zero);
        const int8_t *from = x + c;
        for (uint32_t i = 0; i < p->positions; i++, from += p->channels) acc = vaddq_s32(acc, vldrbq_z_s32(from, lanes));
        acc = ek_scale4(acc, vdupq_n_s32(p->multiplier), vdupq_n_s32(p->shift));
        vstrbq_p_s32(y + c, ek_clamp4(acc, p->out_zp, p->act_min, p->act_max), lanes);
    }
#else
    for (uint32_t c = 0; c < p->channels; c++) {
        int32_t acc = zero;
        const int8_t *from = x + c;
        for (uint32_t i = p->positions; i; i--, from += p->channels) acc += *from;
        y[c] = (int8_t)ek_clamp(ek_scale(acc, p->multiplier, p->shift) + p->out_zp, p->act_min, p->act_max);
    }
#endif
}
