/* 1-bit convolutions: 32 output positions are counted at once.
 *
 * A band of positions is turned round first: for each tap and channel a word holds the signs at 32 positions (1 is +1; taps outside are 0). For an
 * output only the words are counted whose weight is +1, or only those whose weight is -1. Two outputs are counted together: first what both visit,
 * then what only one does; what neither visits is the largest of the four sets, so that three quarters of the words serve two outputs. With M the visited inputs that are
 * +1, N all inputs inside that are +1 and T the sum of the weights of the taps inside, acc = 2 * D - T, where D is 2 * M - N if +1 were visited and
 * N - 2 * M otherwise. Planes start from ~N, so they hold 2 * M - N - 1, with 2^(planes - 1) added. */
#include "bits.h"

typedef struct {
    uint32_t key;        /* the taps inside */
    int32_t value[2];    /* for the outputs at hand: the threshold of their planes, or what is added to their numbers */
    int32_t inside;      /* inputs inside */
    uint16_t corners[4]; /* of the taps inside, in job.sums */
} kind;

typedef struct {
    uint16_t word, kind, first, end; /* lanes of a word whose windows are of one kind */
} part;

typedef struct {
    uint32_t at; /* address of the input where the window begins */
    uint32_t position;
} spot;

typedef struct {
    const ek_binary *p;
    const uint32_t *x;
    uint32_t in_words, in_n, each; /* words of a position; channels of a group and their words in a row of weights */
    uint32_t taps, k, band, planes;
    uint32_t first, n; /* positions of the band */
    uint32_t *zeros, *carries, *inputs, *ones, *sums, *results;
    uint32_t *list, *ends[3]; /* what both outputs visit, what the first does, what the second does */
    kind *kinds;
    part *parts;
    spot *spots; /* of the band's lanes: positions sorted by kind, so that few words have windows of more than one */
    uint32_t n_kinds, n_parts;
    int want[2], plain;
} job;

static uint32_t kind_of(job *j, const ek_inside *at) {
    const uint32_t key = at->i0 | at->i1 << 8 | at->j0 << 16 | at->j1 << 24;
    uint32_t i = 0;
    while (i < j->n_kinds && j->kinds[i].key != key) i++;
    if (i == j->n_kinds) {
        const uint32_t row = j->p->kernel_w + 1u, above = at->i0 * row, below = at->i1 * row;
        const uint32_t corners[4] = {above + at->j0, above + at->j1, below + at->j0, below + at->j1};
        kind *new = j->kinds + j->n_kinds++;
        *new = (kind){key, {0, 0}, (int32_t)((at->i1 - at->i0) * (at->j1 - at->j0) * j->in_n), {0, 0, 0, 0}};
        for (uint32_t c = 0; c < 4; c++) new->corners[c] = (uint16_t)corners[c];
    }
    return i;
}

/* The kind of each position of the band; how many there are of each. */
static void find_kinds(job *j, uint16_t *found) {
    const ek_binary *p = j->p;
    const int32_t reach = (p->kernel_w - 1) * p->dilation_w;
    uint32_t oy = j->first / p->out_w, ox = j->first - oy * p->out_w;
    for (uint32_t left = j->n; left;) {
        ek_inside at;
        ek_inside_at(p, oy, ox, &at);
        const uint32_t kind = kind_of(j, &at);
        uint32_t run = 1; /* windows with all their columns inside are alike */
        if (at.x >= 0 && at.x + reach < p->in_w) run = (uint32_t)(p->in_w - 1 - reach - at.x) / p->stride_w + 1;
        if (run > p->out_w - ox) run = p->out_w - ox;
        if (run > left) run = left;
        j->kinds[kind].value[0] += (int32_t)run;
        left -= run, ox += run;
        for (; run; run--) *found++ = (uint16_t)kind;
        if (ox == p->out_w) ox = 0, oy++;
    }
}

