/* 1-bit convolutions: 32 output positions are counted at once.
 *
 * A band of positions is turned round first: for each tap and channel a word holds the signs at 32 positions (1 is +1; taps outside are 0). For an
 * output only the words are counted whose weight is +1, or only those whose weight is -1, whichever are fewer. With M the visited inputs that are
 * +1, N all inputs inside that are +1 and T the sum of the weights of the taps inside, acc = 2 * D - T, where D is 2 * M - N if +1 were visited and
 * N - 2 * M otherwise. Planes start from ~N, so they hold 2 * M - N - 1, with 2^(planes - 1) added. */
#include "bits.h"

typedef struct {
    uint32_t key;    /* the taps inside */
    int32_t value;   /* for the output at hand: the threshold of its planes, or what is added to its number */
} kind;

typedef struct {
    uint32_t word, kind, mask; /* lanes of a word whose windows are of one kind */
} part;

typedef struct {
    const ek_binary *p;
    const uint32_t *x;
    uint32_t in_words, in_n, each; /* words of a position; channels of a group and their words in a row of weights */
    uint32_t taps, k, band, planes;
    uint32_t first, n; /* positions of the band */
    uint32_t *zeros, *carries, *list, *end, *inputs, *ones, *tap_ones, *results;
    kind *kinds;
    part *parts;
    uint32_t n_kinds, n_parts;
    int want, plain;
} job;

static uint32_t kind_of(job *j, const ek_inside *at) {
    const uint32_t key = at->i0 | at->i1 << 8 | at->j0 << 16 | at->j1 << 24;
    uint32_t i = 0;
    while (i < j->n_kinds && j->kinds[i].key != key) i++;
    if (i == j->n_kinds) j->kinds[j->n_kinds++].key = key;
    return i;
}

/* One word of positions: where they lie, and the parts of the word. */
static void place(job *j, uint32_t word, uint32_t n, int32_t *ys, int32_t *xs) {
    const ek_binary *p = j->p;
    const uint32_t begin = j->n_parts;
    uint32_t oy = (j->first + 32 * word) / p->out_w, ox = (j->first + 32 * word) - oy * p->out_w;
    for (uint32_t lane = 0; lane < n; lane++) {
        ek_inside at;
        ek_inside_at(p, oy, ox, &at);
        ys[lane] = at.y, xs[lane] = at.x;
        if (++ox == p->out_w) ox = 0, oy++;
        const uint32_t found = kind_of(j, &at);
        part *one = j->parts + begin;
        while (one < j->parts + j->n_parts && one->kind != found) one++;
        if (one == j->parts + j->n_parts) *one = (part){word, found, 0}, j->n_parts++;
        one->mask |= 1u << lane;
    }
}

/* The signs of one tap and 32 channels at 32 positions, turned round. */
static void turn(job *j, uint32_t word, uint32_t tap_y, uint32_t tap_x, uint32_t n, const int32_t *ys, const int32_t *xs) {
    const ek_binary *p = j->p;
    const uint32_t tap = tap_y * p->kernel_w + tap_x;
    const int32_t dy = (int32_t)(tap_y * p->dilation_h), dx = (int32_t)(tap_x * p->dilation_w), height = p->in_h, width = p->in_w;
    for (uint32_t c = 0; c < j->in_words; c++) {
        uint32_t square[32], *to = j->inputs + (tap * p->in_c + 32 * c) * j->band + word;
        const uint32_t *x = j->x + c, left = p->in_c - 32 * c, channels = left < 32 ? left : 32;
        for (uint32_t lane = 0; lane < 32; lane++) {
            const int32_t iy = ys[lane] + dy, ix = xs[lane] + dx;
            square[lane] = lane < n && (uint32_t)iy < (uint32_t)height && (uint32_t)ix < (uint32_t)width ? x[(uint32_t)(iy * width + ix) * j->in_words] : 0;
        }
        ek_transpose(square);
        for (uint32_t i = 0; i < channels; i++, to += j->band) *to = square[i];
    }
}

