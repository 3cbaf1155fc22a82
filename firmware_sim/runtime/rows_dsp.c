/* Rows by SMLAD. The inner loops are whole blocks of assembly in fixed registers: GCC 12 spills what it schedules itself. */
#include "internal.h"

#if EK_SET == EK_DSP

/* One block: 4 weights of a row by 4 columns (r3-r6). */
#define QUAD                                                                                                          \
    "ldr r12, [r0], #4\n sxtb16 lr, r12\n sxtb16 r12, r12, ror #8\n"                                                  \
    "ldm r1!, {r8-r11}\n smlad r3, lr, r8, r3\n smlad r3, r12, r9, r3\n smlad r4, lr, r10, r4\n smlad r4, r12, r11, r4\n" \
    "ldm r1!, {r8-r11}\n smlad r5, lr, r8, r5\n smlad r5, r12, r9, r5\n smlad r6, lr, r10, r6\n smlad r6, r12, r11, r6\n"

/* One block: 4 values of a column by 4 rows (r3-r6), r8 bytes apart; r9 is 3 * r8. */
#define ROW(acc, load) \
    "ldr r12, " load "\n sxtb16 lr, r12\n sxtb16 r12, r12, ror #8\n smlad " acc ", lr, r10, " acc "\n smlad " acc ", r12, r11, " acc "\n"
#define COLUMN "ldrd r10, r11, [r1], #8\n" ROW("r4", "[r0, r8]") ROW("r5", "[r0, r8, lsl #1]") ROW("r6", "[r0, r9]") ROW("r3", "[r0], #4")

/* Runs `block` r2 times, four at a turn. */
#define REPEAT(block)                                                                                \
    "subs r2, r2, #4\n blo 2f\n1:\n" block block block block "subs r2, r2, #4\n bhs 1b\n2: adds r2, r2, #4\n beq 4f\n3:\n" block \
    "subs r2, r2, #1\n bne 3b\n4:\n"

EK_INLINE const int8_t *fetch(const ek_rows *r, uint32_t o, uint32_t count, uint32_t *stride) {
    *stride = r->row_bytes;
    return r->bits == 8 ? r->weights + o * r->row_bytes : ek_fetch(r, o, count, stride);
}

EK_INLINE void rows_four(const ek_rows *restrict r, const uint32_t *columns, int8_t *restrict y, uint32_t y_stride, int packed) {
    const uint32_t blocks = (r->k + 3) >> 2;
    const int32_t twice = 2 * r->zero + 1;
    const int down = packed ? 8 - r->bits : 0;
    for (uint32_t o = 0; o < r->out_n; o++, y++) {
        uint32_t stride;
        register const int8_t *w __asm("r0") = fetch(r, o, 1, &stride);
        register const uint32_t *q __asm("r1") = columns;
        register uint32_t n __asm("r2") = blocks;
        register int32_t a0 __asm("r3") = ek_up(r->bias[o], down);
        register int32_t a1 __asm("r4") = a0;
        register int32_t a2 __asm("r5") = a0;
        register int32_t a3 __asm("r6") = a0;
        __asm volatile(REPEAT(QUAD)
                       : "+r"(w), "+r"(q), "+r"(n), "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3)
                       :
                       : "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory");
        if (down) a0 >>= down, a1 >>= down, a2 >>= down, a3 >>= down;
        const int32_t multiplier = r->multiplier[o];
        const int shift = r->shift[o];
        int8_t *to = y;
        if (r->plain) {
            const int32_t round = ek_short_round(twice, shift);
            *to = ek_short(a0, multiplier, round, -shift), to += y_stride;
            *to = ek_short(a1, multiplier, round, -shift), to += y_stride;
            *to = ek_short(a2, multiplier, round, -shift), to += y_stride;
            *to = ek_short(a3, multiplier, round, -shift);
        } else {
            const int32_t acc[4] = {a0, a1, a2, a3};
            for (int i = 0; i < 4; i++, to += y_stride) *to = ek_finish(acc[i], multiplier, shift, r);
        }
    }
}

EK_NOINLINE void ek_rows_four(const ek_rows *restrict r, const uint32_t *columns, int8_t *restrict y, uint32_t y_stride) {
    if (r->bits == 8)
        rows_four(r, columns, y, y_stride, 0);
    else
        rows_four(r, columns, y, y_stride, 1);
}

/* A group of 4-bit weights by the eight values in r5, r6, r8, r9; r11 is the mask of upper halves. */
#define GROUP(w, acc)                                                                                                          \
    "ldr r12, [" w "], #4\n and lr, r11, r12, lsl #4\n and r12, r11\n sxtb16 r7, lr\n sxtb16 lr, lr, ror #8\n"                   \
    "smlad " acc ", r7, r5, " acc "\n smlad " acc ", lr, r6, " acc "\n sxtb16 r7, r12\n sxtb16 r12, r12, ror #8\n"              \
    "smlad " acc ", r7, r8, " acc "\n smlad " acc ", r12, r9, " acc "\n"

