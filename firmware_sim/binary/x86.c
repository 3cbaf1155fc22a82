/* x86-64: AVX-512 with VPOPCNTDQ; AVX2 with byte shuffles as tables; the POPCNT instruction. */
#include "internal.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,prefer-vector-width=512")))
#define AVX2 __attribute__((target("avx2,popcnt")))
#define POPCNT __attribute__((target("popcnt")))

/* ---- AVX-512: one 64-byte load is the same word of 8 outputs */

AVX512 INLINE void store512(const ekb_job *job, int p, int block, __m512i differing)
{
    __m256i twice = _mm256_slli_epi32(_mm512_cvtepi64_epi32(differing), 1);
    __m256i acc = _mm256_sub_epi32(_mm256_set1_epi32(job->ones[p]), twice);
    if (job->bits[0])
        job->bits[p][block] =
            (uint8_t)_mm256_cmpge_epi32_mask(acc, _mm256_loadu_si256((const __m256i *)(job->threshold + 8 * block)));
    else
        _mm256_storeu_si256((__m256i *)(job->acc + p * job->acc_pixel + 8 * block), acc);
}

AVX512 INLINE void run512(__m512i sum[8][4], const ekb_job *job, const uint8_t *w, ptrdiff_t w_block, ptrdiff_t x_at, int32_t words,
                          int first, const int P, const int G, const int masked)
{
    for (int32_t j = 0; j < words; j++) {
        __m512i wv[4];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
            wv[g] = _mm512_loadu_si512(w + g * w_block + 64 * (ptrdiff_t)j);
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
            ptrdiff_t at = x_at + 8 * (ptrdiff_t)j;
            __m512i xv = _mm512_set1_epi64((long long)ekb_word(job->x[first + p] + at));
            __m512i mv = masked ? _mm512_set1_epi64((long long)ekb_word(job->mask[first + p] + at)) : xv;
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                __m512i d = _mm512_xor_si512(xv, wv[g]);
                d = masked ? _mm512_and_si512(d, mv) : d;
                sum[p][g] = _mm512_add_epi64(sum[p][g], _mm512_popcnt_epi64(d));
            }
        }
    }
}

AVX512 INLINE void part512(const ekb_job *job, int first, int block, const int P, const int G, const int masked)
{
    __m512i sum[8][4];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
            sum[p][g] = _mm512_setzero_si512();
    const uint8_t *w = job->w + block * job->w_block;
    for (int32_t row = 0; row < job->rows; row++)
        run512(sum, job, w + row * job->w_row, job->w_block, row * job->x_row, job->words, first, P, G, masked);
    if (job->tails)
        run512(sum, job, job->tails + 64 * block, 64, 8 * (ptrdiff_t)job->words, 1, first, P, G, masked);
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
            store512(job, first + p, block + g, sum[p][g]);
}

#define PART512(P, G, M) \
    AVX512 static __attribute__((noinline)) void part512_##P##_##G##_##M(const ekb_job *job, int first, int block) \
    { \
        part512(job, first, block, P, G, M); \
    }
PART512(8, 2, 0) PART512(8, 1, 0) PART512(4, 2, 0) PART512(4, 1, 0) PART512(2, 2, 0) PART512(2, 1, 0) PART512(1, 4, 0)
PART512(1, 1, 0) PART512(4, 1, 1) PART512(1, 1, 1)

typedef void part(const ekb_job *, int, int);

static void sweep512(const ekb_job *job, int first, int32_t block, int32_t end, int G, part *several, part *one)
{
    for (; block + G <= end; block += G)
        several(job, first, block);
    for (; block < end; block++)
        one(job, first, block);
}

static void tile512(const ekb_job *job, int32_t pixels, int32_t block, int32_t end)
{
    int first = 0, left = pixels;
    if (job->mask[0]) {
        for (; left >= 4; left -= 4, first += 4)
            sweep512(job, first, block, end, 1, part512_4_1_1, part512_4_1_1);
        for (; left; left--, first++)
            sweep512(job, first, block, end, 1, part512_1_1_1, part512_1_1_1);
        return;
    }
    for (; left >= 8; left -= 8, first += 8)
        sweep512(job, first, block, end, 2, part512_8_2_0, part512_8_1_0);
    for (; left >= 4; left -= 4, first += 4)
        sweep512(job, first, block, end, 2, part512_4_2_0, part512_4_1_0);
    for (; left >= 2; left -= 2, first += 2)
        sweep512(job, first, block, end, 2, part512_2_2_0, part512_2_1_0);
    for (; left; left--, first++)
        sweep512(job, first, block, end, 4, part512_1_4_0, part512_1_1_0);
}

