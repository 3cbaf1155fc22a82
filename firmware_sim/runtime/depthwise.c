/* Depthwise convolution. The taps of a window are a table of pointers; one outside the input points at a row of zero points. */
#define EK_VECTORS
#include "internal.h"

typedef struct {
    const int8_t *const *taps;
    const int8_t *weights; /* taps rows of channels */
    uint32_t n_taps, channels;
} stencil;

#if EK_SET == EK_DSP
/* Four channels from c: even and odd bytes as halfwords. The table of taps ends with NULL. */
EK_INLINE void sum4(const stencil *s, uint32_t c, int32_t *acc) {
    const int8_t *w = s->weights + c;
    const int8_t *const *tap = s->taps;
    int32_t a0 = acc[0], a1 = acc[1], a2 = acc[2], a3 = acc[3];
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
    acc[0] = a0, acc[1] = a1, acc[2] = a2, acc[3] = a3;
}
#endif

/* All channels of one position. */
EK_NOINLINE static void position(const ek_conv2d *p, const stencil *s, int8_t *y) {
    const int32_t zero = p->out_zp, low = p->act_min, high = p->act_max;
    uint32_t c = 0;
#if EK_SET == EK_MVE
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
    for (; c + 4 <= s->channels; c += 4) {
        int32_t acc[4] = {p->bias[c], p->bias[c + 1], p->bias[c + 2], p->bias[c + 3]};
        sum4(s, c, acc);
        for (uint32_t i = 0; i < 4; i++)
            y[c + i] = (int8_t)ek_clamp(ek_scale(acc[i], p->multiplier[c + i], p->shift[c + i]) + zero, low, high);
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

EK_NOINLINE void ek_depthwise_s8(const ek_conv2d *p, const int8_t *x, int8_t *y, void *scratch) {
    const uint32_t channels = p->in_c, n_taps = (uint32_t)p->kernel_h * p->kernel_w;
    const int8_t **taps = scratch;
    int8_t *outside = (int8_t *)scratch + ek_round16(4 * n_taps + 4), *unpacked = outside + ek_round16(channels);
    ek_fill(outside, p->in_zp, channels);
    stencil s = {taps, p->weights, n_taps, channels};
    if (p->weight_bits != 8) {
        const uint8_t *row = p->weights;
        for (uint32_t t = 0; t < n_taps; t++, row += ek_row_bytes(channels, p->weight_bits))
            ek_unpack(row, unpacked + t * channels, channels, p->weight_bits);
        s.weights = unpacked;
    }
    int32_t top = -(int32_t)p->pad_top;
    for (uint32_t oy = 0; oy < p->out_h; oy++, top += p->stride_h) {
        int32_t left = -(int32_t)p->pad_left;
        for (uint32_t ox = 0; ox < p->out_w; ox++, left += p->stride_w, y += channels) {
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
