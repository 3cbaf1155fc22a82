/* Lists of words, counting them in bit planes, and turning planes into numbers: see bits.h. */
#define EK_VECTORS
#include "bits.h"

static void inside_axis(int32_t start, int32_t step, uint32_t taps, int32_t size, uint32_t *first, uint32_t *end) {
    int32_t a = 0, b = (int32_t)taps, last = start + (b - 1) * step;
    for (; a < b && start < 0; start += step) a++;
    for (; b > a && last >= size; last -= step) b--;
    *first = (uint32_t)a, *end = (uint32_t)b;
}

void ek_inside_at(const ek_binary *p, uint32_t oy, uint32_t ox, ek_inside *at) {
    at->y = (int32_t)(oy * p->stride_h) - p->pad_top, at->x = (int32_t)(ox * p->stride_w) - p->pad_left;
    inside_axis(at->y, p->dilation_h, p->kernel_h, p->in_h, &at->i0, &at->i1);
    inside_axis(at->x, p->dilation_w, p->kernel_w, p->in_w, &at->j0, &at->j1);
}

/* Words eight by eight: planes 1, 2 and 4 stay in registers, every eight words give a carry of weight 8. */
#if EK_SET == EK_MVE
#define ADDER(plane, a, b, h)                                                                                                       \
    "veor " a ", " plane ", " a "\n veor " h ", " plane ", " b "\n vand " h ", " h ", " a "\n veor " h ", " h ", " plane "\n veor " \
    plane ", " a ", " b "\n"
#define FOUR(h)                                                                                                                  \
    "ldm r0, {r4-r7}\n vldrw.32 q3, [r4], #16\n vldrw.32 q4, [r5], #16\n" ADDER("q0", "q3", "q4", "q7")                            \
    "vldrw.32 q3, [r6], #16\n vldrw.32 q4, [r7], #16\n stm r0!, {r4-r7}\n" ADDER("q0", "q3", "q4", "q5") ADDER("q1", "q7", "q5", h)
EK_INLINE uint32_t *eights(uint32_t *list, const uint32_t *end, uint32_t *planes, uint32_t *carries) {
    register uint32_t *l __asm("r0") = list;
    register uint32_t *low __asm("r1") = planes;
    register uint32_t *to __asm("r2") = carries;
    register uint32_t turns __asm("r3") = (uint32_t)(end - list) >> 3;
    __asm volatile("vldrw.32 q0, [r1]\n vldrw.32 q1, [r1, #16]\n vldrw.32 q2, [r1, #32]\n dls lr, r3\n"
                   "1:\n" FOUR("q6") FOUR("q3") ADDER("q2", "q6", "q3", "q4") "vstrw.32 q4, [r2], #16\n le lr, 1b\n"
                   "vstrw.32 q0, [r1]\n vstrw.32 q1, [r1, #16]\n vstrw.32 q2, [r1, #32]\n"
                   : "+r"(l), "+r"(to)
                   : "r"(low), "r"(turns)
                   : "r4", "r5", "r6", "r7", "lr", "memory", "cc", "q0", "q1", "q2", "q3", "q4", "q5", "q6", "q7");
    return to;
}
#elif EK_SET == EK_DSP
#define ADDER(plane, a, b, h) \
    "eor " a ", " plane "\n eor " h ", " plane ", " b "\n and " h ", " a "\n eor " h ", " plane "\n eor " plane ", " a ", " b "\n"
#define FOUR(first, second, h) \
    "ldm r0!, {r8-r11}\n" first ADDER("r4", "r8", "r9", "r12") second ADDER("r4", "r10", "r11", "r8") ADDER("r5", "r12", "r8", h)
#define FOUR_AT(h)                                                                          \
    FOUR("ldr r8, [r8, r1]\n ldr r9, [r9, r1]\n", "ldr r10, [r10, r1]\n ldr r11, [r11, r1]\n", h)
