/* int8 to packed signs. */
#include "internal.h"

EK_NOINLINE void ek_binarize_s8(const ek_binarize *p, const int8_t *x, void *y) {
    uint32_t *to = y;
    const uint32_t step = p->n > 1;
    for (uint32_t i = 0; i < p->positions; i++) {
        const int16_t *t = p->threshold;
        for (uint32_t left = p->channels; left;) {
            const uint32_t n = left < 32 ? left : 32;
            uint32_t bits = 0;
            left -= n;
            for (uint32_t c = 0; c < n; c++, t += step) bits |= (uint32_t)(*x++ >= *t) << c;
            *to++ = bits;
        }
    }
}
