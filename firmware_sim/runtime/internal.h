/* What the kernels share: requantization, copies and the rows of a weighted layer. Not for applications. */
#ifndef EDGEKIT_INTERNAL_H
#define EDGEKIT_INTERNAL_H

#include "edgekit.h"

/* Files that use MVE's intrinsics define EK_VECTORS first: the header takes the compiler a third of a second. */
#if EK_SET == EK_MVE && defined(EK_VECTORS)
#include <arm_mve.h>
#endif

#define EK_NOINLINE __attribute__((noinline))
#define EK_INLINE static inline __attribute__((always_inline))

EK_INLINE uint32_t ek_round4(uint32_t n) { return (n + 3u) & ~3u; }
EK_INLINE uint32_t ek_round16(uint32_t n) { return (n + 15u) & ~15u; }

EK_INLINE int32_t ek_clamp(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

/* (a * m + 2^30) >> 31 for |a| < 2^30. SMMULR is (2a * m + 2^31) >> 32: the same number in two instructions. */
EK_INLINE int32_t ek_high(int32_t a, int32_t m) {
#if EK_SET != EK_PORTABLE
    int32_t h;
    __asm("smmulr %0, %1, %2" : "=r"(h) : "r"(a << 1), "r"(m));
    return h;
#else
    return (int32_t)(((int64_t)a * m + (1 << 30)) >> 31);
#endif
}

/* h / 2^n, ties away from zero. */
EK_INLINE int32_t ek_divide_power(int32_t h, int n) {
    if (n == 0) return h;
    return (h + (h >> 31) + (1 << (n - 1))) >> n;
}

EK_INLINE int32_t ek_scale(int32_t acc, int32_t multiplier, int shift) {
    if (shift > 0) return ek_high((int32_t)((uint32_t)acc << shift), multiplier);
    return ek_divide_power(ek_high(acc, multiplier), -shift);
}

#if EK_SET == EK_MVE && defined(EK_VECTORS)
EK_INLINE int32x4_t ek_scale4(int32x4_t acc, int32x4_t multiplier, int32x4_t shift) {
    const int32x4_t none = vdupq_n_s32(0), left = vmaxq_s32(shift, none), right = vminq_s32(shift, none);
    const int32x4_t h = vqrdmulhq_s32(vshlq_s32(acc, left), multiplier);
    const int32x4_t fix = vshrq_n_s32(vandq_s32(h, right), 31); /* ties of negative values away from zero; nothing if right is 0 */
    return vrshlq_s32(vaddq_s32(h, fix), right);
}
EK_INLINE int32x4_t ek_clamp4(int32x4_t q, int32_t zero, int32_t low, int32_t high) {
    return vmaxq_s32(vminq_s32(vaddq_n_s32(q, zero), vdupq_n_s32(high)), vdupq_n_s32(low));
}
#endif

/* Words at any address, where the core can. */
typedef uint32_t ek_word __attribute__((may_alias, aligned(1)));

/* newlib-nano's memcpy and memset go byte by byte. */
EK_INLINE void ek_copy(int8_t *to, const int8_t *from, uint32_t n) {
#if EK_SET == EK_MVE
    __asm volatile("wlstp.8 lr, %[n], 2f\n"
                   "1: vldrb.8 q0, [%[from]], #16\n vstrb.8 q0, [%[to]], #16\n letp lr, 1b\n2:\n"
                   : [from] "+r"(from), [to] "+r"(to)
                   : [n] "r"(n)
                   : "lr", "memory", "q0");
#else
#if EK_SET == EK_DSP || defined(__ARM_FEATURE_UNALIGNED)
    for (; n >= 4; n -= 4, to += 4, from += 4) *(ek_word *)to = *(const ek_word *)from;
#else
    if ((((uintptr_t)to | (uintptr_t)from) & 3u) == 0)
        for (; n >= 4; n -= 4, to += 4, from += 4) *(uint32_t *)(void *)to = *(const uint32_t *)(const void *)from;
#endif
    for (; n; n--) *to++ = *from++;
#endif
}

EK_INLINE void ek_fill(int8_t *to, int8_t value, uint32_t n) {
#if EK_SET == EK_MVE
    __asm volatile("vdup.8 q0, %[value]\n wlstp.8 lr, %[n], 2f\n"
                   "1: vstrb.8 q0, [%[to]], #16\n letp lr, 1b\n2:\n"
                   : [to] "+r"(to)
                   : [n] "r"(n), [value] "r"(value)
                   : "lr", "memory", "q0");
#else
    for (; n; n--) *to++ = value;
#endif
}

/* The rows of a weighted layer, or of one group of a convolution: y[o] = clamp(requantized(bias[o] + sum_k w[o][k] * x[k]) + out_zp). */
typedef struct {
    const int8_t *weights; /* out_n rows of row_bytes */
    const int32_t *bias;
    const int32_t *multiplier;
    const int8_t *shift;
    int8_t *unpacked; /* room for 4 rows of packed weights, aligned to 4; not used for int8 and by MVE */
    uint32_t k, out_n, row_bytes;
    int32_t zero, low, high;
    int bits;
    int plain; /* all shifts are to the right, by 1 to 16 (MVE: 31), and the clamp is int8's own: the short way through requantization */
} ek_rows;

/* Whether the short way is open: once a layer. */
int ek_plain(const int8_t *shift, uint32_t n, int32_t low, int32_t high);

EK_INLINE uint32_t ek_row_bytes(uint32_t k, int bits) { return bits == 8 ? k : ((k * (uint32_t)bits + 31u) >> 5) << 2; }

/* Not for MVE: `count` (<= 4) rows from `o` as int8, *stride bytes apart. Packed weights come as w * 2^(8 - bits), the quickest to get by: sums
 * start from bias * 2^(8 - bits) and are shifted back at the end. */
const int8_t *ek_fetch(const ek_rows *r, uint32_t o, uint32_t count, uint32_t *stride);

EK_INLINE int32_t ek_up(int32_t v, int bits) { return (int32_t)((uint32_t)v << bits); }

/* One column of k bytes; DSP: k expanded to pairs by ek_expand(). */
void ek_rows_one(const ek_rows *r, const int8_t *column, int8_t *y);

EK_INLINE int8_t ek_finish(int32_t acc, int32_t multiplier, int shift, const ek_rows *r) {
    return (int8_t)ek_clamp(ek_scale(acc, multiplier, shift) + r->zero, r->low, r->high);
}

/* The short way for one number, right = -shift >= 1: half and zero point in one addition, one shift, int8's own clamp.
 * (h + sign + 2^(right - 1) + zero * 2^right) >> right, the last two being twice = 2 * zero + 1 shifted by right - 1. */
#if EK_SET != EK_PORTABLE
EK_INLINE int8_t ek_short(int32_t acc, int32_t multiplier, int32_t round, int right) {
    int32_t h = ek_high(acc, multiplier), q;
    __asm("add %0, %0, %0, asr #31" : "+r"(h));
    __asm("ssat %0, #8, %1" : "=r"(q) : "r"((h + round) >> right));
    return (int8_t)q;
}
EK_INLINE int32_t ek_short_round(int32_t twice, int shift) { return (int32_t)((uint32_t)twice << ~shift); }
#endif

#if EK_SET == EK_DSP
EK_INLINE uint32_t ek_even(uint32_t v) {
    uint32_t r;
    __asm("sxtb16 %0, %1" : "=r"(r) : "r"(v));
    return r;
}
EK_INLINE uint32_t ek_odd(uint32_t v) {
    uint32_t r;
    __asm("sxtb16 %0, %1, ror #8" : "=r"(r) : "r"(v));
    return r;
}
EK_INLINE int32_t ek_smlad(uint32_t a, uint32_t b, int32_t acc) {
    int32_t r;
    __asm("smlad %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(acc));
    return r;
}

/* Four bytes become two words of two int16: (0, 2) and (1, 3), as SXTB16 gives them. Blocks are `step` words apart.
 * n is rounded up to a multiple of 4 with zeros. Returns the next block. */
EK_INLINE uint32_t *ek_expand(const int8_t *x, uint32_t n, uint32_t *pairs, uint32_t step) {
    uint32_t v, t;
    if (n >= 16) {
        uint32_t turns = n >> 4;
        __asm volatile("1:\n .rept 4\n ldr %[v], [%[x]], #4\n sxtb16 %[t], %[v]\n sxtb16 %[v], %[v], ror #8\n"
                       " strd %[t], %[v], [%[to]]\n add %[to], %[step]\n .endr\n subs %[n], #1\n bne 1b\n"
                       : [x] "+r"(x), [to] "+r"(pairs), [n] "+r"(turns), [v] "=&r"(v), [t] "=&r"(t)
                       : [step] "r"(4 * step)
                       : "cc", "memory");
        n &= 15u;
    }
    for (; n >= 4; n -= 4, x += 4, pairs += step) {
        v = *(const ek_word *)x;
        pairs[0] = ek_even(v);
        pairs[1] = ek_odd(v);
    }
    if (n) {
        v = (uint8_t)x[0];
        if (n > 1) v |= (uint32_t)(uint8_t)x[1] << 8;
        if (n > 2) v |= (uint32_t)(uint8_t)x[2] << 16;
        pairs[0] = ek_even(v);
        pairs[1] = ek_odd(v);
        pairs += step;
    }
    return pairs;
}

/* Four columns at once: blocks of the four lie beside each other (8 words), y rows y_stride apart. */
void ek_rows_four(const ek_rows *r, const uint32_t *columns, int8_t *y, uint32_t y_stride);
#endif

#endif
