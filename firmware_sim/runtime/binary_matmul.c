/* Products of two packed matrices, a row of the first with every row of the second: attention's. Results are looked up by the number of signs that
 * agree, or, if a means 1 and 0, of b's ones among a's. */
#define EK_VECTORS
#include "bits.h"

static uint32_t ones_of(const uint32_t *x, uint32_t n) {
    uint32_t found = 0;
    for (; n; n--) found += ek_ones(*x++);
    return found;
}

/* Where the result for a number 0 lies, if the numbers are k agreements, or b's ones among `ones`. */
static const int8_t *results(const ek_binary_matmul *p, uint32_t ones) {
    const uint32_t gap = p->k - ones;
    return !p->a_unsigned ? p->table : gap & 1u ? p->table + p->k + 1 + (gap >> 1) : p->table + (gap >> 1);
}

#if EK_SET == EK_MVE
/* Words of four rows of b in a vector; the bits of each are counted in place. */
typedef struct {
    const uint32_t *a, *columns; /* word c of b's row n: columns[c * n_rows + n] */
    const int8_t *table;
    uint32_t k_words, n_rows;
    int is_unsigned;
} line;

/* Four words, readable behind the last row too. */
EK_INLINE uint32x4_t both(const line *l, const uint32_t *from, uint32x4_t a) {
    const uint32x4_t b = vld1q_u32(from);
    return l->is_unsigned ? vandq_u32(b, a) : veorq_u32(b, a);
}
/* Bits in each byte's nibbles, at most four. */
EK_INLINE uint32x4_t nibbles(uint32x4_t v) {
    const uint32x4_t fives = vdupq_n_u32(0x55555555u), threes = vdupq_n_u32(0x33333333u);
    v = vsubq_u32(v, vandq_u32(vshrq_n_u32(v, 1), fives));
    return vaddq_u32(vandq_u32(v, threes), vandq_u32(vshrq_n_u32(v, 2), threes));
}
EK_INLINE uint32x4_t bytes_sum(uint32x4_t v) { /* of nibbles of up to 15 */
    const uint32x4_t low = vdupq_n_u32(0x0f0f0f0fu);
    return vaddq_u32(vandq_u32(v, low), vandq_u32(vshrq_n_u32(v, 4), low));
}

/* Rows of one word, or two. */
EK_INLINE void short_line(line l, int8_t *y, int two) {
    const uint32x4_t first = vdupq_n_u32(l.a[0]), second = vdupq_n_u32(two ? l.a[1] : 0);
    const uint32_t *at = l.columns, *more = at + l.n_rows;
    int32_t left = (int32_t)l.n_rows;
    for (; left > 0; left -= 4, at += 4, more += 4, y += 4) {
        uint32x4_t v = nibbles(both(&l, at, first));
        if (two) v = vaddq_u32(v, nibbles(both(&l, more, second)));
        v = vshrq_n_u32(vmulq_n_u32(bytes_sum(v), 0x01010101u), 24);
        const int32x4_t found = vldrbq_gather_offset_s32(l.table, v);
        if (left >= 4)
            vstrbq_s32(y, found);
        else
            vstrbq_p_s32(y, found, vctp32q((uint32_t)left));
    }
}

static void long_line(const line *l, int8_t *y) {
    const uint32x4_t halves = vdupq_n_u32(0xff00ffu);
    for (uint32_t n = 0; n < l->n_rows; n += 4) {
        const mve_pred16_t lanes = vctp32q(l->n_rows - n);
        uint32x4_t total = vdupq_n_u32(0);
        for (uint32_t c = 0; c < l->k_words;) {
            const uint32_t end = c + 30 < l->k_words ? c + 30 : l->k_words; /* bytes hold 30 words' bits */
            uint32x4_t bytes = vdupq_n_u32(0);
            for (; c < end; c++) bytes = vaddq_u32(bytes, bytes_sum(nibbles(both(l, l->columns + c * l->n_rows + n, vdupq_n_u32(l->a[c])))));
            bytes = vaddq_u32(vandq_u32(bytes, halves), vandq_u32(vshrq_n_u32(bytes, 8), halves));
            total = vaddq_u32(total, vaddq_u32(vandq_u32(bytes, vdupq_n_u32(0xffffu)), vshrq_n_u32(bytes, 16)));
        }
        vstrbq_p_s32(y + n, vldrbq_gather_offset_z_s32(l->table, total, lanes), lanes);
    }
}

