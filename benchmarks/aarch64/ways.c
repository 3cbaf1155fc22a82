/* Four ways to count a 1-bit layer, bare: packed signs in, bits out, nothing around them. A second call is counted, from counted() to finished().
 *
 * Argument: the way. Standard input: 6 int32s (places, inputs and outputs, both multiples of 64, bytes of x, of the weights, of the result), then
 * x (places rows), weights, thresholds (int32, outputs). Weights of "sliced" lie transposed: a row of outputs for each input; those of the others in
 * the order of binary.h. Standard output: the result. */
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t places, in, out, sizes[3];
} header;

typedef struct {
    header h;
    uint8_t *x, *w, *y;
    int32_t *threshold;
    void *scratch;
} layer;

static inline uint8x16_t load(const uint8_t *p) { return vld1q_u8(p); }
static inline uint8x16_t both(const uint8_t *p) { return vreinterpretq_u8_u64(vld1q_dup_u64((const uint64_t *)(const void *)p)); }

static inline uint8_t byte_of(uint16x8_t set)
{
    const uint16x8_t place = {1, 2, 4, 8, 16, 32, 64, 128};
    return (uint8_t)vaddvq_u16(vandq_u16(set, place));
}

/* bit = in - 2 * differing >= threshold, 8 outputs */
static inline uint8_t bits_of(const layer *l, int32_t o, int16x8_t differing)
{
    const int32x4_t in = vdupq_n_s32(l->h.in), a = vld1q_s32(l->threshold + o), b = vld1q_s32(l->threshold + o + 4);
    const int16x8_t most = vqshrn_high_n_s32(vqshrn_n_s32(vqsubq_s32(in, a), 1), vqsubq_s32(in, b), 1);
    return byte_of(vcgeq_s16(most, differing));
}

/* Bytes of four registers, two outputs each, to 8 sums. */
static inline int16x8_t sums_of(const uint8x16_t low[4])
{
    return vreinterpretq_s16_u16(vpaddlq_u8(vpaddq_u8(vpaddq_u8(low[0], low[1]), vpaddq_u8(low[2], low[3]))));
}

typedef uint8_t block_of(const layer *l, int32_t o, const uint8_t *w, const uint8x16_t *x, int32_t words);

/* A way for every place and block of 8 outputs; a place's words stay in registers. */
static inline __attribute__((always_inline)) void every(const layer *l, const int32_t N, block_of *way)
{
    const int32_t out = l->h.out;
    for (int32_t p = 0; p < l->h.places; p++) {
        const uint8_t *w = l->w;
        uint8_t *y = l->y + out / 8 * p;
        uint8x16_t x[8];
#pragma GCC unroll 8
        for (int32_t n = 0; n < N; n++)
            x[n] = both(l->x + 8 * (N * p + n));
        for (int32_t o = 0; o < out; o += 8, w += 64 * N)
            *y++ = way(l, o, w, x, N);
    }
}
#define INLINE static inline __attribute__((always_inline))
#define BY_WORDS(name) static void name(const layer *l) { if (l->h.in == 256) every(l, 4, name##_block); else every(l, 5, name##_block); }

/* CNT of what differs, added in bytes: what the library does. */
INLINE uint8_t count_block(const layer *l, int32_t o, const uint8_t *w, const uint8x16_t *x, int32_t words)
{
    uint8x16_t low[4];
#pragma GCC unroll 8
    for (int32_t n = 0; n < words; n++) {
        const uint8x16x4_t v = vld1q_u8_x4(w + 64 * n);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            const uint8x16_t d = vcntq_u8(veorq_u8(v.val[r], x[n]));
            low[r] = n ? vaddq_u8(low[r], d) : d;
        }
    }
    return bits_of(l, o, sums_of(low));
}
BY_WORDS(count)

/* Of three words the sums and the carries are counted, by full adders of EOR, EOR and BSL. */
INLINE uint8_t carry_block(const layer *l, int32_t o, const uint8_t *w, const uint8x16_t *x, int32_t words)
{
    const uint8x16x4_t v[3] = {vld1q_u8_x4(w), vld1q_u8_x4(w + 64), vld1q_u8_x4(w + 128)};
    uint8x16_t low[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        const uint8x16_t a = veorq_u8(v[0].val[r], x[0]), b = veorq_u8(v[1].val[r], x[1]), c = veorq_u8(v[2].val[r], x[2]);
        const uint8x16_t u = veorq_u8(a, b), twice = vcntq_u8(vbslq_u8(u, c, a));
        low[r] = vaddq_u8(vcntq_u8(veorq_u8(u, c)), vaddq_u8(twice, twice));
    }
#pragma GCC unroll 4
    for (int32_t n = 3; n < words; n++) {
        const uint8x16x4_t more = vld1q_u8_x4(w + 64 * n);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            low[r] = vaddq_u8(low[r], vcntq_u8(veorq_u8(more.val[r], x[n])));
    }
    return bits_of(l, o, sums_of(low));
}
BY_WORDS(carry)