/* Lanes to positions, sorted by kind; parts of words. */
static void sort_positions(job *j) {
    const ek_binary *p = j->p;
    uint16_t *found = (uint16_t *)(void *)j->results;
    j->n_kinds = j->n_parts = 0;
    find_kinds(j, found);
    uint32_t start = 0;
    for (uint32_t i = 0; i < j->n_kinds; i++) {
        const uint32_t end = start + (uint32_t)j->kinds[i].value[0];
        j->kinds[i].value[0] = (int32_t)start;
        while (start < end) {
            const uint32_t word = start >> 5, stop = 32 * word + 32 < end ? 32 * word + 32 : end;
            j->parts[j->n_parts++] = (part){(uint16_t)word, (uint16_t)i, (uint16_t)(start & 31u), (uint16_t)(stop - 32 * word)};
            start = stop;
        }
    }
    uint32_t oy = j->first / p->out_w, ox = j->first - oy * p->out_w;
    const uint32_t step = 4 * j->in_words, right = p->stride_w * step;
    for (uint32_t i = j->first, end = i + j->n; i < end; oy++, ox = 0) {
        const int32_t y = (int32_t)(oy * p->stride_h) - p->pad_top, x = (int32_t)(ox * p->stride_w) - p->pad_left;
        uint32_t at = (uint32_t)j->x + (uint32_t)(y * p->in_w + x) * step;
        for (; ox < p->out_w && i < end; ox++, i++, at += right) j->spots[j->kinds[*found++].value[0]++] = (spot){at, i};
    }
}

/* The signs of one tap and 32 channels at the positions of a word, turned round: `one` is the word's first part. */
static void turn(job *j, const part *one, uint32_t tap_y, uint32_t tap_x) {
    const ek_binary *p = j->p;
    const uint32_t word = one->word, tap = tap_y * p->kernel_w + tap_x;
    const part *const last = j->parts + j->n_parts;
    uint32_t move = (tap_y * p->dilation_h * p->in_w + tap_x * p->dilation_w) * 4 * j->in_words;
    const spot *const spots = j->spots + 32 * word;
    for (uint32_t c = 0; c < j->in_words; c++, move += 4) {
        uint32_t square[32], *to = j->inputs + (tap * p->in_c + 32 * c) * j->band + word, *put = square;
        const uint32_t left = p->in_c - 32 * c, channels = left < 32 ? left : 32, step = j->band;
        for (const part *part = one; part < last && part->word == word; part++) {
            const uint32_t key = j->kinds[part->kind].key;
            const int in = tap_y >= (key & 0xffu) && tap_y < (key >> 8 & 0xffu) && tap_x >= (key >> 16 & 0xffu) && tap_x < key >> 24;
            const spot *spot = spots + part->first;
            uint32_t *const end = square + part->end;
            if (!in)
                while (put < end) *put++ = 0;
            for (; put + 4 <= end; put += 4, spot += 4) {
                put[0] = *(const uint32_t *)(spot[0].at + move), put[1] = *(const uint32_t *)(spot[1].at + move);
                put[2] = *(const uint32_t *)(spot[2].at + move), put[3] = *(const uint32_t *)(spot[3].at + move);
            }
            for (; put < end; spot++) *put++ = *(const uint32_t *)(spot->at + move);
        }
        while (put < square + 32) *put++ = 0;
        ek_transpose(square);
        const uint32_t *from = square, *const end = square + channels;
        for (; from + 4 <= end; from += 4, to += 4 * step) to[0] = from[0], to[step] = from[1], to[2 * step] = from[2], to[3 * step] = from[3];
        for (; from < end; to += step) *to = *from++;
    }
}

static void begin_band(job *j) {
    const ek_binary *p = j->p;
    sort_positions(j);
    for (const part *one = j->parts, *last = one + j->n_parts; one < last; one++)
        if (one->first == 0)
            for (uint32_t i = 0; i < p->kernel_h; i++)
                for (uint32_t c = 0; c < p->kernel_w; c++) turn(j, one, i, c);
}

/* ~N for each word of the band. */
static void begin_group(job *j, uint32_t group) {
    uint32_t *planes = j->ones, *to = j->list;
    for (uint32_t tap = 0; tap < j->taps; tap++) {
        const uint32_t *in = j->inputs + (tap * j->p->in_c + group * j->in_n) * j->band;
        for (uint32_t c = 0; c < j->in_n; c++, in += j->band) *to++ = (uint32_t)in;
    }
    to = ek_fill_list(j->list, to, j->zeros);
    for (uint32_t word = 0; word < j->band; word += EK_LANES, planes += j->planes * EK_LANES) {
        ek_fill((int8_t *)planes, 0, 4 * j->planes * EK_LANES);
        ek_count(j->list, to, 4 * word, planes, j->planes, j->carries);
        for (uint32_t i = 0; i < (j->planes - 1) * EK_LANES; i++) planes[i] = ~planes[i];
    }
}