/* Rows of 4-bit weights two by two, without unpacking them to memory; how many were done. */
EK_NOINLINE static uint32_t packed_pairs(const ek_rows *restrict r, const int8_t *column, int8_t *restrict y) {
    const uint32_t groups = (r->k + 7) >> 3;
    uint32_t o = 0;
    for (; o + 2 <= r->out_n; o += 2) {
        register const int8_t *w0 __asm("r0") = r->weights + o * r->row_bytes;
        register const int8_t *w1 __asm("r1") = w0 + r->row_bytes;
        register const int8_t *q __asm("r2") = column;
        register int32_t a0 __asm("r3") = ek_up(r->bias[o], 4);
        register int32_t a1 __asm("r4") = ek_up(r->bias[o + 1], 4);
        register uint32_t n __asm("r10") = groups;
        register uint32_t mask __asm("r11") = 0xf0f0f0f0u;
        __asm volatile("1: ldrd r5, r6, [r2], #8\n ldrd r8, r9, [r2], #8\n" GROUP("r0", "r3") GROUP("r1", "r4")
                       "subs r10, #1\n bne 1b\n"
                       : "+r"(w0), "+r"(w1), "+r"(q), "+r"(a0), "+r"(a1), "+r"(n)
                       : "r"(mask)
                       : "r5", "r6", "r7", "r8", "r9", "r12", "lr", "cc", "memory");
        y[o] = ek_finish(a0 >> 4, r->multiplier[o], r->shift[o], r);
        y[o + 1] = ek_finish(a1 >> 4, r->multiplier[o + 1], r->shift[o + 1], r);
    }
    return o;
}

#define SHORT(i, acc) y[o + i] = ek_short(acc, multiplier[i], ek_short_round(twice, shift[i]), -shift[i])
EK_NOINLINE void ek_rows_one(const ek_rows *restrict r, const int8_t *column, int8_t *restrict y) {
    const uint32_t blocks = (r->k + 3) >> 2;
    const int32_t twice = 2 * r->zero + 1;
    const uint32_t whole = r->out_n & ~3u;
    const int down = 8 - r->bits;
    uint32_t o = r->bits == 4 ? packed_pairs(r, column, y) : 0;
    for (; o < whole; o += 4) {
        uint32_t gap;
        register const int8_t *w __asm("r0") = fetch(r, o, 4, &gap);
        const int32_t *bias = r->bias + o;
        register const int8_t *q __asm("r1") = column;
        register uint32_t n __asm("r2") = blocks;
        register int32_t a0 __asm("r3") = ek_up(bias[0], down);
        register int32_t a1 __asm("r4") = ek_up(bias[1], down);
        register int32_t a2 __asm("r5") = ek_up(bias[2], down);
        register int32_t a3 __asm("r6") = ek_up(bias[3], down);
        register uint32_t stride __asm("r8") = gap;
        register uint32_t stride3 __asm("r9") = gap * 3;
        __asm volatile(REPEAT(COLUMN)
                       : "+r"(w), "+r"(q), "+r"(n), "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3)
                       : "r"(stride), "r"(stride3)
                       : "r10", "r11", "r12", "lr", "cc", "memory");
        if (down) a0 >>= down, a1 >>= down, a2 >>= down, a3 >>= down;
        const int32_t *multiplier = r->multiplier + o;
        const int8_t *shift = r->shift + o;
        if (r->plain) {
            SHORT(0, a0);
            SHORT(1, a1);
            SHORT(2, a2);
            SHORT(3, a3);
        } else {
            const int32_t acc[4] = {a0, a1, a2, a3};
            for (uint32_t i = 0; i < 4; i++) y[o + i] = ek_finish(acc[i], multiplier[i], shift[i], r);
        }
    }
    for (; o < r->out_n; o++) {
        uint32_t stride;
        const int8_t *w = fetch(r, o, 1, &stride);
        const uint32_t *q = (const uint32_t *)(const void *)column;
        int32_t a = ek_up(r->bias[o], down);
        for (uint32_t i = 0; i < blocks; i++, w += 4, q += 2) {
            const uint32_t v = *(const ek_word *)w;
            a = ek_smlad(ek_odd(v), q[1], ek_smlad(ek_even(v), q[0], a));
        }
        y[o] = ek_finish(a >> down, r->multiplier[o], r->shift[o], r);
    }
}
#endif