static int has512(void)
{
    return __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

/* ---- AVX2: bits of a nibble are looked up by a byte shuffle */

AVX2 INLINE void run256(__m256i sum[2][2], __m256i low[2][2], int *pending, const ekb_job *job, const uint8_t *w, ptrdiff_t x_at,
                        int32_t words, int first, const int P)
{
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    for (int32_t j = 0; j < words; j++) {
#pragma GCC unroll 2
        for (int p = 0; p < P; p++) {
            ptrdiff_t at = x_at + 8 * (ptrdiff_t)j;
            __m256i xv = _mm256_set1_epi64x((long long)ekb_word(job->x[first + p] + at));
            __m256i mv = job->mask[0] ? _mm256_set1_epi64x((long long)ekb_word(job->mask[first + p] + at)) : _mm256_set1_epi8(-1);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                __m256i wv = _mm256_loadu_si256((const __m256i *)(w + 64 * (ptrdiff_t)j + 32 * h));
                __m256i d = _mm256_and_si256(_mm256_xor_si256(xv, wv), mv);
                __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(d, nibble));
                __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(d, 4), nibble));
                low[p][h] = _mm256_add_epi8(low[p][h], _mm256_add_epi8(a, b));
            }
        }
        if (++*pending == 31) {
            *pending = 0;
            for (int p = 0; p < P; p++)
                for (int h = 0; h < 2; h++) {
                    sum[p][h] = _mm256_add_epi64(sum[p][h], _mm256_sad_epu8(low[p][h], zero));
                    low[p][h] = zero;
                }
        }
    }
}

AVX2 static void store256(const ekb_job *job, int p, int block, __m256i differing)
{
    __m256i acc = _mm256_sub_epi32(_mm256_set1_epi32(job->ones[p]), _mm256_slli_epi32(differing, 1));
    if (job->bits[0]) {
        __m256i less = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)(job->threshold + 8 * block)), acc);
        job->bits[p][block] = (uint8_t)~_mm256_movemask_ps(_mm256_castsi256_ps(less));
    } else {
        _mm256_storeu_si256((__m256i *)(job->acc + p * job->acc_pixel + 8 * block), acc);
    }
}

AVX2 INLINE void part256(const ekb_job *job, int first, int32_t block, int32_t end, const int P)
{
    for (; block < end; block++) {
        __m256i sum[2][2], low[2][2], zero = _mm256_setzero_si256();
        int pending = 0;
        for (int p = 0; p < 2; p++)
            sum[p][0] = sum[p][1] = low[p][0] = low[p][1] = zero;
        const uint8_t *w = job->w + block * job->w_block;
        for (int32_t row = 0; row < job->rows; row++)
            run256(sum, low, &pending, job, w + row * job->w_row, row * job->x_row, job->words, first, P);
        if (job->tails)
            run256(sum, low, &pending, job, job->tails + 64 * block, 8 * (ptrdiff_t)job->words, 1, first, P);
        for (int p = 0; p < P; p++) {
            __m256i a = _mm256_add_epi64(sum[p][0], _mm256_sad_epu8(low[p][0], zero));
            __m256i b = _mm256_add_epi64(sum[p][1], _mm256_sad_epu8(low[p][1], zero));
            __m256i both = _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
            store256(job, first + p, block, _mm256_permute4x64_epi64(both, 0xd8));
        }
    }
}

AVX2 static void tile256(const ekb_job *job, int32_t pixels, int32_t block, int32_t end)
{
    int32_t first = 0;
    for (; first + 2 <= pixels; first += 2)
        part256(job, first, block, end, 2);
    for (; first < pixels; first++)
        part256(job, first, block, end, 1);
}

/* Here the shuffle is indexed by WEIGHT nibbles and its table, chosen by a nibble of x, is bits differing from it: no xor, and 64
 * outputs a byte of x. A byte position has 64 bytes: low nibbles of outputs 0-31 | of 32-63 << 4, then the same of high nibbles. */

static const uint8_t differing[16][16] = {
#define ROW(x) {N(x, 0), N(x, 1), N(x, 2), N(x, 3), N(x, 4), N(x, 5), N(x, 6), N(x, 7), \
                N(x, 8), N(x, 9), N(x, 10), N(x, 11), N(x, 12), N(x, 13), N(x, 14), N(x, 15)}
