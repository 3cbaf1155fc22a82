/* Rows by VMLADAVA: sixteen products an instruction, tails by loop predication. */
#define EK_VECTORS
#include "internal.h"

#if EK_SET == EK_MVE

/* Sums of four rows, bias included, as a vector. Accumulators of VMLADAVA are even registers; the rest is fixed too, or GCC finds no
 * allocation. */
EK_INLINE int32x4_t dot4(const int8_t *x, const int8_t *const rows[4], uint32_t k, const int32_t bias[4]) {
    register int32_t a0 __asm("r0") = bias[0];
    register int32_t a1 __asm("r2") = bias[1];
    register int32_t a2 __asm("r4") = bias[2];
    register int32_t a3 __asm("r6") = bias[3];
    register const int8_t *p __asm("r1") = x;
    register const int8_t *w0 __asm("r3") = rows[0];
    register const int8_t *w1 __asm("r5") = rows[1];
    register const int8_t *w2 __asm("r8") = rows[2];
    register const int8_t *w3 __asm("r9") = rows[3];
    register uint32_t n __asm("r12") = k;
    register int32x4_t sums __asm("q0");
    __asm volatile("wlstp.8 lr, r12, 2f\n1:\n"
                   "vldrb.8 q0, [r1], #16\n"
                   "vldrb.8 q1, [r3], #16\n vmladava.s8 r0, q0, q1\n"
                   "vldrb.8 q2, [r5], #16\n vmladava.s8 r2, q0, q2\n"
                   "vldrb.8 q3, [r8], #16\n vmladava.s8 r4, q0, q3\n"
                   "vldrb.8 q1, [r9], #16\n vmladava.s8 r6, q0, q1\n"
                   "letp lr, 1b\n2:\n"
                   "vmov q0[2], q0[0], r0, r4\n vmov q0[3], q0[1], r2, r6\n"
                   : "=w"(sums), "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3), "+r"(p), "+r"(w0), "+r"(w1), "+r"(w2), "+r"(w3)
                   : "r"(n)
                   : "lr", "memory", "cc", "q1", "q2", "q3");
    return sums;
}

/* Packed weights are multiplied in the upper bits of their bytes, as w * 2^(8 - bits). Sixteen bytes of groups meet the values in words:
 * field f of group g belongs to word f + g * fields, which is how VLD2 and VLD4 deal them out. `n` groups are left. */
#define FIELD(a, f, v) a = vmladavaq_s8(a, v, vreinterpretq_s8_s32(in.val[f]))

#define ROW4(a, w)                                                                                                           \
    do {                                                                                                                      \
        const int32_t *at = (const int32_t *)(const void *)(w);                                                               \
        const int8x16_t v = vreinterpretq_s8_s32(n >= 4 ? vldrwq_s32(at) : vldrwq_z_s32(at, vctp32q(n)));                     \
        FIELD(a, 0, vshlq_n_s8(v, 4));                                                                                        \
        FIELD(a, 1, vandq_s8(v, mask));                                                                                       \
        w += 16;                                                                                                              \
    } while (0)

#define ROW2(a, w)                                                                                                           \
    do {                                                                                                                      \
        const int32_t *at = (const int32_t *)(const void *)(w);                                                               \
        const int8x16_t v = vreinterpretq_s8_s32(n >= 4 ? vldrwq_s32(at) : vldrwq_z_s32(at, vctp32q(n)));                     \
        FIELD(a, 0, vshlq_n_s8(v, 6));                                                                                        \
        FIELD(a, 1, vandq_s8(vshlq_n_s8(v, 4), mask));                                                                        \
        FIELD(a, 2, vandq_s8(vshlq_n_s8(v, 2), mask));                                                                        \
        FIELD(a, 3, vandq_s8(v, mask));                                                                                       \
        w += 16;                                                                                                              \
    } while (0)

typedef struct {
    int32_t s0, s1, s2, s3;
    const int8_t *w0, *w1, *w2, *w3;
} four;

EK_INLINE void block4(four *f, const int8_t *x, uint32_t n) {
    const int32x4x2_t in = vld2q_s32((const int32_t *)(const void *)x);
    const int8x16_t mask = vdupq_n_s8((int8_t)0xf0);
    ROW4(f->s0, f->w0);
    ROW4(f->s1, f->w1);
    ROW4(f->s2, f->w2);
    ROW4(f->s3, f->w3);
}

EK_INLINE void block2(four *f, const int8_t *x, uint32_t n) {
    const int32x4x4_t in = vld4q_s32((const int32_t *)(const void *)x);
    const int8x16_t mask = vdupq_n_s8((int8_t)0xc0);
    ROW2(f->s0, f->w0);
    ROW2(f->s1, f->w1);
    ROW2(f->s2, f->w2);
    ROW2(f->s3, f->w3);
}