#define SHORT(name, two, without_signs)                                                    \
    static void name(const line *l, int8_t *y) {                                           \
        const line same = {l->a, l->columns, l->table, l->k_words, l->n_rows, without_signs}; \
        short_line(same, y, two);                                                          \
    }
SHORT(one_signed, 0, 0)
SHORT(one_unsigned, 0, 1)
SHORT(two_signed, 1, 0)
SHORT(two_unsigned, 1, 1)
static void (*const short_lines[2][2])(const line *, int8_t *) = {{one_signed, one_unsigned}, {two_signed, two_unsigned}};

EK_NOINLINE void ek_binary_matmul_s8(const ek_binary_matmul *p, const void *a, const void *b, int8_t *y, void *scratch) {
    const uint32_t k_words = (p->k + 31u) >> 5, n = p->n;
    uint32_t *const columns = scratch, *const flipped = columns + k_words * n + 4;
    const uint32_t *left = a, *right = b;
    for (uint32_t i = 0; i < p->batch; i++) {
        for (uint32_t r = 0; r < n; r++)
            for (uint32_t c = 0; c < k_words; c++) columns[c * n + r] = *right++;
        for (uint32_t m = 0; m < p->m; m++, left += k_words, y += n) {
            for (uint32_t c = 0; c < k_words; c++) flipped[c] = p->a_unsigned ? left[c] : ~left[c]; /* what agrees is 1, and the spare bits are */
            const int8_t *table = p->a_unsigned ? results(p, ones_of(left, k_words)) : p->table + p->k - 32 * k_words;
            const line l = {flipped, columns, table, k_words, n, p->a_unsigned};
            if (k_words > 2)
                long_line(&l, y);
            else
                short_lines[k_words - 1][p->a_unsigned](&l, y);
        }
    }
}
#else
/* The second matrix is turned round first, so that a word holds one bit of 32 of its rows, and 32 sums are counted at once in bit planes.
 *
 * For a row of a with A ones, and B the ones of a row of b: if +1 and -1 are meant, of a's ones and zeros the fewer are visited. P are b's ones among
 * the visited; planes start from 2^(planes - 1) - 1 - B and get 2 * P. Then k - A - B + 2 * P signs agree, or all but A - B + 2 * P. If a means 1
 * and 0, its ones are visited and P is what is looked up. */
/* Whether it is quicker to count the signs of one pair of rows after the other: with few rows of b, or short ones. Both sides are instructions for a
 * row of a, as counted on a Cortex-M4. */
static int one_by_one_pays(const ek_binary_matmul *p) {
    const uint32_t pair = 22 * ((p->k + 31u) >> 5) + 22, words = (p->n + 31u) >> 5;
    return p->n * pair < 6 * p->k + 40 + words * (400 + 3 * p->k);
}

typedef struct {
    const ek_binary_matmul *p;
    uint32_t k_words, words; /* of a row; of all rows of b */
    uint32_t *zeros, *carries, *list, *columns, *starts;
} job;

static void one_by_one(const job *j, const uint32_t *a, const uint32_t *b, int8_t *y) {
    const ek_binary_matmul *p = j->p;
    for (uint32_t m = 0; m < p->m; m++, a += j->k_words) {
        const int8_t *table = results(p, p->a_unsigned ? ones_of(a, j->k_words) : 0);
        const uint32_t *row = b;
        for (uint32_t n = 0; n < p->n; n++) {
            uint32_t found = 0;
            for (uint32_t i = 0; i < j->k_words; i++, row++) found += ek_ones(p->a_unsigned ? a[i] & *row : a[i] ^ *row);
            *y++ = table[p->a_unsigned ? found : p->k - found];
        }
    }
}

static void turn(const job *j, const uint32_t *b) {
    for (uint32_t w = 0; w < j->words; w++)
        for (uint32_t c = 0; c < j->k_words; c++) {
            uint32_t square[32], *to = j->columns + 32 * c * j->words + w;
            const uint32_t left = j->p->k - 32 * c, n = left < 32 ? left : 32, rows = 32 * w < j->p->n ? j->p->n - 32 * w : 0;
            for (uint32_t i = 0; i < 32; i++) square[i] = i < rows ? b[(32 * w + i) * j->k_words + c] : 0;
            ek_transpose(square);
            for (uint32_t i = 0; i < n; i++, to += j->words) *to = square[i];
        }
}