#define N(x, w) ((((x) ^ (w)) & 1) + (((x) ^ (w)) >> 1 & 1) + (((x) ^ (w)) >> 2 & 1) + (((x) ^ (w)) >> 3))
    ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15),
#undef N
#undef ROW
};

AVX2 static void wide_pack256(const uint8_t *const blocks[8], int32_t words, uint8_t *out)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int32_t j = 0; j < words; j++, out += 512) {
        uint64_t t[8][8]; /* block, byte of the word */
        for (int g = 0; g < 8; g++) {
            memcpy(t[g], blocks[g] + 64 * (ptrdiff_t)j, 64);
            ekb_transpose8(t[g]);
        }
        for (int b = 0; b < 8; b++) {
            __m256i a = _mm256_set_epi64x((long long)t[3][b], (long long)t[2][b], (long long)t[1][b], (long long)t[0][b]);
            __m256i c = _mm256_set_epi64x((long long)t[7][b], (long long)t[6][b], (long long)t[5][b], (long long)t[4][b]);
            __m256i lows = _mm256_or_si256(_mm256_and_si256(a, nibble), _mm256_slli_epi16(_mm256_and_si256(c, nibble), 4));
            __m256i highs = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 4), nibble), _mm256_andnot_si256(nibble, c));
            _mm256_storeu_si256((__m256i *)(out + 64 * b), lows);
            _mm256_storeu_si256((__m256i *)(out + 64 * b + 32), highs);
        }
    }
}

/* int16 counts of 64 outputs of a pixel: two registers of 32 bytes widened. */
AVX2 static void store_wide(const ekb_job *job, int p, int block, const __m256i sum[4])
{
    for (int half = 0; half < 2; half++) {
        __m256i low = sum[2 * half], high = sum[2 * half + 1];
        __m256i in_order[2] = {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
        uint32_t mask = 0;
        for (int k = 0; k < 4; k++) {
            __m128i eight = k & 1 ? _mm256_extracti128_si256(in_order[k >> 1], 1) : _mm256_castsi256_si128(in_order[k >> 1]);
            __m256i acc = _mm256_sub_epi32(_mm256_set1_epi32(job->ones[p]), _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 1));
            ptrdiff_t at = 64 * (ptrdiff_t)block + 32 * half + 8 * k;
            if (job->bits[0]) {
                __m256i less = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)(job->threshold + at)), acc);
                mask |= ((uint32_t)~_mm256_movemask_ps(_mm256_castsi256_ps(less)) & 255u) << 8 * k;
            } else {
                _mm256_storeu_si256((__m256i *)(job->acc + p * job->acc_pixel + at), acc);
            }
        }
        if (job->bits[0])
            memcpy(job->bits[p] + 8 * block + 4 * half, &mask, 4);
    }
}

AVX2 INLINE void wide_part256(const ekb_job *job, int first, int block, const int P)
{
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    __m256i sum[3][4], low[3][2];
#pragma GCC unroll 3
    for (int p = 0; p < P; p++)
        low[p][0] = low[p][1] = sum[p][0] = sum[p][1] = sum[p][2] = sum[p][3] = zero;
    int pending = 0;
    for (int32_t row = 0; row < job->rows; row++) {
        const uint8_t *w = job->w + block * job->w_block + row * job->w_row;
        int32_t bytes = 8 * job->words;
        for (int32_t j = 0; j < bytes; j++, w += 64) {
            __m256i w0 = _mm256_loadu_si256((const __m256i *)w), w1 = _mm256_loadu_si256((const __m256i *)(w + 32));
            __m256i l0 = _mm256_and_si256(w0, nibble), l1 = _mm256_and_si256(_mm256_srli_epi16(w0, 4), nibble);
            __m256i h0 = _mm256_and_si256(w1, nibble), h1 = _mm256_and_si256(_mm256_srli_epi16(w1, 4), nibble);
#pragma GCC unroll 3
            for (int p = 0; p < P; p++) {
                unsigned v = job->x[first + p][row * job->x_row + j];
                __m256i tl = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)differing[v & 15]));
                __m256i th = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)differing[v >> 4]));
                low[p][0] = _mm256_add_epi8(low[p][0], _mm256_add_epi8(_mm256_shuffle_epi8(tl, l0), _mm256_shuffle_epi8(th, h0)));
                low[p][1] = _mm256_add_epi8(low[p][1], _mm256_add_epi8(_mm256_shuffle_epi8(tl, l1), _mm256_shuffle_epi8(th, h1)));
            }
            if (++pending == 31) {
                pending = 0;
#pragma GCC unroll 3
                for (int p = 0; p < P; p++)
                    for (int k = 0; k < 2; k++) {
                        sum[p][2 * k] = _mm256_add_epi16(sum[p][2 * k], _mm256_unpacklo_epi8(low[p][k], zero));
                        sum[p][2 * k + 1] = _mm256_add_epi16(sum[p][2 * k + 1], _mm256_unpackhi_epi8(low[p][k], zero));
                        low[p][k] = zero;
                    }
            }
        }
    }
