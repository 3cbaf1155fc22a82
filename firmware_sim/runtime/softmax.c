/* Softmax by a table of exponentials and one reciprocal a row. */
#include "internal.h"

/* floor(2^53 / sum) for 2^22 <= sum < 2^32: 32 steps of long division, so that no 64-bit division is linked. */
static uint32_t reciprocal(uint32_t sum) {
    uint32_t quotient = 0;
    uint64_t rest = (uint64_t)1 << 53;
    for (int i = 31; i >= 0; i--) {
        const uint64_t part = (uint64_t)sum << i;
        if (rest >= part) rest -= part, quotient |= 1u << i;
    }
    return quotient;
}

EK_NOINLINE void ek_softmax_s8(const ek_softmax *p, const int8_t *x, int8_t *y) {
    for (uint32_t row = 0; row < p->rows; row++, x += p->n, y += p->n) {
        int32_t top = -128;
        for (uint32_t i = 0; i < p->n; i++)
            if (x[i] > top) top = x[i];
        uint32_t sum = 0;
        for (uint32_t i = 0; i < p->n; i++) sum += p->table[top - x[i]];
        const uint32_t r = reciprocal(sum);
        for (uint32_t i = 0; i < p->n; i++) {
            const int32_t q20 = (int32_t)(((uint64_t)p->table[top - x[i]] * r) >> 33); /* probability * 2^20 */
            y[i] = (int8_t)ek_clamp(ek_scale(q20, p->multiplier, p->shift) + p->out_zp, -128, 127);
        }
    }
}
