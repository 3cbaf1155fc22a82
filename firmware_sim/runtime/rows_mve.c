/* Rows by VMLADAVA: sixteen products an instruction, tails by loop predication. */
#define EK_VECTORS
#include "internal.h"

#if EK_SET == EK_MVE

/* acc[i] = sum_k x[k] * row_i[k]. Accumulators of VMLADAVA are even registers; the rest is fixed too, or GCC finds no allocation. */
EK_INLINE void dot4(const int8_t *x, const int8_t *const *rows, uint32_t k, int32_t *acc) {
    register int32_t a0 __asm("r0") = 0;
    register int32_t a1 __asm("r2") = 0;
    register int32_t a2 __asm("r4") = 0;
    register int32_t a3 __asm("r6") = 0;
    register const int8_t *p __asm("r1") = x;
    register const int8_t *w0 __asm("r3") = rows[0];
    register const int8_t *w1 __asm("r5") = rows[1];
    register const int8_t *w2 __asm("r8") = rows[2];
    register const int8_t *w3 __asm("r9") = rows[3];
    register uint32_t n __asm("r12") = k;
    __asm volatile("wlstp.8 lr, r12, 2f\n1:\n"
                   "vldrb.8 q0, [r1], #16\n"
                   "vldrb.8 q1, [r3], #16\n vmladava.s8 r0, q0, q1\n"
                   "vldrb.8 q2, [r5], #16\n vmladava.s8 r2, q0, q2\n"
                   "vldrb.8 q3, [r8], #16\n vmladava.s8 r4, q0, q3\n"
                   "vldrb.8 q1, [r9], #16\n vmladava.s8 r6, q0, q1\n"
                   "letp lr, 1b\n2:\n"
                   : "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3), "+r"(p), "+r"(w0), "+r"(w1), "+r"(w2), "+r"(w3)
                   : "r"(n)
                   : "lr", "memory", "cc", "q0", "q1", "q2", "q3");
    acc[0] = a0, acc[1] = a1, acc[2] = a2, acc[3] = a3;
}

EK_NOINLINE void ek_rows_one(const ek_rows *r, const int8_t *x, int8_t *y) {
    for (uint32_t o = 0; o < r->out_n; o += 4) {
        const uint32_t left = r->out_n - o;
        uint32_t stride;
        const int8_t *w0 = ek_fetch(r, o, left < 4 ? left : 4, &stride);
        /* rows that are not there: the last one again, its result is not stored */
        const int8_t *w1 = left > 1 ? w0 + stride : w0, *w2 = left > 2 ? w1 + stride : w1, *w3 = left > 3 ? w2 + stride : w2;
        const int8_t *const rows[4] = {w0, w1, w2, w3};
        int32_t acc[4] __attribute__((aligned(16)));
        dot4(x, rows, r->k, acc);
        const mve_pred16_t lanes = vctp32q(left);
        const int32x4_t a = vaddq_s32(vld1q_s32(acc), vldrwq_z_s32(r->bias + o, lanes));
        const int32x4_t q = ek_scale4(a, vldrwq_z_s32(r->multiplier + o, lanes), vldrbq_z_s32(r->shift + o, lanes));
        vstrbq_p_s32(y + o, ek_clamp4(q, r->zero, r->low, r->high), lanes);
    }
}
#endif
