/* Fully connected layers. */
#include "internal.h"

EK_NOINLINE void ek_linear_s8(const ek_linear *p, const int8_t *x, int8_t *y, void *scratch) {
    int8_t *free = scratch;
#if EK_SET == EK_DSP
    uint32_t *pairs = scratch;
    free += 2 * ek_round4(p->in_n);
#endif
    const ek_rows r = {p->weights, p->bias, p->multiplier, p->shift, free, p->in_n, p->out_n, ek_row_bytes(p->in_n, p->weight_bits),
                       p->out_zp, p->act_min, p->act_max, p->weight_bits, ek_plain(p->shift, p->out_n, p->act_min, p->act_max)};
    for (uint32_t i = 0; i < p->rows; i++, x += p->in_n, y += p->out_n) {
#if EK_SET == EK_DSP
        ek_expand(x, p->in_n, pairs, 2);
        ek_rows_one(&r, (const int8_t *)pairs, y);
#else
        ek_rows_one(&r, x, y);
#endif
    }
}