/* How many weights of an output are +1: of all taps above and to the left of each corner between taps; and in all. */
static uint32_t count_weights(const job *j, const uint32_t *weights, uint32_t *sums) {
    const uint32_t row = j->p->kernel_w + 1u;
    for (uint32_t c = 0; c < row; c++) *sums++ = 0;
    for (uint32_t i = 0; i < j->p->kernel_h; i++) {
        uint32_t n = 0;
        *sums++ = 0;
        for (uint32_t c = 1; c < row; c++, sums++) {
            for (uint32_t w = 0; w < j->each; w++) n += ek_ones(*weights++);
            *sums = sums[-(int32_t)row] + n;
        }
    }
    return sums[-1];
}

/* The values of an output for each kind of window. */
static void value_output(const job *j, uint32_t o, uint32_t which, const uint32_t *sums) {
    const ek_binary *p = j->p;
    const int32_t half = 1 << (j->planes - 1), k = (int32_t)j->k, want = j->want[which];
    const int32_t threshold = p->thresholds ? ek_clamp(((const int32_t *)p->thresholds)[o], -2 * k, 2 * k) + 1 : 0;
    const int32_t base = p->thresholds ? 0 : p->base[o] + (want ? 2 - 2 * half : 2 * half - 2);
    for (kind *one = j->kinds, *end = one + j->n_kinds; one < end; one++) {
        const uint16_t *c = one->corners;
        const int32_t sum = (int32_t)(2 * (sums[c[3]] - sums[c[2]] - sums[c[1]] + sums[c[0]])) - one->inside;
        if (p->thresholds) {
            const int32_t least = ek_clamp((threshold + sum) >> 1, -k, k + 1); /* of D */
            one->value[which] = want ? half + least - 1 : half - least;
        } else
            one->value[which] = base - sum;
    }
}

/* The list of the words whose bit is set both in a ^ flip_a and b ^ flip_b, filled up. */
EK_INLINE uint32_t *list_both(const job *j, uint32_t group, const uint32_t *a, uint32_t flip_a, const uint32_t *b, uint32_t flip_b, uint32_t *list) {
    const uint32_t *in = j->inputs + group * j->in_n * j->band;
    uint32_t *to = list;
    for (uint32_t tap = 0; tap < j->taps; tap++, in += j->p->in_c * j->band)
        for (uint32_t w = 0; w < j->each; w++)
            to = ek_list((*a++ ^ flip_a) & (*b++ ^ flip_b) & ek_low(j->in_n - 32 * w), (uint32_t)(in + 32 * w * j->band), 4 * j->band, to);
    return ek_fill_list(list, to, j->zeros);
}

/* Lists and values of output o, and of the next one if there are two. */
static void begin_outputs(job *j, uint32_t o, uint32_t group, int two) {
    const uint32_t row = j->taps * j->each, *a = (const uint32_t *)j->p->weights + o * row, *b = a + row;
    uint32_t *const sums = j->sums, *const more = sums + (j->p->kernel_h + 1u) * (j->p->kernel_w + 1u);
    const uint32_t total = count_weights(j, a, sums), other = two ? count_weights(j, b, more) : 0;
    if (!two) {
        j->want[0] = 2 * total <= j->k;
        value_output(j, o, 0, sums);
        j->ends[0] = j->ends[1] = j->ends[2] = list_both(j, group, a, j->want[0] ? 0 : ~0u, a, j->want[0] ? 0 : ~0u, j->list);
        return;
    }
    uint32_t both = 0, most = 0;
    for (uint32_t i = 0; i < row; i++) both += ek_ones(a[i] & b[i]);
    /* of the four pairs of signs the most frequent one is left out */
    const uint32_t sets[4] = {j->k + both - total - other, other - both, total - both, both};
    for (uint32_t i = 1; i < 4; i++)
        if (sets[i] > sets[most]) most = i;
    j->want[0] = !(most & 2u), j->want[1] = !(most & 1u);
    value_output(j, o, 0, sums);
    value_output(j, o + 1, 1, more);
    const uint32_t flip_a = j->want[0] ? 0 : ~0u, flip_b = j->want[1] ? 0 : ~0u;
    j->ends[0] = list_both(j, group, a, flip_a, b, flip_b, j->list);
    j->ends[1] = list_both(j, group, a, flip_a, b, ~flip_b, j->ends[0]);
    j->ends[2] = list_both(j, group, a, ~flip_a, b, flip_b, j->ends[1]);
}

