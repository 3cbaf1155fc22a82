/* The layers: which pixels, taps and blocks the inner loops get, and what becomes of the sums.
 *
 * Where a tap is whole words, the taps of a kernel row inside the image lie one after the other in x, and are read in place: pixels
 * with the same taps inside the image go together, and no tap outside is touched. Else their taps are copied together first, with a
 * mask where some are outside. */
#include "internal.h"

#include <stdlib.h>

typedef struct {
    const ekb_variant *variant;
    const uint8_t *weight, *last, *tails; /* `last`: the last block, filled up to 8 outputs, where it has fewer */
    uint8_t *wide;                        /* full blocks in the variant's own layout, 64 outputs each */
    int32_t outputs, full, rest, wide_blocks, words, tail;
    ptrdiff_t bytes;
    int exact; /* acc + bias fits int32 */
    const ekb_end *end;
    const int32_t *threshold; /* filled up to whole blocks */
    int32_t *acc, *bias;
    float *multiplier;
    int8_t *integers, *turned; /* a pixel of integers; all of them, where the result has its pixels last */
    void *memory;
} layer;

/* Where the results of up to 16 pixels go. */
typedef struct {
    ptrdiff_t index[EKB_PIXELS];
    ptrdiff_t pixel; /* bytes of a packed one */
    int32_t first_output;    /* bit of the first output: that of the group */
} place;

static size_t up(size_t n) { return (n + 63) & ~(size_t)63; }

static void expand(const uint8_t *block, int32_t n, int32_t words, int32_t tail, uint8_t *full, uint8_t *last)
{
    for (int32_t j = 0; full && j < words; j++)
        memcpy(full + 64 * (ptrdiff_t)j, block + 8 * (ptrdiff_t)n * j, 8 * (size_t)n);
    for (int32_t o = 0; o < n && tail; o++)
        memcpy(last + 8 * o, block + 8 * (ptrdiff_t)n * words + tail * o, (size_t)tail);
}

/* Scratch of one group of a layer; `pixels` in all decide whether a layout of the variant's own pays. */
static int prepare(layer *l, int32_t outputs, int32_t bytes, int64_t sums, const uint8_t *weight, const ekb_end *end, int64_t pixels)
{
    memset(l, 0, sizeof *l);
    l->variant = ekb_variant_in_use();
    l->weight = weight, l->end = end, l->outputs = outputs, l->bytes = bytes;
    l->full = outputs / 8, l->rest = outputs % 8, l->words = bytes / 8, l->tail = bytes % 8;
    int32_t blocks = l->full + (l->rest != 0), words = l->words + (l->tail != 0);
    if (l->variant->wide_tile && pixels >= l->variant->wide_pixels && sums < 32768)
        l->wide_blocks = l->full / 8;
    size_t at_last = 0, at_tails = at_last + (l->rest ? up(64 * (size_t)l->words) : 0);
    size_t at_wide = at_tails + (l->tail ? up(64 * (size_t)blocks) : 0);
    size_t at_acc = at_wide + up(512 * (size_t)words * (size_t)l->wide_blocks);
    if (end->bits && !l->rest && at_acc == 0) { /* whole bytes, written by the kernel itself from what it is given */
        l->threshold = end->threshold;
        return 0;
    }
    size_t at_bias = at_acc + up(4 * EKB_PIXELS * 8 * (size_t)blocks), at_multiplier = at_bias + up(32 * (size_t)blocks);
    size_t at_integers = at_multiplier + up(32 * (size_t)blocks), size = at_integers + up(EKB_PIXELS * 8 * (size_t)blocks);
    uint8_t *m = l->memory = malloc(size + 64);
    if (!m)
        return -1;
    m = (uint8_t *)up((size_t)m);
    memset(m, 0, at_wide);
    l->acc = (int32_t *)(m + at_acc), l->bias = (int32_t *)(m + at_bias), l->multiplier = (float *)(m + at_multiplier);
    l->integers = (int8_t *)(m + at_integers);
    l->last = l->rest ? m + at_last : NULL;
    l->tails = l->tail ? m + at_tails : NULL;
    for (int32_t b = l->tail ? 0 : l->full; b < blocks; b++)
        expand(weight + 8 * l->bytes * b, b == l->full ? l->rest : 8, l->words, l->tail, b == l->full ? m + at_last : NULL,
               m + at_tails + 64 * (ptrdiff_t)b);
    if (l->wide_blocks) {
        l->wide = m + at_wide;
        for (int32_t b = 0; b < l->wide_blocks; b++) {
            const uint8_t *from[8], *tails[8];
            for (int g = 0; g < 8; g++)
                from[g] = weight + 8 * l->bytes * (8 * b + g), tails[g] = l->tails + (l->tail ? 64 * (8 * b + g) : 0);
            uint8_t *to = l->wide + 512 * (ptrdiff_t)words * b;
            l->variant->wide_pack(from, l->words, to);
            if (l->tail)
                l->variant->wide_pack(tails, 1, to + 512 * (ptrdiff_t)l->words);
        }
    }
    l->threshold = end->threshold;
    if (end->bits && l->rest) {
        for (int32_t o = 0; o < 8 * blocks; o++) /* no sum reaches the largest: bits behind the last output are 0 */
            l->bias[o] = o < outputs ? end->threshold[o] : INT32_MAX;
        l->threshold = l->bias;
    }
    if (!end->bits) {
        l->exact = 1;
        for (int32_t o = 0; o < 8 * blocks; o++) {
            l->bias[o] = o < outputs ? end->bias[o] : 0;
            l->multiplier[o] = o < outputs ? end->scale[o] / end->out_scale : 0;
            l->exact &= l->bias[o] <= INT32_MAX - sums && l->bias[o] >= INT32_MIN + sums;
        }
    }
    return 0;
}