EK_INLINE uint32_t *eights(const uint32_t *list, const uint32_t *end, uint32_t at, uint32_t *planes, uint32_t *carries) {
    register const uint32_t *l __asm("r0") = list;
    register uint32_t place __asm("r1") = at;
    register uint32_t *to __asm("r2") = carries;
    register const uint32_t *last __asm("r3") = end;
    register uint32_t one __asm("r4") = planes[0];
    register uint32_t two __asm("r5") = planes[1];
    register uint32_t four __asm("r6") = planes[2];
    __asm volatile("1:\n" FOUR_AT("lr") FOUR_AT("r9") ADDER("r6", "lr", "r9", "r10") "str r10, [r2], #4\n cmp r0, r3\n blo 1b\n"
                   : "+r"(l), "+r"(to), "+r"(one), "+r"(two), "+r"(four)
                   : "r"(place), "r"(last)
                   : "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory");
    planes[0] = one, planes[1] = two, planes[2] = four;
    return to;
}
#else
EK_INLINE uint32_t *eights(const uint32_t *l, const uint32_t *end, uint32_t at, uint32_t *planes, uint32_t *to) {
    uint32_t one = planes[0], two = planes[1], four = planes[2];
#define WORD(i) (*(const uint32_t *)(l[i] + at))
    for (; l < end; l += 8) {
        uint32_t a, b, c, d;
        EK_FULL_ADDER(a, one, WORD(0), WORD(1));
        EK_FULL_ADDER(b, one, WORD(2), WORD(3));
        EK_FULL_ADDER(c, two, a, b);
        EK_FULL_ADDER(a, one, WORD(4), WORD(5));
        EK_FULL_ADDER(b, one, WORD(6), WORD(7));
        EK_FULL_ADDER(d, two, a, b);
        EK_FULL_ADDER(a, four, c, d);
        *to++ = a;
    }
    planes[0] = one, planes[1] = two, planes[2] = four;
    return to;
}
#endif

#if EK_SET == EK_MVE
#define ADD_VECTORS(h, l, a, b)                                            \
    do {                                                                   \
        const uint32x4_t a_ = (a), b_ = (b), u_ = veorq_u32(l, a_);        \
        (h) = veorq_u32(l, vandq_u32(u_, veorq_u32(l, b_)));               \
        (l) = veorq_u32(u_, b_);                                           \
    } while (0)
void ek_count(uint32_t *list, const uint32_t *end, uint32_t at, uint32_t *planes, uint32_t n_planes, uint32_t *carries) {
    (void)at; /* the addresses themselves move on */
    if (list == end) return;
    uint32_t *stop = eights(list, end, planes, carries);
    for (uint32_t i = 0; i < 12; i += 4) vst1q_u32(stop + i, vdupq_n_u32(0));
    uint32x4_t eight = vld1q_u32(planes + 12), sixteen = vld1q_u32(planes + 16);
    for (; carries < stop; carries += 16) {
        uint32x4_t a, b, c;
        ADD_VECTORS(a, eight, vld1q_u32(carries), vld1q_u32(carries + 4));
        ADD_VECTORS(b, eight, vld1q_u32(carries + 8), vld1q_u32(carries + 12));
        ADD_VECTORS(c, sixteen, a, b);
        for (uint32_t *q = planes + 20, *last = planes + 4 * n_planes; q < last; q += 4) {
            const uint32x4_t v = vld1q_u32(q);
            vst1q_u32(q, veorq_u32(v, c));
            c = vandq_u32(c, v);
        }
    }
    vst1q_u32(planes + 12, eight);
    vst1q_u32(planes + 16, sixteen);
}
#else
void ek_count(uint32_t *list, const uint32_t *end, uint32_t at, uint32_t *planes, uint32_t n_planes, uint32_t *carries) {
    if (list == end) return;
    uint32_t *stop = eights(list, end, at, planes, carries);
    stop[0] = stop[1] = stop[2] = 0;
    uint32_t eight = planes[3], sixteen = planes[4], next = planes[5], after = planes[6];
    for (; carries < stop; carries += 4) {
        uint32_t a, b, c;
        EK_FULL_ADDER(a, eight, carries[0], carries[1]);
        EK_FULL_ADDER(b, eight, carries[2], carries[3]);
        EK_FULL_ADDER(c, sixteen, a, b);
        a = next & c, next ^= c;
        c = after & a, after ^= a;
        for (uint32_t *q = planes + 7, *last = planes + n_planes; c && q < last; q++) {
            const uint32_t v = *q;
            *q = v ^ c;
            c &= v;
        }
    }
    planes[3] = eight, planes[4] = sixteen, planes[5] = next, planes[6] = after;
}
#endif

