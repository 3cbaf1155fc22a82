/* Depthwise convolution. The taps of a window are a table of pointers; one outside the input points at a row of zero points. */
#define EK_VECTORS
#include "internal.h"

typedef struct {
    const int8_t *const *taps;
    const int8_t *weights; /* taps rows of channels */
    uint32_t n_taps, channels;
    int plain;
} stencil;

#if EK_SET == EK_DSP
/* Four channels from c: even and odd bytes as halfwords. The table of taps ends with NULL. */
EK_INLINE void sum4(const stencil *s, uint32_t c, int32_t *s0, int32_t *s1, int32_t *s2, int32_t *s3) {
    const int8_t *w = s->weights + c;
    const int8_t *const *tap = s->taps;
    int32_t a0 = *s0, a1 = *s1, a2 = *s2, a3 = *s3;
    uint32_t v, u, t, q;
    __asm volatile(
        "ldr %[v], [%[tap]], #4\n"
        "1: ldr %[v], [%[v], %[c]]\n ldr %[u], [%[w]]\n add %[w], %[w], %[step]\n"
        "sxtb16 %[t], %[v]\n sxtb16 %[q], %[u]\n smlabb %[a0], %[t], %[q], %[a0]\n smlatt %[a2], %[t], %[q], %[a2]\n"
        "sxtb16 %[t], %[v], ror #8\n sxtb16 %[u], %[u], ror #8\n ldr %[v], [%[tap]], #4\n"
        "smlabb %[a1], %[t], %[u], %[a1]\n smlatt %[a3], %[t], %[u], %[a3]\n"
        "cmp %[v], #0\n bne 1b\n"
        : [a0] "+r"(a0), [a1] "+r"(a1), [a2] "+r"(a2), [a3] "+r"(a3), [tap] "+r"(tap), [w] "+r"(w), [v] "=&r"(v), [u] "=&r"(u),
          [t] "=&r"(t), [q] "=&r"(q)
        : [c] "r"(c), [step] "r"(s->channels)
        : "cc", "memory");
    *s0 = a0, *s1 = a1, *s2 = a2, *s3 = a3;
}

#define SHORT(i, acc) y[c + i] = ek_short(acc, multiplier[i], ek_short_round(twice, shift[i]), -shift[i])
#endif

#if EK_SET == EK_MVE
/* Sixteen channels from c. Products of bytes are halfwords, even and odd channels apart; widened once more, accumulator i holds the
 * channels i, i + 4, i + 8, i + 12. */
EK_INLINE void sixteen(const ek_conv2d *restrict p, const stencil *restrict s, uint32_t c, int8_t *restrict y) {
    const uint32x4_t fourth = vidupq_n_u32(0, 4);
    const int32_t *bias = p->bias + c, *multiplier = p->multiplier + c;
    const int8_t *shift = p->shift + c, *w = s->weights + c, *x;
    const int8_t *const *tap = s->taps;
    register int32x4_t a0 __asm("q0") = vldrwq_gather_shifted_offset_s32(bias, fourth);
    register int32x4_t a1 __asm("q1") = vldrwq_gather_shifted_offset_s32(bias + 1, fourth);
    register int32x4_t a2 __asm("q2") = vldrwq_gather_shifted_offset_s32(bias + 2, fourth);
    register int32x4_t a3 __asm("q3") = vldrwq_gather_shifted_offset_s32(bias + 3, fourth);
    __asm volatile("ldr %[x], [%[tap]], #4\n"
                   "1: add %[x], %[c]\n vldrb.8 q4, [%[x]]\n vldrb.8 q5, [%[w]]\n vmullb.s8 q6, q4, q5\n vmullt.s8 q5, q4, q5\n"
                   "vmovlb.s16 q4, q6\n vadd.i32 q0, q0, q4\n vmovlt.s16 q6, q6\n vadd.i32 q2, q2, q6\n"
                   "vmovlb.s16 q4, q5\n vadd.i32 q1, q1, q4\n vmovlt.s16 q5, q5\n vadd.i32 q3, q3, q5\n"
                   "add %[w], %[step]\n ldr %[x], [%[tap]], #4\n cmp %[x], #0\n bne 1b\n"
                   : "+w"(a0), "+w"(a1), "+w"(a2), "+w"(a3), [tap] "+r"(tap), [w] "+r"(w), [x] "=&r"(x)
                   : [c] "r"(c), [step] "r"(s->channels)
                   : "q4", "q5", "q6", "cc", "memory");
#define FOURTH(i, a)                                                                                        \
    do {                                                                                                     \
        const int32x4_t m = vldrwq_gather_shifted_offset_s32(multiplier + i, fourth);                        \
        const int32x4_t n = vldrbq_gather_offset_s32(shift + i, fourth);                                     \
        int32x4_t q;                                                                                         \
        if (s->plain) {                                                                                      \
            const int32x4_t h = vqrdmulhq_s32(a, m);                                                         \
            q = vaddq_n_s32(vrshlq_s32(vaddq_s32(h, vshrq_n_s32(h, 31)), n), p->out_zp);                     \
            q = vmaxq_s32(vminq_s32(q, vdupq_n_s32(127)), vdupq_n_s32(-128));                                \
        } else                                                                                               \
            q = ek_clamp4(ek_scale4(a, m, n), p->out_zp, p->act_min, p->act_max);                            \
        vstrbq_scatter_offset_s32(y + i, fourth, q);                                                         \
    } while (0)
    FOURTH(0, a0);
    FOURTH(1, a1);
    FOURTH(2, a2);
    FOURTH(3, a3);
#undef FOURTH
}
#endif

