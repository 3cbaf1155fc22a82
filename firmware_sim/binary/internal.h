/* What the variants implement: the inner loop over up to 16 pixels and any number of blocks of 8 outputs. */
#ifndef EK_BINARY_INTERNAL_H
#define EK_BINARY_INTERNAL_H

#include "binary.h"

#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights and activations are little-endian"
#endif

enum { EKB_PIXELS = 16 };

/* Words of a pixel that lie one after the other make a row; there may be several, x_row bytes apart. With a mask, x counts only
 * where the mask has a bit. */
typedef struct {
    const uint8_t *x[EKB_PIXELS];
    const uint8_t *mask[EKB_PIXELS]; /* all NULL: none; pixels that share one have no bit of x outside it */
    const uint8_t *w;                /* block 0's first word */
    const uint8_t *tails;            /* 64 bytes a block: one more word behind the last row; or NULL */
    int32_t tail;                    /* bytes of it that count, where they also lie behind the block's words; or 0 */
    ptrdiff_t w_block, w_row, x_row; /* bytes */
    int32_t rows, words;
    int32_t ones[EKB_PIXELS]; /* acc = ones - 2 * number of differing bits; all alike where bits are wanted */
    uint8_t *bits[EKB_PIXELS]; /* one byte a block, bit = acc >= threshold; or NULL and */
    const int32_t *threshold;
    int32_t *acc;
    ptrdiff_t acc_pixel; /* int32s from one pixel to the next */
} ekb_job;

typedef struct {
    const char *name;
    int (*supported)(void);
    void (*tile)(const ekb_job *job, int32_t pixels, int32_t first_block, int32_t end_block);
    /* Kernels that want 64 outputs side by side have a layout of their own, made for each call: w is `words` 64-byte words of 8
     * blocks; may be NULL. The job's w, w_block and w_row are then of that layout, and threshold of 64 outputs each. */
    void (*wide_pack)(const uint8_t *const blocks[8], int32_t words, uint8_t *out);
    void (*wide_tile)(const ekb_job *job, int32_t pixels, int32_t first_block, int32_t end_block);
    int32_t wide_pixels; /* from this many pixels on it pays */
    /* out[i] = clamp(round((float)(acc[i] + bias[i]) * multiplier[i]) + zp), n a multiple of 8; sums fit int32 */
    void (*requantize)(const int32_t *acc, const int32_t *bias, const float *multiplier, int32_t n, const ekb_end *end, int8_t *out);
} ekb_variant;

extern const ekb_variant ekb_portable, ekb_popcnt, ekb_avx2, ekb_avx512, ekb_neon;

const ekb_variant *ekb_variant_in_use(void);

void ekb_requantize_portable(const int32_t *acc, const int32_t *bias, const float *multiplier, int32_t n, const ekb_end *end,
                             int8_t *out);

static inline uint64_t ekb_word(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* What becomes of 8 outputs' numbers of differing bits: one byte of bits, or 8 sums. */
static inline void ekb_store8(const ekb_job *job, int32_t p, int32_t block, const uint64_t differing[8])
{
    uint32_t byte = 0;
    for (int o = 0; o < 8; o++) {
        int32_t acc = job->ones[p] - 2 * (int32_t)differing[o];
        if (job->bits[0])
            byte |= (uint32_t)(acc >= job->threshold[8 * block + o]) << o;
        else
            job->acc[p * job->acc_pixel + 8 * block + o] = acc;
    }
    if (job->bits[0])
        job->bits[p][block] = (uint8_t)byte;
}

/* 8 rows of 8 bytes, transposed. */
#if defined(__SSE2__)
#include <emmintrin.h>
static inline void ekb_transpose8(uint64_t v[8])
{
    __m128i a[4], b[4];
    for (int i = 0; i < 4; i++)
        a[i] = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *)(v + 2 * i)), _mm_loadl_epi64((const __m128i *)(v + 2 * i + 1)));
    for (int i = 0; i < 2; i++) {
        b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        _mm_storeu_si128((__m128i *)(v + 4 * i), _mm_unpacklo_epi32(b[i], b[2 + i]));
        _mm_storeu_si128((__m128i *)(v + 4 * i + 2), _mm_unpackhi_epi32(b[i], b[2 + i]));
    }
}
#else
static inline void ekb_transpose8(uint64_t v[8])
{
    for (int i = 0; i < 4; i++) {
        uint64_t t = ((v[i] >> 32) ^ v[i + 4]) & 0x00000000ffffffffu;
        v[i] ^= t << 32;
        v[i + 4] ^= t;
    }
    for (int k = 0; k < 8; k += 4)
        for (int i = k; i < k + 2; i++) {
            uint64_t t = ((v[i] >> 16) ^ v[i + 2]) & 0x0000ffff0000ffffu;
            v[i] ^= t << 16;
            v[i + 2] ^= t;
        }
    for (int i = 0; i < 8; i += 2) {
        uint64_t t = ((v[i] >> 8) ^ v[i + 1]) & 0x00ff00ff00ff00ffu;
        v[i] ^= t << 8;
        v[i + 1] ^= t;
    }
}
#endif

#endif
