/* Concatenation, padding, permutation: kernels that move and at most requantize. */
#include "internal.h"

EK_NOINLINE void ek_concat_s8(const ek_concat *p, const int8_t *x, int8_t *y) {
    const ek_requant r = {p->n, p->multiplier, p->shift, p->in_zp, p->out_zp, p->act_min, p->act_max};
    for (uint32_t i = 0; i < p->outer; i++, x += p->n, y += p->y_stride)
        if (p->multiplier)
            ek_requant_s8(&r, x, y);
        else
            ek_copy(y, x, p->n);
}

EK_NOINLINE void ek_pad_s8(const ek_pad *p, const int8_t *x, int8_t *y) {
    const uint32_t run = (uint32_t)p->in_w * p->channels, left = (uint32_t)p->left * p->channels, right = (uint32_t)p->right * p->channels;
    const uint32_t line = left + run + right;
    ek_fill(y, p->value, p->top * line);
    y += p->top * line;
    for (uint32_t i = 0; i < p->in_h; i++, x += run, y += line) {
        ek_fill(y, p->value, left);
        ek_copy(y + left, x, run);
        ek_fill(y + left + run, p->value, right);
    }
    ek_fill(y, p->value, p->bottom * line);
}

EK_NOINLINE void ek_gather_s8(const ek_gather *p, const int8_t *x, int8_t *y) {
    x += p->offset;
    for (uint32_t a = 0; a < p->shape[0]; a++, x += p->stride[0]) {
        const int8_t *xb = x;
        for (uint32_t b = 0; b < p->shape[1]; b++, xb += p->stride[1]) {
            const int8_t *xc = xb;
            for (uint32_t c = 0; c < p->shape[2]; c++, xc += p->stride[2]) {
                const int8_t *xd = xc;
                for (uint32_t d = 0; d < p->shape[3]; d++, xd += p->stride[3]) *y++ = *xd;
            }
        }
    }
}