#if EK_SET == EK_MVE
/* Eight channels from c: products of bytes are halfwords. */
EK_INLINE void eight(const ek_conv2d *restrict p, const stencil *restrict s, uint32_t c, int8_t *restrict y) {
    const int32_t zero = p->out_zp, low = p->act_min, high = p->act_max;
    const uint32x4_t second = vidupq_n_u32(0, 2);
    const int32_t *bias = p->bias + c, *multiplier = p->multiplier + c;
    const int8_t *shift = p->shift + c, *w = s->weights + c, *x;
    const int8_t *const *tap = s->taps;
    register int32x4_t even __asm("q0") = vldrwq_gather_shifted_offset_s32(bias, second);
    register int32x4_t odd __asm("q1") = vldrwq_gather_shifted_offset_s32(bias + 1, second);
    __asm volatile("ldr %[x], [%[tap]], #4\n"
                   "1: add %[x], %[c]\n vldrb.s16 q2, [%[x]]\n vldrb.s16 q3, [%[w]]\n vmul.i16 q2, q2, q3\n"
                   "vmovlb.s16 q3, q2\n vadd.i32 q0, q0, q3\n vmovlt.s16 q2, q2\n vadd.i32 q1, q1, q2\n"
                   "add %[w], %[step]\n ldr %[x], [%[tap]], #4\n cmp %[x], #0\n bne 1b\n"
                   : "+w"(even), "+w"(odd), [tap] "+r"(tap), [w] "+r"(w), [x] "=&r"(x)
                   : [c] "r"(c), [step] "r"(s->channels)
                   : "q2", "q3", "cc", "memory");
    even = ek_scale4(even, vldrwq_gather_shifted_offset_s32(multiplier, second), vldrbq_gather_offset_s32(shift, second));
    odd = ek_scale4(odd, vldrwq_gather_shifted_offset_s32(multiplier + 1, second), vldrbq_gather_offset_s32(shift + 1, second));
    vstrbq_scatter_offset_s32(y, second, ek_clamp4(even, zero, low, high));
    vstrbq_scatter_offset_s32(y + 1, second, ek_clamp4(odd, zero, low, high));
}
#endif