static void begin_band(job *j) {
    const ek_binary *p = j->p;
    j->n_kinds = j->n_parts = 0;
    for (uint32_t word = 0; word < j->band; word++) {
        int32_t ys[32], xs[32];
        const uint32_t left = j->n > 32 * word ? j->n - 32 * word : 0, n = left < 32 ? left : 32;
        place(j, word, n, ys, xs);
        for (uint32_t i = 0; i < p->kernel_h; i++)
            for (uint32_t c = 0; c < p->kernel_w; c++) turn(j, word, i, c, n, ys, xs);
    }
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

/* The output's list, and its value for each kind of window. */
static void begin_output(job *j, uint32_t o, uint32_t group) {
    const ek_binary *p = j->p;
    const uint32_t *weights = (const uint32_t *)p->weights + o * j->taps * j->each;
    uint32_t total = 0;
    for (uint32_t tap = 0; tap < j->taps; tap++) {
        uint32_t n = 0;
        for (uint32_t i = 0; i < j->each; i++) n += ek_ones(weights[tap * j->each + i]);
        j->tap_ones[tap] = n, total += n;
    }
    j->want = 2 * total <= j->k;
    uint32_t *to = j->list;
    for (uint32_t tap = 0; tap < j->taps; tap++, weights += j->each)
        to = ek_list(weights, j->in_n, j->want, (uint32_t)(j->inputs + (tap * p->in_c + group * j->in_n) * j->band), 4 * j->band, to);
    j->end = ek_fill_list(j->list, to, j->zeros);
    const int32_t half = 1 << (j->planes - 1), k = (int32_t)j->k;
    for (kind *one = j->kinds; one < j->kinds + j->n_kinds; one++) {
        const uint32_t i0 = one->key & 0xffu, i1 = one->key >> 8 & 0xffu, j0 = one->key >> 16 & 0xffu, j1 = one->key >> 24;
        int32_t sum = -(int32_t)((i1 - i0) * (j1 - j0) * j->in_n);
        if ((i1 - i0) * (j1 - j0) == j->taps)
            sum += (int32_t)(2 * total);
        else
            for (uint32_t i = i0; i < i1; i++)
                for (uint32_t c = j0; c < j1; c++) sum += (int32_t)(2 * j->tap_ones[i * p->kernel_w + c]);
        if (p->thresholds) {
            const int32_t threshold = ek_clamp(((const int32_t *)p->thresholds)[o], -2 * k, 2 * k);
            const int32_t least = ek_clamp((threshold + sum + 1) >> 1, -k, k + 1); /* of D */
            one->value = j->want ? half + least - 1 : half - least;
        } else
            one->value = p->base[o] - sum + (j->want ? 2 - 2 * half : 2 * half - 2);
    }
}

/* Lanes whose number is at least t. */
static uint32_t at_least(const uint32_t *planes, uint32_t n, uint32_t t) {
    uint32_t r = ~0u;
    for (; n; n--, planes += EK_LANES, t >>= 1) r = t & 1u ? r & *planes : r | *planes;
    return r;
}

static void finish_bytes(const job *j, const part *one, uint32_t o, const uint16_t *numbers, int8_t *y) {
    const ek_binary *p = j->p;
    const int32_t base = j->kinds[one->kind].value, factor = j->want ? 2 : -2, multiplier = p->multiplier[o], shift = p->shift[o];
    y += (j->first + 32 * one->word) * p->out_c + o;
    for (uint32_t mask = one->mask; mask; mask >>= 1, numbers++, y += p->out_c)
        if (mask & 1u) *y = ek_binary_finish(p, base + factor * *numbers, multiplier, shift, j->plain);
}

static void output(job *j, uint32_t o, int8_t *y) {
    const part *one = j->parts, *const last = one + j->n_parts;
    const uint32_t *start = j->ones;
    for (uint32_t word = 0; word < j->band; word += EK_LANES, start += j->planes * EK_LANES) {
        uint32_t planes[EK_MOST_PLANES * EK_LANES];
        ek_copy((int8_t *)planes, (const int8_t *)start, 4 * j->planes * EK_LANES);
        ek_count(j->list, j->end, 4 * word, planes + EK_LANES, j->planes - 1, j->carries);
        for (uint32_t lane = 0; lane < EK_LANES; lane++) {
            uint16_t numbers[32];
            uint32_t r = 0;
            if (!j->p->thresholds) ek_numbers(planes + lane, j->planes, numbers);
            for (; one < last && one->word == word + lane; one++)
                if (j->p->thresholds)
                    r |= (at_least(planes + lane, j->planes, (uint32_t)j->kinds[one->kind].value) ^ (j->want ? 0 : ~0u)) & one->mask;
                else
                    finish_bytes(j, one, o, numbers, y);
            if (j->p->thresholds) j->results[(o & 31u) * j->band + word + lane] = r;
        }
    }
}

/* 32 outputs of the band's positions, turned round. */
static void store_words(const job *j, uint32_t o, uint32_t *y) {
    const uint32_t out_words = (j->p->out_c + 31u) >> 5, filled = (o & 31u) + 1;
    y += j->first * out_words + (o >> 5);
    for (uint32_t word = 0, left = j->n; left; word++) {
        uint32_t square[32];
        for (uint32_t i = 0; i < 32; i++) square[i] = i < filled ? j->results[i * j->band + word] : 0;
        ek_transpose(square);
        const uint32_t n = left < 32 ? left : 32;
        for (uint32_t i = 0; i < n; i++, y += out_words) *y = square[i];
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
    j->list = at, at += j->k + 8;
    j->tap_ones = at, at += j->taps;
    j->parts = (part *)(void *)at, at += 3 * 32 * j->band;
    j->kinds = (kind *)(void *)at;
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
            for (const uint32_t end = o + out_n; o < end; o++) {
                begin_output(&j, o, group);
                output(&j, o, y);
                if (p->thresholds && ((o & 31u) == 31 || o + 1 == p->out_c)) store_words(&j, o, y);
            }
        }
    }
}