/* All rows of packed weights. What x has behind its last whole block is copied and filled up with zeros. */
EK_NOINLINE static void packed_rows(const ek_rows *restrict r, const int8_t *x, int8_t *restrict y) {
    const uint32_t stride = r->row_bytes, each = r->bits == 4 ? 32 : 64, whole = r->k / each, rest = r->k & (each - 1);
    const uint32_t groups = r->bits == 4 ? (rest + 7u) >> 3 : (rest + 15u) >> 4;
    int8_t tail[64];
    ek_fill(tail, 0, sizeof tail);
    ek_copy(tail, x + whole * each, rest);
    for (uint32_t o = 0; o < r->out_n; o += 4) {
        const uint32_t left = r->out_n - o;
        const int8_t *w0 = r->weights + o * stride, *in = x;
        /* rows that are not there: the last one again, its result is not stored */
        const int8_t *w1 = left > 1 ? w0 + stride : w0, *w2 = left > 2 ? w1 + stride : w1, *w3 = left > 3 ? w2 + stride : w2;
        four f = {0, 0, 0, 0, w0, w1, w2, w3};
        if (r->bits == 4) {
            for (uint32_t n = whole; n; n--, in += 32) block4(&f, in, 4);
            if (groups) block4(&f, tail, groups);
        } else {
            for (uint32_t n = whole; n; n--, in += 64) block2(&f, in, 4);
            if (groups) block2(&f, tail, groups);
        }
        const mve_pred16_t lanes = vctp32q(left);
        const int32_t found[4] = {f.s0, f.s1, f.s2, f.s3};
        const int32x4_t sums = vaddq_s32(vshlq_r_s32(vldrwq_s32(found), r->bits - 8), vldrwq_z_s32(r->bias + o, lanes));
        const int32x4_t q = ek_scale4(sums, vldrwq_z_s32(r->multiplier + o, lanes), vldrbq_z_s32(r->shift + o, lanes));
        vstrbq_p_s32(y + o, ek_clamp4(q, r->zero, r->low, r->high), lanes);
    }
}

typedef struct {
    const int8_t *x;
    uint32_t k;
} column;
typedef struct {
    const int8_t *shift;
    int8_t *y;
} places;
typedef struct {
    uint32_t back, stride; /* bytes from the end of a group's last row, as read, to the next group; and from row to row */
} steps;

/* `groups` (> 0) times four rows of int8 by the short way. Everything the loop keeps between groups is in fixed registers or on the
 * stack: left to GCC, half of its instructions are spills. */
static void plain_groups(const ek_rows *r, const int8_t *x, int8_t *y, uint32_t groups) {
    const column in = {x, r->k};
    places at = {r->shift, y};
    const steps step = {r->row_bytes - ek_round16(r->k), r->row_bytes};
    register const int8_t *w0 __asm("r3") = r->weights;
    register const int8_t *w1 __asm("r5") = w0 + r->row_bytes;
    register const int8_t *w2 __asm("r8") = w1 + r->row_bytes;
    register const int8_t *w3 __asm("r9") = w2 + r->row_bytes;
    register const int32_t *bias __asm("r10") = r->bias;
    register const int32_t *multiplier __asm("r11") = r->multiplier;
    register int32x4_t zero __asm("q4") = vdupq_n_s32(r->zero);
    __asm volatile(
        "5: ldrd r1, r12, %[in]\n ldrd r0, r2, [r10], #8\n ldrd r4, r6, [r10], #8\n"
        "wlstp.8 lr, r12, 2f\n1:\n"
        "vldrb.8 q0, [r1], #16\n"
        "vldrb.8 q1, [r3], #16\n vmladava.s8 r0, q0, q1\n"
        "vldrb.8 q2, [r5], #16\n vmladava.s8 r2, q0, q2\n"
        "vldrb.8 q3, [r8], #16\n vmladava.s8 r4, q0, q3\n"
        "vldrb.8 q1, [r9], #16\n vmladava.s8 r6, q0, q1\n"
        "letp lr, 1b\n2:\n"
        "vmov q0[2], q0[0], r0, r4\n vmov q0[3], q0[1], r2, r6\n"
        "ldrd r0, r2, %[at]\n ldrd r4, r6, %[step]\n"
        "vldrw.32 q1, [r11], #16\n vldrb.s32 q2, [r0], #4\n"
        "vqrdmulh.s32 q0, q0, q1\n vshr.s32 q1, q0, #31\n vadd.i32 q0, q0, q1\n vrshl.s32 q0, q0, q2\n vadd.i32 q0, q0, q4\n"
        "vqmovnb.s32 q0, q0\n vqmovnb.s16 q0, q0\n vstrb.32 q0, [r2], #4\n"
        "strd r0, r2, %[at]\n add r3, r9, r4\n add r5, r3, r6\n add r8, r5, r6\n add r9, r8, r6\n"
        "ldr r0, %[groups]\n subs r0, #1\n str r0, %[groups]\n bne 5b\n"
        : [at] "+m"(at), [groups] "+m"(groups), "+r"(w0), "+r"(w1), "+r"(w2), "+r"(w3), "+r"(bias), "+r"(multiplier)
        : [in] "m"(in), [step] "m"(step), "w"(zero)
        : "r0", "r1", "r2", "r4", "r6", "r12", "lr", "memory", "cc", "q0", "q1", "q2", "q3");
}

EK_NOINLINE void ek_rows_one(const ek_rows *restrict r, const int8_t *x, int8_t *restrict y) {
    uint32_t o = 0;
    if (r->bits != 8) {
        packed_rows(r, x, y);
        return;
    }
    if (r->plain && r->out_n >= 4) {
        plain_groups(r, x, y, r->out_n >> 2);
        o = r->out_n & ~3u;
    }
    for (; o < r->out_n; o += 4) {
        const uint32_t left = r->out_n - o, stride = r->row_bytes;
        const int8_t *w0 = r->weights + o * stride;
        const int8_t *w1 = left > 1 ? w0 + stride : w0, *w2 = left > 2 ? w1 + stride : w1, *w3 = left > 3 ? w2 + stride : w2;
        const int8_t *const rows[4] = {w0, w1, w2, w3};
        const mve_pred16_t lanes = vctp32q(left);
        int32_t bias[4];
        vst1q_s32(bias, vldrwq_z_s32(r->bias + o, lanes));
        const int32x4_t q = ek_scale4(dot4(x, rows, r->k, bias), vldrwq_z_s32(r->multiplier + o, lanes), vldrbq_z_s32(r->shift + o, lanes));
        vstrbq_p_s32(y + o, ek_clamp4(q, r->zero, r->low, r->high), lanes);
    }
}
#endif