/* Sums of these pixels for every output, to bits or to l->acc; the job has x, mask, rows, words, x_row, w_row and ones. */
static void sweep(const layer *l, ekb_job *job, int32_t pixels, ptrdiff_t first_word)
{
    const int32_t wide = job->mask[0] ? 0 : l->wide_blocks;
    if (wide) {
        const int32_t extra = l->tail != 0; /* x is filled up to words there */
        job->tails = NULL, job->w = l->wide + 512 * first_word, job->w_block = 512 * (ptrdiff_t)(l->words + extra);
        job->words += extra, job->w_row *= 8;
        l->variant->wide_tile(job, pixels, 0, wide);
        job->words -= extra, job->w_row /= 8;
    }
    job->tails = l->tails, job->tail = l->tail, job->w = l->weight + 64 * first_word, job->w_block = 8 * l->bytes;
    l->variant->tile(job, pixels, 8 * wide, l->full);
    if (l->rest) {
        job->tail = 0, job->w = l->last + 64 * first_word, job->w_block = 0;
        l->variant->tile(job, pixels, l->full, l->full + 1);
    }
}

static void pack_bits(const layer *l, const place *to, int32_t pixels)
{
    for (int32_t p = 0; p < pixels; p++) {
        uint8_t *out = l->end->bits + to->index[p] * to->pixel;
        const int32_t *acc = l->acc + p * 8 * (ptrdiff_t)(l->full + (l->rest != 0));
        for (int32_t o = 0; o < l->outputs; o++) { /* other groups may own bits of the same byte */
            int32_t at = to->first_output + o;
            out[at >> 3] = (uint8_t)((out[at >> 3] & ~(1u << (at & 7))) | (uint32_t)(acc[o] >= l->end->threshold[o]) << (at & 7));
        }
    }
}

static void finish(const layer *l, const place *to, int32_t pixels)
{
    if (l->end->bits) {
        pack_bits(l, to, pixels);
        return;
    }
    const ptrdiff_t stride = 8 * (ptrdiff_t)(l->full + (l->rest != 0));
    for (int32_t p = 0; p < pixels; p++) {
        int8_t *row = l->end->integers + to->index[p] * l->outputs;
        int8_t *out = l->turned ? l->turned + to->index[p] * stride : l->rest ? l->integers : row;
        (l->exact ? l->variant->requantize : ekb_requantize_portable)(l->acc + p * stride, l->bias, l->multiplier, (int32_t)stride,
                                                                      l->end, out);
        if (out == l->integers)
            memcpy(row, out, (size_t)l->outputs);
    }
}

