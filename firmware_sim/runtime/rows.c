/* The rows of weighted layers: the parts all kernel sets share, and the portable set. */
#include "internal.h"

void ek_unpack(const uint8_t *packed, int8_t *out, uint32_t n, int bits) {
    const uint32_t each = 32u / (uint32_t)bits;
    for (uint32_t i = 0, at = 0; i < n; i++, at++) {
        if (at == each) at = 0, packed += 4;
        const uint32_t top = 32u - (uint32_t)bits * ((at >> 2) + 1u);
        out[i] = (int8_t)((int32_t)((uint32_t)packed[at & 3u] << top) >> (32 - bits));
    }
}

#if EK_SET != EK_MVE
typedef uint32_t group __attribute__((may_alias));

/* Whole groups, four neighbours at a time, scaled. */
EK_NOINLINE static void unpack_scaled(const int8_t *packed, int8_t *out, uint32_t k, int bits) {
    const group *in = (const group *)(const void *)packed;
    group *to = (group *)(void *)out;
    if (bits == 4)
        for (uint32_t n = (k + 7u) >> 3; n; n--, to += 2) {
            const uint32_t v = *in++;
            to[0] = (v << 4) & 0xf0f0f0f0u;
            to[1] = v & 0xf0f0f0f0u;
        }
    else
        for (uint32_t n = (k + 15u) >> 4; n; n--, to += 4) {
            const uint32_t v = *in++;
            to[0] = (v << 6) & 0xc0c0c0c0u;
            to[1] = (v << 4) & 0xc0c0c0c0u;
            to[2] = (v << 2) & 0xc0c0c0c0u;
            to[3] = v & 0xc0c0c0c0u;
        }
}

const int8_t *ek_fetch(const ek_rows *r, uint32_t o, uint32_t count, uint32_t *stride) {
    const int8_t *row = r->weights + o * r->row_bytes;
    if (r->bits == 8) {
        *stride = r->row_bytes;
        return row;
    }
    *stride = ek_round16(r->k);
    for (uint32_t i = 0; i < count; i++, row += r->row_bytes) unpack_scaled(row, r->unpacked + i * *stride, r->k, r->bits);
    return r->unpacked;
}
#endif

int ek_plain(const int8_t *shift, uint32_t n, int32_t low, int32_t high) {
#if EK_SET == EK_PORTABLE
    (void)shift, (void)n, (void)low, (void)high;
    return 0;
#else
    /* -16 to -1 are 0xf0 to 0xff, -32 to -1 are 0xe0 to 0xff */
    const uint32_t top = EK_SET == EK_MVE ? 0xe0e0e0e0u : 0xf0f0f0f0u;
    if (low != -128 || high != 127) return 0;
    for (; n >= 4; n -= 4, shift += 4)
        if ((*(const ek_word *)shift & top) != top) return 0;
    for (; n; n--, shift++)
        if (((uint8_t)*shift & top & 0xffu) != (top & 0xffu)) return 0;
    return 1;
#endif
}

int32_t ek_requantize(int32_t acc, int32_t multiplier, int shift) { return ek_scale(acc, multiplier, shift); }

#if EK_SET == EK_PORTABLE
EK_NOINLINE void ek_rows_one(const ek_rows *r, const int8_t *x, int8_t *y) {
    const int down = 8 - r->bits;
    uint32_t o = 0, stride;
    for (; o + 4 <= r->out_n; o += 4) {
        const int8_t *w0 = ek_fetch(r, o, 4, &stride), *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
        int32_t a0 = ek_up(r->bias[o], down), a1 = ek_up(r->bias[o + 1], down), a2 = ek_up(r->bias[o + 2], down);
        int32_t a3 = ek_up(r->bias[o + 3], down);
        for (const int8_t *p = x, *end = x + r->k; p < end;) {
            const int32_t v = *p++;
            a0 += v * *w0++;
            a1 += v * *w1++;
            a2 += v * *w2++;
            a3 += v * *w3++;
        }
        y[o] = ek_finish(a0 >> down, r->multiplier[o], r->shift[o], r);
        y[o + 1] = ek_finish(a1 >> down, r->multiplier[o + 1], r->shift[o + 1], r);
        y[o + 2] = ek_finish(a2 >> down, r->multiplier[o + 2], r->shift[o + 2], r);
        y[o + 3] = ek_finish(a3 >> down, r->multiplier[o + 3], r->shift[o + 3], r);
    }
    for (; o < r->out_n; o++) {
        const int8_t *w = ek_fetch(r, o, 1, &stride);
        int32_t a = ek_up(r->bias[o], down);
        for (uint32_t k = 0; k < r->k; k++) a += (int32_t)x[k] * w[k];
        y[o] = ek_finish(a >> down, r->multiplier[o], r->shift[o], r);
    }
}
#endif
