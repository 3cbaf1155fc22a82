/* The rows of weighted layers: the parts all kernel sets share, and the portable set. */
#include "internal.h"

#if EK_SET != EK_MVE
EK_NOINLINE void ek_unpack(const uint8_t *packed, int8_t *out, uint32_t n, int bits) {
    const int8_t *in = (const int8_t *)packed;
    if (bits == 4) {
        for (; n >= 2; n -= 2, out += 2) {
            const int32_t v = *in++;
            out[0] = (int8_t)((int32_t)((uint32_t)v << 28) >> 28);
            out[1] = (int8_t)(v >> 4);
        }
        if (n) *out = (int8_t)((int32_t)((uint32_t)*in << 28) >> 28);
        return;
    }
    for (; n >= 4; n -= 4, out += 4) {
        const int32_t v = *in++;
        out[0] = (int8_t)((int32_t)((uint32_t)v << 30) >> 30);
        out[1] = (int8_t)((int32_t)((uint32_t)v << 28) >> 30);
        out[2] = (int8_t)((int32_t)((uint32_t)v << 26) >> 30);
        out[3] = (int8_t)(v >> 6);
    }
    for (uint32_t v = n ? (uint8_t)*in : 0; n; n--, v >>= 2) *out++ = (int8_t)((int32_t)(v << 30) >> 30);
}
#endif

const int8_t *ek_fetch(const ek_rows *r, uint32_t o, uint32_t count, uint32_t *stride) {
    const int8_t *row = r->weights + o * r->row_bytes;
    if (r->bits == 8) {
        *stride = r->row_bytes;
        return row;
    }
    *stride = ek_round4(r->k);
    for (uint32_t i = 0; i < count; i++) ek_unpack((const uint8_t *)row + i * r->row_bytes, r->unpacked + i * *stride, r->k, r->bits);
    return r->unpacked;
}

int ek_plain(const int8_t *shift, uint32_t n, int32_t low, int32_t high) {
#if EK_SET == EK_PORTABLE
    (void)shift, (void)n, (void)low, (void)high;
    return 0;
#else
    if (low != -128 || high != 127) return 0;
    for (; n >= 4; n -= 4, shift += 4) /* -16 to -1 are 0xf0 to 0xff */
        if ((*(const ek_word *)shift & 0xf0f0f0f0u) != 0xf0f0f0f0u) return 0;
    for (; n; n--, shift++)
        if (*shift >= 0 || *shift < -16) return 0;
    return 1;
#endif
}

int32_t ek_requantize(int32_t acc, int32_t multiplier, int shift) { return ek_scale(acc, multiplier, shift); }

#if EK_SET == EK_PORTABLE
EK_NOINLINE void ek_rows_one(const ek_rows *r, const int8_t *x, int8_t *y) {
    uint32_t o = 0, stride;
    for (; o + 4 <= r->out_n; o += 4) {
        const int8_t *w0 = ek_fetch(r, o, 4, &stride), *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
        int32_t a0 = r->bias[o], a1 = r->bias[o + 1], a2 = r->bias[o + 2], a3 = r->bias[o + 3];
        for (const int8_t *p = x, *end = x + r->k; p < end;) {
            const int32_t v = *p++;
            a0 += v * *w0++;
            a1 += v * *w1++;
            a2 += v * *w2++;
            a3 += v * *w3++;
        }
        y[o] = ek_finish(a0, r->multiplier[o], r->shift[o], r);
        y[o + 1] = ek_finish(a1, r->multiplier[o + 1], r->shift[o + 1], r);
        y[o + 2] = ek_finish(a2, r->multiplier[o + 2], r->shift[o + 2], r);
        y[o + 3] = ek_finish(a3, r->multiplier[o + 3], r->shift[o + 3], r);
    }
    for (; o < r->out_n; o++) {
        const int8_t *w = ek_fetch(r, o, 1, &stride);
        int32_t a = r->bias[o];
        for (uint32_t k = 0; k < r->k; k++) a += (int32_t)x[k] * w[k];
        y[o] = ek_finish(a, r->multiplier[o], r->shift[o], r);
    }
}
#endif
