/* 1-bit linear layers: the weights lie transposed, so that a word holds those of 32 outputs to one input, and 32 outputs are counted at once. Of the
 * inputs that are +1 and those that are -1 the fewer are visited: with P the visited weights that are +1, V = k - visited + 2 * P. */
#include "bits.h"

typedef struct {
    const ek_binary *p;
    uint32_t words, planes; /* of the outputs; of a count */
    int want;               /* +1 were visited */
    int plain;
} job;

/* 32 outputs: V >= first threshold, or V < second threshold. */
static uint32_t compared(const job *j, uint32_t word, const uint32_t *planes) {
    const uint32_t step = j->words, *t = (const uint32_t *)j->p->thresholds + (j->want ? 0 : j->planes * step) + word;
    uint32_t r = ~0u, q = j->planes;
    for (; q >= 2; q -= 2, planes += 2 * EK_LANES, t += 2 * step) {
        const uint32_t differs = planes[0] ^ t[0], more = planes[EK_LANES] ^ t[step];
        r = (planes[0] & differs) | (r & ~differs);
        r = (planes[EK_LANES] & more) | (r & ~more);
    }
    if (q) r = (planes[0] & (planes[0] ^ t[0])) | (r & ~(planes[0] ^ t[0]));
    return j->want ? r : ~r;
}

static void requantized(const job *j, uint32_t word, const uint32_t *planes, int8_t *y) {
    const ek_binary *p = j->p;
    const uint32_t first = 32 * word, left = p->out_c - first, n = left < 32 ? left : 32;
    const int32_t *base = p->base + (j->want ? first : p->out_c + first), *multiplier = p->multiplier + first, factor = j->want ? 2 : -2;
    const int8_t *shift = p->shift + first;
    uint16_t numbers[32];
    ek_numbers(planes, j->planes, numbers);
    y += first;
    for (uint32_t o = 0; o < n; o++) y[o] = ek_binary_finish(p, base[o] + factor * numbers[o], multiplier[o], shift[o], j->plain);
}

EK_NOINLINE void ek_binary_vectors(const ek_binary *p, const void *x, void *y, void *scratch) {
    const uint32_t k = p->in_c, in_words = (k + 31u) >> 5, words = (p->out_c + 31u) >> 5, rows = (uint32_t)p->out_h * p->out_w;
    job j = {p, words, p->planes, 0, p->multiplier ? ek_plain(p->shift, p->out_c, p->act_min, p->act_max) : 0};
    uint32_t *const zeros = scratch, *const carries = zeros + ((words + 3u) & ~3u), *const list = carries + (k / 16 + 8) * EK_LANES;
    const uint32_t *in = x;
    uint32_t *bits = y;
    int8_t *bytes = y;
    ek_fill((int8_t *)zeros, 0, 4 * ((words + 3u) & ~3u));
    for (uint32_t i = 0; i < rows; i++, in += in_words, bits += words, bytes += p->out_c) {
        uint32_t ones = 0;
        for (uint32_t w = 0; w < in_words; w++) ones += ek_ones(in[w]);
        j.want = 2 * ones <= k;
        uint32_t *end = list;
        for (uint32_t w = 0; w < in_words; w++)
            end = ek_list((j.want ? in[w] : ~in[w]) & ek_low(k - 32 * w), (uint32_t)p->weights + 128 * w * words, 4 * words, end);
        end = ek_fill_list(list, end, zeros);
        for (uint32_t word = 0; word < words; word += EK_LANES) {
            uint32_t planes[EK_MOST_PLANES * EK_LANES], c = j.want ? k - ones : ones;
            for (uint32_t q = 0; q < j.planes; q++, c >>= 1)
                for (uint32_t lane = 0; lane < EK_LANES; lane++) planes[q * EK_LANES + lane] = 0u - (c & 1u);
            ek_count(list, end, 4 * word, planes + EK_LANES, j.planes - 1u, carries);
            for (uint32_t lane = 0; lane < EK_LANES && word + lane < words; lane++)
                if (p->thresholds)
                    bits[word + lane] = compared(&j, word + lane, planes + lane);
                else
                    requantized(&j, word + lane, planes + lane, bytes);
        }
    }
}