/* (pixels, outputs) to (outputs, pixels), for one image. */
static void turn(const layer *l, const int8_t *from, ptrdiff_t pixels, int8_t *out)
{
    const ptrdiff_t stride = 8 * (ptrdiff_t)(l->full + (l->rest != 0));
    for (ptrdiff_t p = 0; p < pixels; p += 8)
        for (int32_t o = 0; o < l->outputs; o += 8) {
            uint64_t v[8] = {0};
            const int32_t n = l->outputs - o < 8 ? l->outputs - o : 8, m = pixels - p < 8 ? (int32_t)(pixels - p) : 8;
            for (int32_t i = 0; i < m; i++)
                memcpy(&v[i], from + (p + i) * stride + o, 8);
            ekb_transpose8(v);
            if (m == 8)
                for (int32_t k = 0; k < n; k++)
                    memcpy(out + (o + k) * pixels + p, &v[k], 8);
            else
                for (int32_t k = 0; k < n; k++)
                    memcpy(out + (o + k) * pixels + p, &v[k], (size_t)m);
        }
}

/* Up to 16 pixels with all their words. */
static void chunk(const layer *l, ekb_job *job, const place *to, int32_t pixels, ptrdiff_t first_word)
{
    int direct = l->end->bits && to->first_output % 8 == 0 && (to->first_output == 0 || l->rest == 0);
    job->acc = l->acc, job->acc_pixel = 8 * (ptrdiff_t)(l->full + (l->rest != 0));
    job->threshold = l->threshold;
    for (int32_t p = 0; p < pixels; p++)
        job->bits[p] = direct ? l->end->bits + to->index[p] * to->pixel + to->first_output / 8 : NULL;
    sweep(l, job, pixels, first_word);
    if (!direct)
        finish(l, to, pixels);
}

/* ---- convolution */

static void inside(int32_t at, int32_t size, int32_t kernel, int32_t dilation, int32_t *first, int32_t *end)
{
    for (*first = 0; *first < kernel && at + *first * dilation < 0; ++*first)
        ;
    for (*end = kernel; *end > *first && at + (*end - 1) * dilation >= size; --*end)
        ;
}

static int32_t same(const ekb_conv *s, int axis, int32_t from, int32_t size, int32_t out, int32_t *first, int32_t *end)
{
    int32_t a, b;
    inside(from * s->stride[axis] - s->padding[axis], size, s->kernel[axis], s->dilation[axis], first, end);
    for (from++; from < out; from++) {
        inside(from * s->stride[axis] - s->padding[axis], size, s->kernel[axis], s->dilation[axis], &a, &b);
        if (a != *first || b != *end)
            break;
    }
    return from;
}

/* Taps of a kernel that are inside the image, rows and columns. */
typedef struct {
    int32_t k0, k1, t0, t1;
} taps;

/* Channels of a group of a pixel, where they do not begin or end at a byte. */
static void copy_channels(uint8_t *to, const uint8_t *pixel, int32_t first, int32_t count)
{
    memset(to, 0, (size_t)(count + 7) / 8);
    for (int32_t i = 0; i < count; i++)
        to[i >> 3] |= (uint8_t)((pixel[(first + i) >> 3] >> ((first + i) & 7) & 1) << (i & 7));
}

/* Runs of 8 to 16 bytes, one for each of n kernel rows, for some pixels: calls of memcpy would take longer. */
static __attribute__((noinline)) void copy_runs(uint8_t *to, ptrdiff_t to_row, ptrdiff_t padded, const uint8_t *from, ptrdiff_t row,
                                                ptrdiff_t step, int32_t pixels, int32_t n, ptrdiff_t run)
{
    for (; pixels > 0; pixels--, to += padded, from += step) {
        uint8_t *out = to;
        const uint8_t *in = from;
        for (int32_t k = n; k > 0; k--, out += to_row, in += row) {
            uint64_t first = ekb_word(in), last = ekb_word(in + run - 8);
            memcpy(out, &first, 8);
            memcpy(out + run - 8, &last, 8);
        }
    }
}

