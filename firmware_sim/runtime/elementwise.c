/* Elementwise kernels. */
#define EK_VECTORS
#include "internal.h"

#define LEFT 20 /* TFLite's add shifts its inputs left by this before they are scaled */

#if EK_SET == EK_MVE
/* Elements of b beside the four of a, when b repeats every b_n. */
EK_INLINE int32x4_t repeated(const int8_t *b, uint32_t i, uint32_t b_n, mve_pred16_t lanes) {
    const uint32_t at = i % b_n;
    if (at + 4 <= b_n) return vldrbq_z_s32(b + at, lanes);
    int8_t four[4];
    for (uint32_t j = 0; j < 4; j++) four[j] = b[(i + j) % b_n];
    return vldrbq_z_s32(four, lanes);
}
#endif

EK_NOINLINE void ek_add_s8(const ek_add *p, const int8_t *a, const int8_t *b, int8_t *y) {
#if EK_SET == EK_MVE
    for (uint32_t i = 0; i < p->n; i += 4) {
        const mve_pred16_t lanes = vctp32q(p->n - i);
        int32x4_t u = vshlq_n_s32(vsubq_n_s32(vldrbq_z_s32(a + i, lanes), p->a_zp), LEFT);
        int32x4_t v = vshlq_n_s32(vsubq_n_s32(p->b_n == p->n ? vldrbq_z_s32(b + i, lanes) : repeated(b, i, p->b_n, lanes), p->b_zp), LEFT);
        u = ek_scale4(u, vdupq_n_s32(p->a_multiplier), vdupq_n_s32(p->a_shift));
        v = ek_scale4(v, vdupq_n_s32(p->b_multiplier), vdupq_n_s32(p->b_shift));
        u = ek_scale4(vaddq_s32(u, v), vdupq_n_s32(p->out_multiplier), vdupq_n_s32(p->out_shift));
        vstrbq_p_s32(y + i, ek_clamp4(u, p->out_zp, p->act_min, p->act_max), lanes);
    }
#else
    for (uint32_t i = 0, j = 0; i < p->n; i++) {
        const int32_t u = ek_scale((a[i] - p->a_zp) * (1 << LEFT), p->a_multiplier, p->a_shift);
        const int32_t v = ek_scale((b[j] - p->b_zp) * (1 << LEFT), p->b_multiplier, p->b_shift);
        y[i] = (int8_t)ek_clamp(ek_scale(u + v, p->out_multiplier, p->out_shift) + p->out_zp, p->act_min, p->act_max);
        if (++j == p->b_n) j = 0;
    }
#endif
}

EK_NOINLINE void ek_mul_s8(const ek_mul *p, const int8_t *a, const int8_t *b, int8_t *y) {
#if EK_SET == EK_MVE
    for (uint32_t i = 0; i < p->n; i += 4) {
        const mve_pred16_t lanes = vctp32q(p->n - i);
        const int32x4_t u = vsubq_n_s32(vldrbq_z_s32(a + i, lanes), p->a_zp);
        const int32x4_t v = vsubq_n_s32(p->b_n == p->n ? vldrbq_z_s32(b + i, lanes) : repeated(b, i, p->b_n, lanes), p->b_zp);
        const int32x4_t q = ek_scale4(vmulq_s32(u, v), vdupq_n_s32(p->multiplier), vdupq_n_s32(p->shift));
        vstrbq_p_s32(y + i, ek_clamp4(q, p->out_zp, p->act_min, p->act_max), lanes);
    }
#else
    for (uint32_t i = 0, j = 0; i < p->n; i++) {
        const int32_t q = ek_scale((a[i] - p->a_zp) * (b[j] - p->b_zp), p->multiplier, p->shift);
        y[i] = (int8_t)ek_clamp(q + p->out_zp, p->act_min, p->act_max);
        if (++j == p->b_n) j = 0;
    }
#endif
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
