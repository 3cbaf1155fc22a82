/* Which variant runs, and the one that every processor has. */
#include "internal.h"

#include <math.h>
#include <stdlib.h>

static int always(void) { return 1; }

/* Bits of a word summed within each byte: 0 to 8 in each of eight bytes. */
static inline uint64_t byte_counts(uint64_t v)
{
    v -= (v >> 1) & 0x5555555555555555u;
    v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
    return (v + (v >> 4)) & 0x0f0f0f0f0f0f0f0fu;
}

static inline uint64_t sum_of_bytes(uint64_t v)
{
    uint64_t pairs = (v & 0x00ff00ff00ff00ffu) + ((v >> 8) & 0x00ff00ff00ff00ffu); /* up to 31 * 8 in a byte, 8 bytes */
    return (pairs * 0x0001000100010001u) >> 48;
}

static void tile(const ekb_job *job, int32_t pixels, int32_t first_block, int32_t end_block)
{
    for (int32_t block = first_block; block < end_block; block++)
        for (int32_t p = 0; p < pixels; p++) {
            uint64_t counts[8] = {0}, bytes[8] = {0};
            int pending = 0;
            for (int32_t row = 0; row <= job->rows; row++) {
                const uint8_t *w = job->w + block * job->w_block + row * job->w_row, *x = job->x[p] + row * job->x_row;
                const uint8_t *m = job->mask[0] ? job->mask[p] + row * job->x_row : NULL;
                int32_t words = job->words;
                if (row == job->rows) { /* what is behind the last row */
                    if (!job->tails)
                        break;
                    w = job->tails + 64 * block, x = job->x[p] + 8 * words, m = m ? job->mask[p] + 8 * words : NULL, words = 1;
                }
                for (int32_t j = 0; j < words; j++) {
                    uint64_t v = ekb_word(x + 8 * j), keep = m ? ekb_word(m + 8 * j) : ~(uint64_t)0;
                    for (int o = 0; o < 8; o++)
                        bytes[o] += byte_counts((v ^ ekb_word(w + 64 * j + 8 * o)) & keep);
                    if (++pending == 31) {
                        for (int o = 0; o < 8; o++)
                            counts[o] += sum_of_bytes(bytes[o]), bytes[o] = 0;
                        pending = 0;
                    }
                }
            }
            for (int o = 0; o < 8; o++)
                counts[o] += sum_of_bytes(bytes[o]);
            ekb_store8(job, p, block, counts);
        }
}

void ekb_requantize_portable(const int32_t *acc, const int32_t *bias, const float *multiplier, int32_t n, const ekb_end *end,
                             int8_t *out)
{
    float low = (float)(end->low - end->out_zp), high = (float)(end->high - end->out_zp);
    for (int32_t i = 0; i < n; i++) {
        float v = (float)((int64_t)acc[i] + bias[i]) * multiplier[i];
        v = v < low ? low : v > high ? high : v; /* whole numbers: clamping before rounding gives the same */
        out[i] = (int8_t)(lrintf(v) + end->out_zp);
    }
}

const ekb_variant ekb_portable = {"portable", always, tile, NULL, NULL, 0, ekb_requantize_portable};

static const ekb_variant *const known[] = {
#if defined(__x86_64__)
    &ekb_avx512, &ekb_avx2, &ekb_popcnt,
#elif defined(__aarch64__)
    &ekb_neon,
#endif
    &ekb_portable,
};

static const ekb_variant *in_use;

int ekb_choose_isa(const char *name)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i]->supported() && (!name || !strcmp(known[i]->name, name))) {
            in_use = known[i];
            return 0;
        }
    return -1;
}

const ekb_variant *ekb_variant_in_use(void)
{
    if (!in_use && ekb_choose_isa(getenv("EDGEKIT_BINARY_ISA")))
        ekb_choose_isa(NULL);
    return in_use;
}

const char *ekb_isa(void) { return ekb_variant_in_use()->name; }