/* The taps inside the image of one pixel, of which `from` is the first. */
static void gather(const ekb_conv *s, const taps *in, int32_t group, const uint8_t *from, uint8_t *patch)
{
    const int32_t count = s->channels / s->groups, first = group * count;
    const ptrdiff_t c = (s->channels + 7) / 8, row = s->dilation[0] * c * s->width, bytes = (count + 7) / 8;
    const ptrdiff_t patch_row = bytes * s->kernel[1], run = bytes * (in->t1 - in->t0);
    const int aligned = first % 8 == 0 && (count % 8 == 0 || s->groups == 1), one_run = c == bytes && s->dilation[1] == 1;
    patch += in->k0 * patch_row + in->t0 * bytes;
    for (int32_t k = in->k0; k < in->k1; k++, from += row, patch += patch_row) {
        if (aligned && one_run) {
            memcpy(patch, from, (size_t)run);
            continue;
        }
        for (ptrdiff_t t = 0; t < in->t1 - in->t0; t++) {
            const uint8_t *pixel = from + t * s->dilation[1] * c;
            if (aligned)
                memcpy(patch + t * bytes, pixel + first / 8, (size_t)bytes);
            else
                copy_channels(patch + t * bytes, pixel, first, count);
        }
    }
}

/* A rectangle of pixels of image n that have the same taps inside it; `patches`: 16 of them and a mask, or NULL, to read x in place. */
static void rectangle(const ekb_conv *s, const layer *l, const uint8_t *x, place *to, const int32_t h[2], const int32_t w[2],
                      const taps *in, int32_t n, int32_t group, uint8_t *patches)
{
    const int32_t count = s->channels / s->groups, across = in->t1 - in->t0;
    const ptrdiff_t c = (s->channels + 7) / 8, row = c * s->width, bytes = (count + 7) / 8;
    const ptrdiff_t padded = 8 * (ptrdiff_t)(l->words + (l->tail != 0)), first_word = (in->k0 * s->kernel[1] + in->t0) * bytes / 8;
    const int some = in->k1 > in->k0 && across > 0, all = in->k1 - in->k0 == s->kernel[0] && across == s->kernel[1];
    ekb_job job = {.rows = some ? in->k1 - in->k0 : 0, .words = (int32_t)(across * bytes / 8)};
    job.x_row = s->dilation[0] * row, job.w_row = 8 * c * s->kernel[1];
    uint8_t *mask = patches + EKB_PIXELS * padded;
    if (patches) {
        job.rows = 1, job.words = l->words;
        memset(patches, 0, (EKB_PIXELS + 1) * (size_t)padded);
        for (int32_t k = in->k0; k < in->k1 && some; k++)
            memset(mask + (k * s->kernel[1] + in->t0) * bytes, 255, (size_t)(across * bytes));
    }
    for (int32_t p = 0; p < EKB_PIXELS; p++)
        job.ones[p] = some ? (in->k1 - in->k0) * across * count : 0, job.mask[p] = patches && !all ? mask : NULL;
    const ptrdiff_t run = bytes * across, step = s->stride[1] * c, patch_row = bytes * s->kernel[1];
    const ptrdiff_t left = w[0] * s->stride[1] - s->padding[1] + in->t0 * s->dilation[1];
    const int short_runs = s->groups == 1 && s->dilation[1] == 1 && run >= 8 && run <= 16;
    int32_t pixels = 0;
    for (int32_t i = h[0]; i < h[1]; i++) {
        const ptrdiff_t top = i * s->stride[0] - s->padding[0] + in->k0 * s->dilation[0];
        const ptrdiff_t line = (n * (ptrdiff_t)s->out_height + i) * s->out_width;
        const uint8_t *from = some ? x + (n * (ptrdiff_t)s->height + top) * row + left * c : x;
        for (int32_t j = w[0], m; j < w[1]; j += m) {
            m = EKB_PIXELS - pixels < w[1] - j ? EKB_PIXELS - pixels : w[1] - j;
            uint8_t *patch = patches ? patches + pixels * padded : NULL;
            if (patches && some && short_runs)
                copy_runs(patch + in->k0 * patch_row + in->t0 * bytes, patch_row, padded, from, job.x_row, step, m, in->k1 - in->k0, run);
            for (int32_t p = 0; p < m && patches && some && !short_runs; p++)
                gather(s, in, group, from + p * step, patch + p * padded);
            for (int32_t p = 0; p < m; p++) {
                job.x[pixels + p] = patches ? patch + p * padded : from + (some ? p * step : 0);
                to->index[pixels + p] = line + j + p;
            }
            pixels += m, from += some ? m * step : 0;
            if (pixels == EKB_PIXELS || (i == h[1] - 1 && j + m == w[1])) {
                chunk(l, &job, to, pixels, patches ? 0 : first_word);
                pixels = 0;
            }
        }
    }
}