#pragma GCC unroll 3
    for (int p = 0; p < P; p++) {
        for (int k = 0; k < 2; k++) {
            sum[p][2 * k] = _mm256_add_epi16(sum[p][2 * k], _mm256_unpacklo_epi8(low[p][k], zero));
            sum[p][2 * k + 1] = _mm256_add_epi16(sum[p][2 * k + 1], _mm256_unpackhi_epi8(low[p][k], zero));
        }
        store_wide(job, first + p, block, sum[p]);
    }
}

AVX2 static void wide_tile256(const ekb_job *job, int32_t pixels, int32_t block, int32_t end)
{
    for (; block < end; block++) {
        int32_t first = 0;
        for (; first + 3 <= pixels; first += 3)
            wide_part256(job, first, block, 3);
        if (first + 2 <= pixels) {
            wide_part256(job, first, block, 2);
            first += 2;
        }
        if (first < pixels)
            wide_part256(job, first, block, 1);
    }
}

AVX2 static void requantize256(const int32_t *acc, const int32_t *bias, const float *multiplier, int32_t n, const ekb_end *end,
                               int8_t *out)
{
    const __m256 low = _mm256_set1_ps((float)(end->low - end->out_zp)), high = _mm256_set1_ps((float)(end->high - end->out_zp));
    const __m256i zp = _mm256_set1_epi32(end->out_zp);
    for (int32_t i = 0; i < n; i += 8) {
        __m256i sum = _mm256_add_epi32(_mm256_loadu_si256((const __m256i *)(acc + i)), _mm256_loadu_si256((const __m256i *)(bias + i)));
        __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(multiplier + i));
        v = _mm256_min_ps(_mm256_max_ps(v, low), high);
        __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(v), zp);
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((__m128i *)(out + i), _mm_packs_epi16(words, words));
    }
}

static int has256(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

/* ---- the POPCNT instruction */

POPCNT static void tile_popcnt(const ekb_job *job, int32_t pixels, int32_t block, int32_t end)
{
    for (; block < end; block++)
        for (int32_t p = 0; p < pixels; p++) {
            uint64_t counts[8] = {0};
            for (int32_t row = 0; row <= job->rows; row++) {
                const uint8_t *w = job->w + block * job->w_block + row * job->w_row, *x = job->x[p] + row * job->x_row;
                const uint8_t *m = job->mask[0] ? job->mask[p] + row * job->x_row : NULL;
                int32_t words = job->words;
                if (row == job->rows) {
                    if (!job->tails)
                        break;
                    w = job->tails + 64 * block, x = job->x[p] + 8 * words, m = m ? job->mask[p] + 8 * words : NULL, words = 1;
                }
                for (int32_t j = 0; j < words; j++, w += 64) {
                    uint64_t v = ekb_word(x + 8 * j), keep = m ? ekb_word(m + 8 * j) : ~(uint64_t)0;
#pragma GCC unroll 8
                    for (int o = 0; o < 8; o++)
                        counts[o] += (uint64_t)__builtin_popcountll((v ^ ekb_word(w + 8 * o)) & keep);
                }
            }
            ekb_store8(job, p, block, counts);
        }
}

static int has_popcnt(void) { return __builtin_cpu_supports("popcnt"); }

const ekb_variant ekb_avx512 = {"avx512", has512, tile512, NULL, NULL, 0, requantize256};
const ekb_variant ekb_avx2 = {"avx2", has256, tile256, wide_pack256, wide_tile256, 12, requantize256};
const ekb_variant ekb_popcnt = {"popcnt", has_popcnt, tile_popcnt, NULL, NULL, 0, ekb_requantize_portable};
#endif