#ifdef __ARM_FEATURE_DOTPROD
/* CNT, then UDOT with twos: sums of 32 bits, which need no more widening. */
INLINE uint8_t dot_block(const layer *l, int32_t o, const uint8_t *w, const uint8x16_t *x, int32_t words)
{
    const uint8x16_t two = vdupq_n_u8(2);
    uint32x4_t low[4] = {vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0), vdupq_n_u32(0)};
#pragma GCC unroll 8
    for (int32_t n = 0; n < words; n++) {
        const uint8x16x4_t v = vld1q_u8_x4(w + 64 * n);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            low[r] = vdotq_u32(low[r], vcntq_u8(veorq_u8(v.val[r], x[n])), two);
    }
    const int32x4_t in = vdupq_n_s32(l->h.in);
    const int32x4_t a = vreinterpretq_s32_u32(vpaddq_u32(low[0], low[1])), b = vreinterpretq_s32_u32(vpaddq_u32(low[2], low[3]));
    const uint32x4_t first = vcgeq_s32(vsubq_s32(in, vld1q_s32(l->threshold + o)), a);
    const uint32x4_t second = vcgeq_s32(vsubq_s32(in, vld1q_s32(l->threshold + o + 4)), b);
    return byte_of(vuzp1q_u16(vreinterpretq_u16_u32(first), vreinterpretq_u16_u32(second)));
}
BY_WORDS(dot)
#endif

/* One full adder a bit: l becomes the sum of l, a and b. */
static inline uint8x16_t add3(uint8x16_t *l, uint8x16_t a, uint8x16_t b)
{
    const uint8x16_t u = veorq_u8(*l, a), carry = vbslq_u8(u, b, a);
    *l = veorq_u8(u, b);
    return carry;
}

enum { PLANES = 10 };

/* What the Cortex-M kernel does: of a place's inputs the rarer sign is visited, 128 outputs are counted at once in bit planes, and compared
 * with thresholds that lie in planes too (made here once, as at export). */