/* Where a tap is whole words, x is read in place. */
static int convolve(const ekb_conv *s, const layer *l, const uint8_t *x, place to, int32_t group)
{
    const int in_place = s->groups == 1 && (s->channels + 7) / 8 % 8 == 0 && (s->dilation[1] == 1 || s->kernel[1] == 1);
    uint8_t *patches = in_place ? NULL : calloc(EKB_PIXELS + 1, 8 * (size_t)(l->words + 1));
    if (!in_place && !patches)
        return -1;
    for (int32_t n = 0; n < s->batch; n++)
        for (int32_t h[2] = {0, 0}; h[0] < s->out_height; h[0] = h[1]) {
            taps in;
            h[1] = same(s, 0, h[0], s->height, s->out_height, &in.k0, &in.k1);
            for (int32_t w[2] = {0, 0}; w[0] < s->out_width; w[0] = w[1]) {
                w[1] = same(s, 1, w[0], s->width, s->out_width, &in.t0, &in.t1);
                rectangle(s, l, x, &to, h, w, &in, n, group, patches);
            }
        }
    free(patches);
    return 0;
}

int ekb_conv2d(const ekb_conv *s, const uint8_t *x, const uint8_t *weight, const ekb_end *end)
{
    const int32_t outputs = s->out_channels / s->groups, count = s->channels / s->groups, taps = s->kernel[0] * s->kernel[1];
    const int32_t bytes = taps * ((count + 7) / 8);
    const ptrdiff_t plane = (ptrdiff_t)s->out_height * s->out_width;
    if (end->bits && outputs % 8)
        memset(end->bits, 0, (size_t)(s->batch * plane) * (size_t)((s->out_channels + 7) / 8));
    for (int32_t group = 0, failed; group < s->groups; group++) {
        ekb_end own = *end;
        place to = {.pixel = (s->out_channels + 7) / 8};
        if (end->bits) {
            to.first_output = group * outputs;
            own.threshold += group * outputs;
        } else {
            own.integers += group * outputs * plane, own.scale += group * outputs, own.bias += group * outputs;
        }
        layer l;
        if (prepare(&l, outputs, bytes, (int64_t)taps * count, weight + (ptrdiff_t)group * outputs * bytes, &own, s->batch * plane))
            return -1;
        const ptrdiff_t stride = (outputs + 7) / 8 * 8;
        if (!end->bits && !(l.turned = malloc((size_t)(s->batch * plane * stride) + 8))) {
            free(l.memory);
            return -1;
        }
        failed = convolve(s, &l, x, to, group);
        for (int32_t n = 0; n < s->batch && l.turned; n++)
            turn(&l, l.turned + n * plane * stride, plane, own.integers + n * plane * s->out_channels);
        free(l.turned);
        free(l.memory);
        if (failed)
            return -1;
    }
    return 0;
}