/* All channels of one position. */
EK_NOINLINE static void position(const ek_conv2d *restrict p, const stencil *restrict s, int8_t *restrict y) {
    const int32_t zero = p->out_zp, low = p->act_min, high = p->act_max;
    uint32_t c = 0;
#if EK_SET == EK_MVE
    for (; c + 16 <= s->channels; c += 16) sixteen(p, s, c, y + c);
    if (c + 8 <= s->channels) {
        eight(p, s, c, y + c);
        c += 8;
    }
    for (; c < s->channels; c += 8) {
        const mve_pred16_t first = vctp32q(s->channels - c), second = s->channels - c > 4 ? vctp32q(s->channels - c - 4) : 0;
        int32x4_t a = vldrwq_z_s32(p->bias + c, first), b = vldrwq_z_s32(p->bias + c + 4, second);
        const int8_t *w = s->weights + c;
        for (uint32_t t = 0; t < s->n_taps; t++, w += s->channels) {
            const int8_t *x = s->taps[t] + c;
            a = vaddq_s32(a, vmulq_s32(vldrbq_z_s32(x, first), vldrbq_z_s32(w, first)));
            b = vaddq_s32(b, vmulq_s32(vldrbq_z_s32(x + 4, second), vldrbq_z_s32(w + 4, second)));
        }
        a = ek_scale4(a, vldrwq_z_s32(p->multiplier + c, first), vldrbq_z_s32(p->shift + c, first));
        b = ek_scale4(b, vldrwq_z_s32(p->multiplier + c + 4, second), vldrbq_z_s32(p->shift + c + 4, second));
        vstrbq_p_s32(y + c, ek_clamp4(a, zero, low, high), first);
        vstrbq_p_s32(y + c + 4, ek_clamp4(b, zero, low, high), second);
    }
#else
#if EK_SET == EK_DSP
    const int32_t *bias = p->bias, *multiplier = p->multiplier;
    const int8_t *shift = p->shift;
    const int32_t twice = 2 * zero + 1;
    for (const uint32_t whole = s->channels & ~3u; c < whole; c += 4, bias += 4, multiplier += 4, shift += 4) {
        int32_t a0 = bias[0], a1 = bias[1], a2 = bias[2], a3 = bias[3];
        sum4(s, c, &a0, &a1, &a2, &a3);
        if (s->plain) {
            SHORT(0, a0);
            SHORT(1, a1);
            SHORT(2, a2);
            SHORT(3, a3);
        } else {
            const int32_t acc[4] = {a0, a1, a2, a3};
            for (uint32_t i = 0; i < 4; i++) y[c + i] = (int8_t)ek_clamp(ek_scale(acc[i], multiplier[i], shift[i]) + zero, low, high);
        }
    }
#endif
    for (; c < s->channels; c++) {
        const int8_t *w = s->weights + c;
        int32_t acc = p->bias[c];
        for (uint32_t t = 0; t < s->n_taps; t++, w += s->channels) acc += (int32_t)s->taps[t][c] * *w;
        y[c] = (int8_t)ek_clamp(ek_scale(acc, p->multiplier[c], p->shift[c]) + zero, low, high);
    }
#endif
}

EK_INLINE void advance(const int8_t **taps, uint32_t n, uint32_t bytes) {
#if EK_SET == EK_MVE
    uint32_t *at = (uint32_t *)(void *)taps;
    for (int32_t left = (int32_t)n; left > 0; left -= 4, at += 4) {
        const mve_pred16_t lanes = vctp32q((uint32_t)left);
        vstrwq_p_u32(at, vaddq_n_u32(vldrwq_z_u32(at, lanes), bytes), lanes);
    }
#else
    for (const int8_t **end = taps + n; taps < end; taps++) *taps += bytes;
#endif
}

EK_NOINLINE void ek_depthwise_s8(const ek_conv2d *p, const int8_t *x, int8_t *y, void *scratch) {
    const uint32_t channels = p->in_c, n_taps = (uint32_t)p->kernel_h * p->kernel_w;
    const int8_t **taps = scratch;
    int8_t *outside = (int8_t *)scratch + ek_round16(4 * n_taps + 4), *unpacked = outside + ek_round16(channels);
    ek_fill(outside, p->in_zp, channels);
    stencil s = {taps, p->weights, n_taps, channels, ek_plain(p->shift, channels, p->act_min, p->act_max)};
    if (p->weight_bits != 8) {
        const uint8_t *row = p->weights;
        for (uint32_t t = 0; t < n_taps; t++, row += ek_row_bytes(channels, p->weight_bits))
            ek_unpack(row, unpacked + t * channels, channels, p->weight_bits);
        s.weights = unpacked;
    }
    int32_t top = -(int32_t)p->pad_top;
    const int32_t low = (p->kernel_h - 1) * p->dilation_h, right = (p->kernel_w - 1) * p->dilation_w;
    for (uint32_t oy = 0; oy < p->out_h; oy++, top += p->stride_h) {
        int32_t left = -(int32_t)p->pad_left;
        int known = 0; /* the table holds the window before this one, which lay inside the input */
        for (uint32_t ox = 0; ox < p->out_w; ox++, left += p->stride_w, y += channels) {
            const int whole = top >= 0 && top + low < p->in_h && left >= 0 && left + right < p->in_w;
            if (whole && known) {
                advance(taps, n_taps, p->stride_w * channels);
                position(p, &s, y);
                continue;
            }
            known = whole;
            const int8_t **tap = taps;
            int32_t iy = top;
            for (uint32_t i = 0; i < p->kernel_h; i++, iy += p->dilation_h) {
                const int in_rows = iy >= 0 && iy < p->in_h;
                int32_t ix = left;
                for (uint32_t j = 0; j < p->kernel_w; j++, ix += p->dilation_w)
                    *tap++ = in_rows && ix >= 0 && ix < p->in_w ? x + (iy * p->in_w + ix) * (int32_t)channels : outside;
            }
            *tap = NULL;
            position(p, &s, y);
        }
    }
}
