/* Elementwise kernels. */
#define EK_VECTORS
#include "internal.h"

#define LEFT 20 /* TFLite's add shifts its inputs left by this before they are scaled */

/* x / 2^n, ties away from zero, with what depends on n computed once: the half, and ones where negative ties matter (n > 0). */
typedef struct {
    int32_t multiplier, n, half, ones;
} scaling;

EK_INLINE scaling prepared(int32_t multiplier, int shift) {
    return (scaling){multiplier, -shift, shift ? 1 << (-shift - 1) : 0, shift ? -1 : 0};
}

EK_INLINE int32_t scaled(int32_t x, const scaling *s) {
    const int32_t h = ek_high(x, s->multiplier);
    return (h + ((h >> 31) & s->ones) + s->half) >> s->n;
}

#if EK_SET == EK_MVE
EK_INLINE int32x4_t scaled4(int32x4_t x, const scaling *s, int32x4_t ones) {
    const int32x4_t h = vqrdmulhq_n_s32(x, s->multiplier);
    return vrshlq_n_s32(vaddq_s32(h, vshrq_n_s32(vandq_s32(h, ones), 31)), -s->n);
}

EK_INLINE int32x4_t add4(const ek_add *p, int32x4_t a, int32x4_t b, const scaling s[3], const int32x4_t ones[3]) {
    const int32x4_t u = scaled4(vshlq_n_s32(vsubq_n_s32(a, p->a_zp), LEFT), &s[0], ones[0]);
    const int32x4_t v = scaled4(vshlq_n_s32(vsubq_n_s32(b, p->b_zp), LEFT), &s[1], ones[1]);
    return ek_clamp4(scaled4(vaddq_s32(u, v), &s[2], ones[2]), p->out_zp, p->act_min, p->act_max);
}
#endif

/* b beside one stretch of a: b repeats from stretch to stretch. */
EK_INLINE void add_row(const ek_add *p, const int8_t *a, const int8_t *b, int8_t *y, const scaling s[3]) {
    uint32_t n = p->b_n;
#if EK_SET == EK_MVE
    const int32x4_t ones[3] = {vdupq_n_s32(s[0].ones), vdupq_n_s32(s[1].ones), vdupq_n_s32(s[2].ones)};
    for (; n >= 4; n -= 4, a += 4, b += 4, y += 4) vstrbq_s32(y, add4(p, vldrbq_s32(a), vldrbq_s32(b), s, ones));
    const mve_pred16_t lanes = vctp32q(n);
    vstrbq_p_s32(y, add4(p, vldrbq_z_s32(a, lanes), vldrbq_z_s32(b, lanes), s, ones), lanes);
#else
    const int32_t a_zp = p->a_zp, b_zp = p->b_zp, zero = p->out_zp, low = p->act_min, high = p->act_max;
    for (; n; n--) {
        const int32_t u = scaled((*a++ - a_zp) * (1 << LEFT), &s[0]), v = scaled((*b++ - b_zp) * (1 << LEFT), &s[1]);
        *y++ = (int8_t)ek_clamp(scaled(u + v, &s[2]) + zero, low, high);
    }
#endif
}

EK_NOINLINE void ek_add_s8(const ek_add *p, const int8_t *a, const int8_t *b, int8_t *y) {
    const scaling s[3] = {prepared(p->a_multiplier, p->a_shift), prepared(p->b_multiplier, p->b_shift),
                          prepared(p->out_multiplier, p->out_shift)};
    for (uint32_t i = 0; i < p->n; i += p->b_n) add_row(p, a + i, b, y + i, s);
}

#if EK_SET == EK_MVE
EK_INLINE int32x4_t mul4(const ek_mul *p, int32x4_t a, int32x4_t b) {
    const int32x4_t product = vmulq_s32(vsubq_n_s32(a, p->a_zp), vsubq_n_s32(b, p->b_zp));
    return ek_clamp4(ek_scale4(product, vdupq_n_s32(p->multiplier), vdupq_n_s32(p->shift)), p->out_zp, p->act_min, p->act_max);
}
#endif

EK_NOINLINE void ek_mul_s8(const ek_mul *p, const int8_t *a, const int8_t *b, int8_t *y) {
    for (uint32_t i = 0; i < p->n; i += p->b_n) {
#if EK_SET == EK_MVE
        uint32_t j = 0;
        for (; j + 4 <= p->b_n; j += 4) vstrbq_s32(y + i + j, mul4(p, vldrbq_s32(a + i + j), vldrbq_s32(b + j)));
        const mve_pred16_t lanes = vctp32q(p->b_n - j);
        vstrbq_p_s32(y + i + j, mul4(p, vldrbq_z_s32(a + i + j, lanes), vldrbq_z_s32(b + j, lanes)), lanes);
#else
        for (uint32_t j = 0; j < p->b_n; j++) {
            const int32_t q = ek_scale((a[i + j] - p->a_zp) * (b[j] - p->b_zp), p->multiplier, p->shift);
            y[i + j] = (int8_t)ek_clamp(q + p->out_zp, p->act_min, p->act_max);
        }
#endif
    }
}

EK_NOINLINE void ek_requant_s8(const ek_requant *p, const int8_t *x, int8_t *y) {
#if EK_SET == EK_MVE
    for (uint32_t i = 0; i < p->n; i += 4) {
        const mve_pred16_t lanes = vctp32q(p->n - i);
        const int32x4_t v = vsubq_n_s32(vldrbq_z_s32(x + i, lanes), p->in_zp);
        const int32x4_t q = ek_scale4(v, vdupq_n_s32(p->multiplier), vdupq_n_s32(p->shift));
        vstrbq_p_s32(y + i, ek_clamp4(q, p->out_zp, p->act_min, p->act_max), lanes);
    }
#else
    for (uint32_t i = 0; i < p->n; i++)
        y[i] = (int8_t)ek_clamp(ek_scale(x[i] - p->in_zp, p->multiplier, p->shift) + p->out_zp, p->act_min, p->act_max);
#endif
}

EK_NOINLINE void ek_clamp_s8(const int8_t *x, int8_t *y, uint32_t n, int8_t low, int8_t high) {
#if EK_SET == EK_MVE
    for (int32_t left = (int32_t)n; left > 0; left -= 16, x += 16, y += 16) {
        const mve_pred16_t lanes = vctp8q((uint32_t)left);
        vst1q_p(y, vmaxq_s8(vminq_s8(vld1q_z(x, lanes), vdupq_n_s8(high)), vdupq_n_s8(low)), lanes);
    }
#else
    for (uint32_t i = 0; i < n; i++) y[i] = (int8_t)ek_clamp(x[i], low, high);
#endif
}

EK_NOINLINE void ek_lut_s8(const int8_t *table, const int8_t *x, int8_t *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) y[i] = table[x[i] + 128];
}