/* ---- linear layer and matrix product */

/* Rows of x: signs, or with `ones` (bytes of 255) numbers 0 and 1. */
static int rows_of(const layer *l, int32_t rows, int32_t features, const uint8_t *x, const uint8_t *ones, ptrdiff_t first_row)
{
    const size_t padded = 8 * (size_t)(l->words + (l->tail != 0));
    uint8_t *copies = l->tail ? calloc(EKB_PIXELS, padded) : NULL;
    if (l->tail && !copies)
        return -1;
    place to = {.pixel = (l->outputs + 7) / 8};
    for (int32_t r = 0; r < rows; r += EKB_PIXELS) {
        ekb_job job = {.rows = 1, .words = l->words};
        int32_t n = rows - r < EKB_PIXELS ? rows - r : EKB_PIXELS;
        for (int32_t p = 0; p < n; p++) {
            const uint8_t *row = x + (r + p) * l->bytes;
            to.index[p] = first_row + r + p;
            if (l->tail)
                row = memcpy(copies + (size_t)p * padded, row, (size_t)l->bytes);
            job.x[p] = ones ? ones : row, job.mask[p] = ones ? row : NULL, job.ones[p] = ones ? 0 : features;
            for (ptrdiff_t i = 0; ones && i < l->bytes; i++)
                job.ones[p] += __builtin_popcount(row[i]);
        }
        chunk(l, &job, &to, n, 0);
    }
    free(copies);
    return 0;
}

int ekb_linear(int32_t rows, int32_t features, int32_t outputs, const uint8_t *x, const uint8_t *weight, const ekb_end *end)
{
    layer l;
    if (prepare(&l, outputs, (features + 7) / 8, features, weight, end, rows))
        return -1;
    int failed = rows_of(&l, rows, features, x, NULL, 0);
    free(l.memory);
    return failed;
}

void ekb_pack_weights(int32_t outputs, int32_t bytes, const uint8_t *rows, uint8_t *packed)
{
    const int32_t words = bytes / 8, tail = bytes % 8;
    for (int32_t first = 0; first < outputs; first += 8) {
        int32_t n = outputs - first < 8 ? outputs - first : 8;
        const uint8_t *from = rows + (ptrdiff_t)first * bytes;
        for (int32_t j = 0; j < words; j++)
            for (int32_t o = 0; o < n; o++, packed += 8)
                memcpy(packed, from + (ptrdiff_t)o * bytes + 8 * j, 8);
        for (int32_t o = 0; o < n; o++, packed += tail)
            memcpy(packed, from + (ptrdiff_t)o * bytes + 8 * words, (size_t)tail);
    }
}

int ekb_matmul(int32_t batch, int32_t m, int32_t n, int32_t features, int a_unsigned, const uint8_t *a, const uint8_t *b,
               const ekb_end *end)
{
    const int32_t bytes = (features + 7) / 8;
    const size_t packed_at = 8 * (size_t)n, ones_at = packed_at + (size_t)n * (size_t)bytes;
    uint8_t *memory = calloc(1, ones_at + (size_t)bytes + 8);
    if (!memory)
        return -1;
    float *scale = (float *)memory;
    for (int32_t i = 0; i < n; i++)
        scale[i] = *end->scale;
    memset(memory + ones_at, 255, (size_t)bytes + 8);
    ekb_end own = *end;
    own.bits = NULL, own.scale = scale, own.bias = (int32_t *)memory + n; /* zeros */
    int failed = 0;
    for (int32_t i = 0; i < batch && !failed; i++) {
        layer l;
        ekb_pack_weights(n, bytes, b + (ptrdiff_t)i * n * bytes, memory + packed_at);
        failed = prepare(&l, n, bytes, features, memory + packed_at, &own, m);
        if (!failed) {
            failed = rows_of(&l, m, features, a + (ptrdiff_t)i * m * bytes, a_unsigned ? memory + ones_at : NULL, (ptrdiff_t)i * m);
            free(l.memory);
        }
    }
    free(memory);
    return failed;
}