/* Lanes whose number is at least t; n is even. */
EK_INLINE uint32_t at_least(const uint32_t *planes, uint32_t n, uint32_t t) {
    uint32_t r = ~0u;
#if EK_SET == EK_PORTABLE
    for (; n; n--, planes += EK_LANES, t >>= 1) r = t & 1u ? r & *planes : r | *planes;
#else
    uint32_t v, w;
    __asm("1: ldr %[v], [%[p]], %[step]\n ldr %[w], [%[p]], %[step]\n lsrs %[t], #1\n ite cs\n andcs %[r], %[v]\n orrcc %[r], %[v]\n"
          "lsrs %[t], #1\n ite cs\n andcs %[r], %[w]\n orrcc %[r], %[w]\n subs %[n], #2\n bne 1b\n"
          : [p] "+r"(planes), [n] "+r"(n), [t] "+r"(t), [r] "+r"(r), [v] "=&r"(v), [w] "=&r"(w)
          : [step] "i"(4 * EK_LANES)
          : "cc", "memory");
#endif
    return r;
}

static void finish_bytes(const job *j, const part *one, uint32_t o, uint32_t which, const uint16_t *numbers, int8_t *y) {
    const ek_binary *p = j->p;
    const int32_t base = j->kinds[one->kind].value[which], factor = j->want[which] ? 2 : -2, multiplier = p->multiplier[o], shift = p->shift[o];
    const spot *spot = j->spots + 32 * one->word + one->first;
    const uint16_t *n = numbers + one->first, *const end = numbers + one->end;
    const uint32_t channels = p->out_c;
    y += o;
#if EK_SET != EK_PORTABLE
    if (j->plain && shift >= -16) {
        const int32_t round = ek_short_round(2 * p->out_zp + 1, shift), right = -shift;
        for (; n < end; n++, spot++) y[spot->position * channels] = ek_short(base + factor * *n, multiplier, round, right);
        return;
    }
#endif
    for (; n < end; n++, spot++) y[spot->position * channels] = ek_binary_finish(p, base + factor * *n, multiplier, shift, 0);
}

/* One word of one output, from its first part on; returns the first part of the next word. */
EK_INLINE const part *finish(job *j, const part *one, uint32_t o, uint32_t which, const uint32_t *planes, int8_t *y) {
    const part *const last = j->parts + j->n_parts;
    const uint32_t word = one->word;
    if (j->p->thresholds) {
        uint32_t r = at_least(planes, j->planes, (uint32_t)j->kinds[one->kind].value[which]);
        for (one++; one < last && one->word == word; one++) {
            const uint32_t before = (1u << one->first) - 1; /* the lanes of the parts before */
            r = (r & before) | (at_least(planes, j->planes, (uint32_t)j->kinds[one->kind].value[which]) & ~before);
        }
        j->results[(o & 31u) * j->band + word] = j->want[which] ? r : ~r;
    } else {
        uint16_t numbers[32];
        ek_numbers(planes, j->planes, numbers);
        for (; one < last && one->word == word; one++) finish_bytes(j, one, o, which, numbers, y);
    }
    return one;
}

EK_INLINE void copy_planes(uint32_t *to, const uint32_t *from, uint32_t n) {
    for (const uint32_t *end = from + n; from < end; from += 2, to += 2) to[0] = from[0], to[1] = from[1];
}

static void outputs(job *j, uint32_t o, int two, int8_t *y) {
    const part *one = j->parts;
    const uint32_t *start = j->ones, words = (j->n + 31u) >> 5, n = j->planes * EK_LANES;
    for (uint32_t word = 0; word < words; word += EK_LANES, start += n) {
        uint32_t first[EK_MOST_PLANES * EK_LANES], second[EK_MOST_PLANES * EK_LANES];
        copy_planes(first, start, n);
        ek_count(j->list, j->ends[0], 4 * word, first + EK_LANES, j->planes - 1, j->carries);
        if (two) {
            copy_planes(second, first, n);
            ek_count(j->ends[0], j->ends[1], 4 * word, first + EK_LANES, j->planes - 1, j->carries);
            ek_count(j->ends[1], j->ends[2], 4 * word, second + EK_LANES, j->planes - 1, j->carries);
        }
        for (uint32_t lane = 0; lane < EK_LANES && word + lane < words; lane++) {
            const part *next = finish(j, one, o, 0, first + lane, y);
            if (two) finish(j, one, o + 1, 1, second + lane, y);
            one = next;
        }
    }
}

