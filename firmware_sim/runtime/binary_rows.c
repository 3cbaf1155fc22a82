/* 1-bit layers by exclusive or and counting, one output after the other: for groups and for few outputs. */
#include "bits.h"

/* Counts carried over from run to run; what is left in them at the end counts 1, 2 and 4. */
typedef struct {
    uint32_t one, two, four, total;
} counts;

#define DIFFERENT(i) (a[i] ^ b[i])
EK_INLINE void different(counts *s, const uint32_t *a, const uint32_t *b, uint32_t n) {
    for (; n >= 8; n -= 8, a += 8, b += 8) {
        uint32_t c, d, e, f;
        EK_FULL_ADDER(c, s->one, DIFFERENT(0), DIFFERENT(1));
        EK_FULL_ADDER(d, s->one, DIFFERENT(2), DIFFERENT(3));
        EK_FULL_ADDER(e, s->two, c, d);
        EK_FULL_ADDER(c, s->one, DIFFERENT(4), DIFFERENT(5));
        EK_FULL_ADDER(d, s->one, DIFFERENT(6), DIFFERENT(7));
        EK_FULL_ADDER(f, s->two, c, d);
        EK_FULL_ADDER(c, s->four, e, f);
        s->total += 8 * ek_ones(c);
    }
    for (; n >= 3; n -= 3, a += 3, b += 3) {
        uint32_t l = DIFFERENT(0), h;
        EK_FULL_ADDER(h, l, DIFFERENT(1), DIFFERENT(2));
        s->total += ek_ones(l) + 2 * ek_ones(h);
    }
    for (; n; n--) s->total += ek_ones(*a++ ^ *b++);
}

/* 1 to 32 bits from bit `first`. */
EK_INLINE uint32_t bits_at(const uint32_t *x, uint32_t first, uint32_t n) {
    const uint32_t shift = first & 31u;
    x += first >> 5;
    uint32_t v = *x >> shift;
    if (shift + n > 32) v |= x[1] << (32 - shift);
    return v & (~0u >> (32 - n));
}

static void take_bits(const uint32_t *x, uint32_t first, uint32_t n, uint32_t *to) {
    for (; n > 32; n -= 32, first += 32) *to++ = bits_at(x, first, 32);
    *to = bits_at(x, first, n);
}

typedef struct {
    uint32_t *column;  /* the window's words of one group; taps outside are free */
    uint32_t each, in_n; /* words of a tap, channels of the group */
    ek_inside at;
} field;

static int32_t sum(const ek_binary *p, const field *f, const uint32_t *weights) {
    counts s = {0, 0, 0, 0};
    const uint32_t width = f->at.j1 - f->at.j0;
    for (uint32_t i = f->at.i0; i < f->at.i1; i++) {
        const uint32_t first = (i * p->kernel_w + f->at.j0) * f->each;
        different(&s, f->column + first, weights + first, width * f->each);
    }
    s.total += ek_ones(s.one) + 2 * ek_ones(s.two) + 4 * ek_ones(s.four);
    return (int32_t)((f->at.i1 - f->at.i0) * width * f->in_n) - (int32_t)(2 * s.total);
}

EK_NOINLINE void ek_binary_rows(const ek_binary *p, const void *x, void *y, void *scratch) {
    const uint32_t in_n = p->in_c / p->groups, out_n = p->out_c / p->groups, words = (p->in_c + 31u) >> 5, out_words = (p->out_c + 31u) >> 5;
    field f = {scratch, (in_n + 31u) >> 5, in_n, {0, 0, 0, 0, 0, 0}};
    const uint32_t taps = (uint32_t)p->kernel_h * p->kernel_w, row = taps * f.each;
    uint32_t *bits = y;
    int8_t *bytes = y;
    for (uint32_t oy = 0; oy < p->out_h; oy++)
        for (uint32_t ox = 0; ox < p->out_w; ox++, bits += out_words, bytes += p->out_c) {
            const uint32_t *weights = p->weights;
            ek_inside_at(p, oy, ox, &f.at);
            if (p->thresholds)
                for (uint32_t i = 0; i < out_words; i++) bits[i] = 0;
            for (uint32_t o = 0, g = 0; g < p->groups; g++) {
                for (uint32_t i = f.at.i0; i < f.at.i1; i++)
                    for (uint32_t c = f.at.j0; c < f.at.j1; c++) {
                        const uint32_t iy = (uint32_t)(f.at.y + (int32_t)(i * p->dilation_h)), ix = (uint32_t)(f.at.x + (int32_t)(c * p->dilation_w));
                        take_bits((const uint32_t *)x + (iy * p->in_w + ix) * words, g * in_n, in_n, f.column + (i * p->kernel_w + c) * f.each);
                    }
                for (const uint32_t end = o + out_n; o < end; o++, weights += row) {
                    const int32_t acc = sum(p, &f, weights);
                    if (p->thresholds)
                        bits[o >> 5] |= (uint32_t)(acc >= ((const int32_t *)p->thresholds)[o]) << (o & 31u);
                    else
                        bytes[o] = (int8_t)ek_clamp(ek_scale(acc + p->base[o], p->multiplier[o], p->shift[o]) + p->out_zp, p->act_min, p->act_max);
                }
            }
        }
}