static void sliced(const layer *l)
{
    const int32_t in = l->h.in, out = l->h.out, row = out / 8;
    const uint8_t **list = l->scratch;
    uint8_t *zeros = (uint8_t *)l->scratch + 8 * (in + 32), *tables = zeros + row;
    static int made;
    static uint16_t places[256][8];
    static uint8_t number[256];
    if (!made) {
        made = 1;
        for (int32_t v = 0; v < 256; v++)
            for (int32_t i = 0; i < 8; i++)
                if (v >> i & 1)
                    places[v][number[v]++] = (uint16_t)(i * row);
        memset(zeros, 0, (size_t)row);
        memset(tables, 0, (size_t)(2 * PLANES * row));
        for (int32_t o = 0; o < out; o++) {
            int32_t ones = 0;
            for (int32_t k = 0; k < in; k++)
                ones += l->w[k * row + o / 8] >> (o & 7) & 1;
            /* differing = visited inputs' +1 weights ...: want: d = a + ones - 2 P, else d = (in - a) + (in - ones) - 2 Q' with Q' the -1 weights there */
            const int32_t most = (in - l->threshold[o]) >> 1;
            /* want: 2 P >= a + ones - most; a is added to the counter as in - a, so n = 2 P + in - a >= in + ones - most */
            /* else: d = a + ones - 2 (ones - Q) = a - ones + 2 Q <= most: n = 2 Q + a < most + ones + 1 */
            const int32_t t[2] = {in + ones - most, most + ones + 1};
            for (int32_t q = 0; q < PLANES; q++)
                for (int32_t i = 0; i < 2; i++) {
                    const int32_t v = t[i] < 0 ? 0 : t[i] > 1023 ? 1023 : t[i];
                    tables[(i * PLANES + q) * row + o / 8] |= (uint8_t)((v >> q & 1) << (o & 7));
                }
        }
    }
    for (int32_t p = 0; p < l->h.places; p++) {
        const uint64_t *x = (const uint64_t *)(const void *)(l->x + in / 8 * p);
        int32_t ones = 0;
        for (int32_t i = 0; i < in / 64; i++)
            ones += vaddv_u8(vcnt_u8(vcreate_u8(x[i])));
        const int want = 2 * ones <= in;
        const uint8_t **to = list;
        for (int32_t i = 0; i < in / 8; i++) { /* where a byte's ones are, from a table: eight are written, as many count */
            const uint8_t v = want ? ((const uint8_t *)x)[i] : (uint8_t)~((const uint8_t *)x)[i];
            const uint64x2_t base = vdupq_n_u64((uint64_t)(l->w + (ptrdiff_t)8 * i * row));
            const uint16x8_t moves = vld1q_u16(places[v]);
            const uint32x4_t low = vmovl_u16(vget_low_u16(moves)), high = vmovl_high_u16(moves);
            vst1q_u64((uint64_t *)to, vaddw_u32(base, vget_low_u32(low)));
            vst1q_u64((uint64_t *)to + 2, vaddw_high_u32(base, low));
            vst1q_u64((uint64_t *)to + 4, vaddw_u32(base, vget_low_u32(high)));
            vst1q_u64((uint64_t *)to + 6, vaddw_high_u32(base, high));
            to += number[v];
        }
        while ((to - list) & 15)
            *to++ = zeros;
        for (int32_t at = 0; at < row; at += 32) {
            const int32_t start = want ? in - ones : ones;
            uint8x16_t planes[2][PLANES];
#pragma GCC unroll 10
            for (int q = 0; q < PLANES; q++)
                planes[0][q] = planes[1][q] = vdupq_n_u8((uint8_t)-(start >> q & 1));
            for (const uint8_t **e = list; e < to; e += 16) {
                uint8x16_t fours[2][2], eights[2][2];
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
#pragma GCC unroll 2
                    for (int i = 0; i < 2; i++) {
                        const uint8_t **four = e + 8 * half + 4 * i;
                        uint8x16_t v[4][2];
#pragma GCC unroll 4
                        for (int k = 0; k < 4; k++) {
                            const uint8_t *from = four[k] + at;
                            v[k][0] = load(from), v[k][1] = load(from + 16);
                        }
#pragma GCC unroll 2
                        for (int c = 0; c < 2; c++) {
                            const uint8x16_t a = add3(&planes[c][1], v[0][c], v[1][c]), b = add3(&planes[c][1], v[2][c], v[3][c]);
                            fours[i][c] = add3(&planes[c][2], a, b);
                        }
                    }
                    eights[half][0] = add3(&planes[0][3], fours[0][0], fours[1][0]);
                    eights[half][1] = add3(&planes[1][3], fours[0][1], fours[1][1]);
                }
#pragma GCC unroll 2
                for (int c = 0; c < 2; c++) {
                    uint8x16_t carry = add3(&planes[c][4], eights[0][c], eights[1][c]);
#pragma GCC unroll 5
                    for (int q = 5; q < PLANES; q++) {
                        const uint8x16_t v = planes[c][q];
                        planes[c][q] = veorq_u8(v, carry), carry = vandq_u8(v, carry);
                    }
                }
            }
            const uint8_t *t = tables + (want ? 0 : PLANES * row) + at;
#pragma GCC unroll 2
            for (int c = 0; c < 2; c++) {
                uint8x16_t r = vdupq_n_u8(255);
#pragma GCC unroll 10
                for (int q = 0; q < PLANES; q++)
                    r = vbslq_u8(veorq_u8(planes[c][q], load(t + q * row + 16 * c)), planes[c][q], r);
                vst1q_u8(l->y + row * p + at + 16 * c, want ? r : vmvnq_u8(r));
            }
        }
    }
}

static void *take(int32_t bytes)
{
    void *p = malloc((size_t)bytes + 64);
    if (bytes && fread(p, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(2);
    return p;
}

__attribute__((noinline)) void counted(void (*run)(const layer *), const layer *l) { run(l); __asm volatile("" ::: "memory"); }
__attribute__((noinline)) void finished(void) { __asm volatile("" ::: "memory"); }

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const layer *);
    } ways[] = {
        {"count", count},
        {"carry_save", carry},
        {"sliced", sliced},
#ifdef __ARM_FEATURE_DOTPROD
        {"dot", dot},
#endif
    };
    layer l;
    if (fread(&l.h, 4, 6, stdin) != 6)
        return 2;
    l.x = take(l.h.sizes[0]), l.w = take(l.h.sizes[1]), l.threshold = take(4 * l.h.out);
    l.y = calloc(1, (size_t)l.h.sizes[2]), l.scratch = calloc(1, 1 << 20);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++)
        if (argc > 1 && !strcmp(argv[1], ways[i].name)) {
            ways[i].run(&l);
            counted(ways[i].run, &l);
            finished();
            fwrite(l.y, 1, (size_t)l.h.sizes[2], stdout);
            return 0;
        }
    return 4;
}