#define SWAP(x, y, d, mask)                              \
    do {                                                 \
        const uint32_t t_ = (((x) >> (d)) ^ (y)) & (mask); \
        (y) ^= t_;                                       \
        (x) ^= t_ << (d);                                \
    } while (0)

/* 8 x 8 bits in each byte of eight words. */
EK_INLINE void transpose_bytes(uint32_t *w) {
    uint32_t a = w[0], b = w[1], c = w[2], d = w[3], e = w[4], f = w[5], g = w[6], h = w[7];
    SWAP(a, e, 4, 0x0f0f0f0fu);
    SWAP(b, f, 4, 0x0f0f0f0fu);
    SWAP(c, g, 4, 0x0f0f0f0fu);
    SWAP(d, h, 4, 0x0f0f0f0fu);
    SWAP(a, c, 2, 0x33333333u);
    SWAP(b, d, 2, 0x33333333u);
    SWAP(e, g, 2, 0x33333333u);
    SWAP(f, h, 2, 0x33333333u);
    SWAP(a, b, 1, 0x55555555u);
    SWAP(c, d, 1, 0x55555555u);
    SWAP(e, f, 1, 0x55555555u);
    SWAP(g, h, 1, 0x55555555u);
    w[0] = a, w[1] = b, w[2] = c, w[3] = d, w[4] = e, w[5] = f, w[6] = g, w[7] = h;
}

void ek_transpose(uint32_t *w) {
    for (uint32_t *p = w, *end = w + 8; p < end; p++) {
        uint32_t a = p[0], b = p[8], c = p[16], d = p[24];
        SWAP(a, c, 16, 0xffffu);
        SWAP(b, d, 16, 0xffffu);
        SWAP(a, b, 8, 0xff00ffu);
        SWAP(c, d, 8, 0xff00ffu);
        p[0] = a, p[8] = b, p[16] = c, p[24] = d;
    }
    for (uint32_t *p = w, *end = w + 32; p < end; p += 8) transpose_bytes(p);
}

void ek_bytes(const uint32_t *planes, uint32_t n, uint32_t *w) {
    for (uint32_t i = 0; i < 8; i++) w[i] = i < n ? planes[i * EK_LANES] : 0;
    transpose_bytes(w);
}

void ek_numbers(const uint32_t *planes, uint32_t n, uint16_t *numbers) {
    uint32_t low[8], high[8];
    ek_bytes(planes, n, low);
    ek_bytes(planes + 8 * EK_LANES, n - 8 < 16 ? n - 8 : 0, high);
    for (uint32_t i = 0; i < 8; i++, numbers++) {
        const uint32_t l = low[i], h = high[i];
        numbers[0] = (uint16_t)((l & 0xffu) | (h & 0xffu) << 8);
        numbers[8] = (uint16_t)((l >> 8 & 0xffu) | (h & 0xff00u));
        numbers[16] = (uint16_t)((l >> 16 & 0xffu) | (h >> 8 & 0xff00u));
        numbers[24] = (uint16_t)(l >> 24 | (h >> 16 & 0xff00u));
    }
}