/* Planes of 2^(planes - 1) - 1 - B. */
static void start(const job *j) {
    const uint32_t n_planes = j->p->planes;
    uint32_t *to = j->list, *planes = j->starts;
    for (uint32_t c = 0; c < j->p->k; c++) *to++ = (uint32_t)(j->columns + c * j->words);
    to = ek_fill_list(j->list, to, j->zeros);
    ek_fill((int8_t *)planes, 0, 4 * n_planes * j->words);
    for (uint32_t word = 0; word < j->words; word++, planes += n_planes) {
        ek_count(j->list, to, 4 * word, planes, n_planes, j->carries);
        for (uint32_t i = 0; i < n_planes - 1; i++) planes[i] = ~planes[i];
    }
}

/* n of eight planes' numbers. */
static void looked_up(const uint32_t *planes, const int8_t *table, uint32_t flip, uint32_t n, int8_t *y) {
    uint32_t bytes[8];
    ek_bytes(planes, 8, bytes);
    if (n < 32) {
        for (uint32_t i = 0; i < n; i++) y[i] = table[((bytes[i & 7u] ^ flip) >> (i & 24u)) & 0xffu];
        return;
    }
    for (uint32_t i = 0; i < 8; i++, y++) {
        const uint32_t v = bytes[i] ^ flip;
        y[0] = table[v & 0xffu], y[8] = table[v >> 8 & 0xffu], y[16] = table[v >> 16 & 0xffu], y[24] = table[v >> 24];
    }
}

/* The results of a word of b's rows. */
static void finish(const job *j, const uint32_t *planes, const int8_t *table, uint32_t flip, uint32_t word, int8_t *y) {
    const uint32_t left = j->p->n - 32 * word, n = left < 32 ? left : 32, mask = (1u << j->p->planes) - 1;
    if (j->p->planes == 8) {
        looked_up(planes, table, flip, n, y + 32 * word);
        return;
    }
    uint16_t numbers[32];
    ek_numbers(planes, j->p->planes, numbers);
    y += 32 * word;
    for (uint32_t i = 0; i < n; i++) *y++ = table[(numbers[i] ^ flip) & mask];
}

/* One row of a with every row of b. */
static void row(const job *j, const uint32_t *a, int8_t *y) {
    const ek_binary_matmul *p = j->p;
    const uint32_t ones = ones_of(a, j->k_words), want = p->a_unsigned || 2 * ones <= p->k, half = 1u << (p->planes - 1u);
    const int8_t *table = results(p, ones);
    /* numbers are agreements + half - 1 - (k - A), or A + half - 1 less disagreements: then their complement is looked up */
    if (!p->a_unsigned) table += want ? (int32_t)(p->k - ones + 1 - half) : (int32_t)(p->k - ones - half);
    uint32_t *end = j->list, planes[EK_MOST_PLANES];
    for (uint32_t w = 0; w < j->k_words; w++)
        end = ek_list((want ? a[w] : ~a[w]) & ek_low(p->k - 32 * w), (uint32_t)(j->columns + 32 * w * j->words), 4 * j->words, end);
    end = ek_fill_list(j->list, end, j->zeros);
    for (uint32_t word = 0; word < j->words; word++) {
        const uint32_t *from = j->starts + word * p->planes, twice = !p->a_unsigned;
        for (uint32_t i = 0; i < p->planes; i += 2) planes[i] = twice ? from[i] : 0, planes[i + 1] = twice ? from[i + 1] : 0;
        ek_count(j->list, end, 4 * word, planes + twice, p->planes - twice, j->carries);
        finish(j, planes, table, want ? 0 : ~0u, word, y);
    }
}

EK_NOINLINE void ek_binary_matmul_s8(const ek_binary_matmul *p, const void *a, const void *b, int8_t *y, void *scratch) {
    const uint32_t words = (p->n + 31u) >> 5;
    job j = {p, (p->k + 31u) >> 5, words, scratch, 0, 0, 0, 0};
    j.carries = j.zeros + words;
    j.list = j.carries + p->k / 8 + 4;
    j.columns = j.list + p->k + 8;
    j.starts = j.columns + p->k * words;
    const uint32_t *left = a, *right = b;
    const int pairs = one_by_one_pays(p);
    for (uint32_t i = 0; i < p->batch; i++, left += p->m * j.k_words, right += p->n * j.k_words, y += p->m * p->n) {
        if (pairs) {
            one_by_one(&j, left, right, y);
            continue;
        }
        ek_fill((int8_t *)j.zeros, 0, 4 * words);
        turn(&j, right);
        if (!p->a_unsigned) start(&j);
        for (uint32_t m = 0; m < p->m; m++) row(&j, left + m * j.k_words, y + m * p->n);
    }
}
#endif