/* 32 outputs of the band's positions, turned round. */
static void store_words(const job *j, uint32_t o, uint32_t *y) {
    const uint32_t out_words = (j->p->out_c + 31u) >> 5, filled = (o & 31u) + 1;
    const spot *spots = j->spots;
    y += o >> 5;
    for (uint32_t word = 0, left = j->n; left; word++) {
        uint32_t square[32];
        for (uint32_t i = 0; i < 32; i++) square[i] = i < filled ? j->results[i * j->band + word] : 0;
        ek_transpose(square);
        const uint32_t n = left < 32 ? left : 32;
        for (uint32_t i = 0; i < n; i++, spots++) y[spots->position * out_words] = square[i];
        left -= n;
    }
}

/* Words of 32 positions in a band: all bands alike, within EK_BAND_BYTES. */
static uint32_t band_words(const ek_binary *p, uint32_t taps) {
    const uint32_t room = EK_BAND_BYTES / (4 * taps * p->in_c * EK_LANES), most = room ? room * EK_LANES : EK_LANES;
    const uint32_t all = ((uint32_t)p->out_h * p->out_w + 31u) >> 5, whole = (all + EK_LANES - 1) / EK_LANES * EK_LANES;
    const uint32_t bands = (whole + most - 1) / most;
    return ((whole + bands - 1) / bands + EK_LANES - 1) / EK_LANES * EK_LANES;
}

/* Of windows: for each axis no more than outputs, or pairs of a first and a last tap. */
static uint32_t most_kinds(const ek_binary *p, uint32_t band) {
    const uint32_t rows = (p->kernel_h + 1u) * (p->kernel_h + 2u) / 2, columns = (p->kernel_w + 1u) * (p->kernel_w + 2u) / 2;
    const uint32_t n = (rows < p->out_h ? rows : p->out_h) * (columns < p->out_w ? columns : p->out_w);
    return n < 32 * band ? n : 32 * band;
}

static void begin(job *j, uint32_t *at) {
    const ek_binary *p = j->p;
    j->in_words = (p->in_c + 31u) >> 5, j->in_n = p->in_c / p->groups, j->each = (j->in_n + 31u) >> 5;
    j->taps = (uint32_t)p->kernel_h * p->kernel_w, j->k = j->taps * j->in_n, j->band = band_words(p, j->taps), j->planes = p->planes;
    j->plain = p->multiplier ? ek_plain(p->shift, p->out_c, p->act_min, p->act_max) : 0;
    j->inputs = at, at += j->taps * p->in_c * j->band;
    j->zeros = at, at += j->band;
    j->ones = at, at += j->planes * j->band;
    j->results = at, at += 32 * j->band;
    j->carries = at, at += (j->k / 8 + 8) * EK_LANES;
    j->list = at, at += j->k + 24;
    j->sums = at, at += 2 * (p->kernel_h + 1u) * (p->kernel_w + 1u);
    j->spots = (spot *)(void *)at, at += 2 * 32 * j->band;
    const uint32_t kinds = most_kinds(p, j->band);
    j->kinds = (kind *)(void *)at, at += 6 * kinds;
    j->parts = (part *)(void *)at;
    ek_fill((int8_t *)j->zeros, 0, 4 * j->band);
}

EK_NOINLINE void ek_binary_planes(const ek_binary *p, const void *x, void *y, void *scratch) {
    const uint32_t positions = (uint32_t)p->out_h * p->out_w, out_n = p->out_c / p->groups;
    job j;
    j.p = p, j.x = x;
    begin(&j, scratch);
    for (j.first = 0; j.first < positions; j.first += 32 * j.band) {
        const uint32_t left = positions - j.first;
        j.n = left < 32 * j.band ? left : 32 * j.band;
        begin_band(&j);
        for (uint32_t o = 0, group = 0; group < p->groups; group++) {
            begin_group(&j, group);
            for (const uint32_t end = o + out_n; o < end;) {
                const int two = o + 1 < end && (o & 31u) != 31; /* both in one word of the output */
                begin_outputs(&j, o, group, two);
                outputs(&j, o, two, y);
                o += two ? 2 : 1;
                if (p->thresholds && ((o & 31u) == 0 || o == p->out_c)) store_words(&j, o - 1, y);
            }
        }
    }
}
