/* What the kernels of 1-bit layers share. Not for applications.
 *
 * Two of them count in bit planes: a word holds one bit of 32 numbers, and full adders on words add 32 one-bit numbers at once (128 with vectors).
 * What is added are the words of the inputs, or of the weights, that are not to be left out: the rarer of the two signs. */
#ifndef EDGEKIT_BITS_H
#define EDGEKIT_BITS_H

#include "internal.h"

/* One full adder a bit: l becomes the sum of l, a and b, h the carry. */
#define EK_FULL_ADDER(h, l, a, b)                     \
    do {                                              \
        const uint32_t a_ = (a), b_ = (b), u_ = (l) ^ a_; \
        (h) = (l) ^ (u_ & ((l) ^ b_));                \
        (l) = u_ ^ b_;                                \
    } while (0)

enum {
    EK_MOST_PLANES = 20,
    EK_LANES = EK_SET == EK_MVE ? 4 : 1 /* words that ek_count() counts at once */
};

EK_INLINE uint32_t ek_ones(uint32_t v) {
    v -= (v >> 1) & 0x55555555u;
    v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
    return (((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}

/* Where the window of an output position lies. */
typedef struct {
    int32_t y, x;            /* upper left corner in the input; may be negative */
    uint32_t i0, i1, j0, j1; /* taps inside the input: rows i0 to i1 - 1, columns j0 to j1 - 1 */
} ek_inside;
void ek_inside_at(const ek_binary *p, uint32_t oy, uint32_t ox, ek_inside *at);

/* Appends base + i * step for each bit i of v that is set; returns the place behind. */
EK_INLINE uint32_t *ek_list(uint32_t v, uint32_t base, uint32_t step, uint32_t *to) {
#if defined(__ARM_ARCH_6M__)
    for (; v; v >>= 1, base += step)
        if (v & 1u) *to++ = base;
#else
    const uint32_t top = base + 31 * step;
    while (v) {
        const uint32_t z = (uint32_t)__builtin_clz(v);
        v &= ~(0x80000000u >> z);
        *to++ = top - z * step;
    }
#endif
    return to;
}
/* The lowest n bits, all of them from 32 on. */
EK_INLINE uint32_t ek_low(uint32_t n) { return n < 32 ? (1u << n) - 1u : ~0u; }
/* Fills a list up to a multiple of eight with the address of zeros. */
EK_INLINE uint32_t *ek_fill_list(const uint32_t *list, uint32_t *to, const uint32_t *zeros) {
    while ((uint32_t)(to - list) & 7u) *to++ = (uint32_t)zeros;
    return to;
}

/* planes += how many of the words, `at` bytes behind the listed addresses, have the bit; planes lie EK_LANES apart, n_planes >= 7. With vectors call
 * it for at = 0, 16, 32, ... in this order. carries: room for (end - list) / 8 + 3 times EK_LANES words. */
void ek_count(uint32_t *list, const uint32_t *end, uint32_t at, uint32_t *planes, uint32_t n_planes, uint32_t *carries);

/* A matrix of 32 x 32 bits: bit j of word i changes places with bit i of word j. */
void ek_transpose(uint32_t *words);
/* Byte b of word i: the lowest eight bits of the number of lane 8 * b + i, from n planes, EK_LANES apart. */
void ek_bytes(const uint32_t *planes, uint32_t n, uint32_t *words);
/* The numbers below 2^16 of 32 lanes from n planes, EK_LANES apart. */
void ek_numbers(const uint32_t *planes, uint32_t n, uint16_t *numbers);

/* clamp(requantized(acc) + out_zp); plain: ek_plain() */
EK_INLINE int8_t ek_binary_finish(const ek_binary *p, int32_t acc, int32_t multiplier, int shift, int plain) {
#if EK_SET != EK_PORTABLE
    if (plain && (EK_SET == EK_DSP || shift >= -16)) return ek_short(acc, multiplier, ek_short_round(2 * p->out_zp + 1, shift), -shift);
#else
    (void)plain;
#endif
    return (int8_t)ek_clamp(ek_scale(acc, multiplier, shift) + p->out_zp, p->act_min, p->act_max);
}

#endif
