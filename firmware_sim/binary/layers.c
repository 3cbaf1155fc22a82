/* The layers: which pixels, taps and blocks the inner loops get, and what becomes of the sums.
 *
 * Where a tap is whole words, the taps of a kernel row inside the image lie one after the other in x, and are read in place: pixels
 * with the same taps inside the image go together, and no tap outside is touched. Else the taps of up to 8 pixels are copied
 * together, with a mask where some are outside. */
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

/* Where the results of up to 8 pixels go. */
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
    job->tails = l->tails, job->w = l->weight + 64 * first_word, job->w_block = 8 * l->bytes;
    l->variant->tile(job, pixels, 8 * wide, l->full);
    if (l->rest) {
        job->w = l->last + 64 * first_word, job->w_block = 0;
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

/* Up to 8 pixels with all their words; `counted`: for each the number of x that count, where there is a mask. */
static void chunk(const layer *l, ekb_job *job, const place *to, int32_t pixels, ptrdiff_t first_word, const int32_t *counted)
{
    int direct = l->end->bits && !job->mask[0] && to->first_output % 8 == 0 && (to->first_output == 0 || l->rest == 0);
    job->acc = l->acc, job->acc_pixel = 8 * (ptrdiff_t)(l->full + (l->rest != 0));
    job->threshold = l->threshold;
    for (int32_t p = 0; p < pixels; p++)
        job->bits[p] = direct ? l->end->bits + to->index[p] * to->pixel + to->first_output / 8 : NULL;
    sweep(l, job, pixels, first_word);
    if (direct)
        return;
    for (int32_t p = 0; p < pixels && counted; p++)
        for (int32_t o = 0; o < job->acc_pixel; o++)
            l->acc[p * job->acc_pixel + o] += counted[p];
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

/* Taps of whole words, read in place: rectangles of pixels with the same taps inside the image. */
static void in_place(const ekb_conv *s, const layer *l, const uint8_t *x, place to)
{
    const ptrdiff_t c = (s->channels + 7) / 8, row = c * s->width, image = row * s->height;
    const ptrdiff_t plane = (ptrdiff_t)s->out_height * s->out_width;
    for (int32_t n = 0; n < s->batch; n++)
        for (int32_t h = 0, h_end, k0, k1; h < s->out_height; h = h_end) {
            h_end = same(s, 0, h, s->height, s->out_height, &k0, &k1);
            for (int32_t w = 0, w_end, t0, t1; w < s->out_width; w = w_end) {
                w_end = same(s, 1, w, s->width, s->out_width, &t0, &t1);
                ekb_job job = {.rows = t1 > t0 ? k1 - k0 : 0, .words = (int32_t)((t1 - t0) * c / 8)};
                job.x_row = s->dilation[0] * row, job.w_row = 8 * c * s->kernel[1];
                job.ones = job.rows * (t1 - t0) * s->channels;
                int32_t pixels = 0;
                for (int32_t i = h; i < h_end; i++)
                    for (int32_t j = w; j < w_end; j++) {
                        ptrdiff_t top = i * s->stride[0] - s->padding[0] + k0 * s->dilation[0];
                        ptrdiff_t left = j * s->stride[1] - s->padding[1] + t0 * s->dilation[1];
                        job.x[pixels] = x + n * image + (job.rows ? top * row + left * c : 0);
                        to.index[pixels++] = n * plane + i * s->out_width + j;
                        if (pixels == EKB_PIXELS || (i == h_end - 1 && j == w_end - 1)) {
                            chunk(l, &job, &to, pixels, (k0 * s->kernel[1] + t0) * c / 8, NULL);
                            pixels = 0;
                        }
                    }
            }
        }
}

/* Channels of a group of a pixel, where they do not begin or end at a byte. */
static void copy_channels(uint8_t *to, const uint8_t *pixel, int32_t first, int32_t count)
{
    memset(to, 0, (size_t)(count + 7) / 8);
    for (int32_t i = 0; i < count; i++)
        to[i >> 3] |= (uint8_t)((pixel[(first + i) >> 3] >> ((first + i) & 7) & 1) << (i & 7));
}

/* The taps of one pixel, and a mask with ones where they are inside the image; gives the number of channels inside. */
static int32_t gather(const ekb_conv *s, const uint8_t *image, int32_t group, int32_t i, int32_t j, uint8_t *patch, uint8_t *mask)
{
    const int32_t count = s->channels / s->groups, bytes = (count + 7) / 8, first = group * count;
    const ptrdiff_t c = (s->channels + 7) / 8, row = c * s->width;
    const int aligned = first % 8 == 0 && (count % 8 == 0 || s->groups == 1);
    int32_t k0, k1, t0, t1, top = i * s->stride[0] - s->padding[0], left = j * s->stride[1] - s->padding[1];
    inside(top, s->height, s->kernel[0], s->dilation[0], &k0, &k1);
    inside(left, s->width, s->kernel[1], s->dilation[1], &t0, &t1);
    for (int32_t k = k0; k < k1 && t1 > t0; k++) {
        const uint8_t *from = image + (top + k * s->dilation[0]) * row + (left + t0 * s->dilation[1]) * c;
        ptrdiff_t at = (ptrdiff_t)(k * s->kernel[1] + t0) * bytes;
        memset(mask + at, 255, (size_t)(t1 - t0) * (size_t)bytes);
        if (aligned && c == bytes && s->dilation[1] == 1) {
            memcpy(patch + at, from, (size_t)(t1 - t0) * (size_t)bytes);
            continue;
        }
        for (int32_t t = t0; t < t1; t++, at += bytes, from += s->dilation[1] * c)
            if (aligned)
                memcpy(patch + at, from + first / 8, (size_t)bytes);
            else
                copy_channels(patch + at, from, first, count);
    }
    return t1 > t0 ? (k1 - k0) * (t1 - t0) * count : 0;
}

static int gathered(const ekb_conv *s, const layer *l, const uint8_t *x, place to, int32_t group)
{
    const ptrdiff_t row = (ptrdiff_t)((s->channels + 7) / 8) * s->width, plane = (ptrdiff_t)s->out_height * s->out_width;
    const size_t padded = 8 * (size_t)(l->words + 1);
    uint8_t *patches = malloc(2 * EKB_PIXELS * padded), *masks = patches + EKB_PIXELS * padded;
    if (!patches)
        return -1;
    int32_t counted[EKB_PIXELS], pixels = 0, all = s->kernel[0] * s->kernel[1] * (s->channels / s->groups), whole = 1;
    const int64_t last = (int64_t)s->batch * plane;
    for (int64_t at = 0; at < last; at++) {
        int32_t n = (int32_t)(at / plane), i = (int32_t)(at % plane / s->out_width), j = (int32_t)(at % s->out_width);
        if (pixels == 0) {
            memset(patches, 0, 2 * EKB_PIXELS * padded);
            whole = 1;
        }
        uint8_t *patch = patches + (size_t)pixels * padded, *mask = masks + (size_t)pixels * padded;
        counted[pixels] = gather(s, x + n * row * s->height, group, i, j, patch, mask);
        whole &= counted[pixels] == all;
        to.index[pixels++] = at;
        if (pixels < EKB_PIXELS && at + 1 < last)
            continue;
        ekb_job job = {.rows = 1, .words = l->words, .ones = whole ? all : 0};
        for (int32_t p = 0; p < pixels; p++)
            job.x[p] = patches + (size_t)p * padded, job.mask[p] = whole ? NULL : masks + (size_t)p * padded;
        chunk(l, &job, &to, pixels, 0, whole ? NULL : counted);
        pixels = 0;
    }
    free(patches);
    return 0;
}

int ekb_conv2d(const ekb_conv *s, const uint8_t *x, const uint8_t *weight, const ekb_end *end)
{
    const int32_t outputs = s->out_channels / s->groups, count = s->channels / s->groups, taps = s->kernel[0] * s->kernel[1];
    const int32_t bytes = taps * ((count + 7) / 8);
    const ptrdiff_t plane = (ptrdiff_t)s->out_height * s->out_width;
    const int direct = s->groups == 1 && (count + 7) / 8 % 8 == 0 && (s->dilation[1] == 1 || s->kernel[1] == 1);
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
        failed = 0;
        if (direct)
            in_place(s, &l, x, to);
        else
            failed = gathered(s, &l, x, to, group);
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
        ekb_job job = {.rows = 1, .words = l->words, .ones = ones ? 0 : features};
        int32_t n = rows - r < EKB_PIXELS ? rows - r : EKB_PIXELS, counted[EKB_PIXELS] = {0};
        for (int32_t p = 0; p < n; p++) {
            const uint8_t *row = x + (r + p) * l->bytes;
            to.index[p] = first_row + r + p;
            if (l->tail)
                row = memcpy(copies + (size_t)p * padded, row, (size_t)l->bytes);
            job.x[p] = ones ? ones : row, job.mask[p] = ones ? row : NULL;
            for (ptrdiff_t i = 0; ones && i < l->bytes; i++)
                counted[p] += __builtin_popcount(row[i]);
        }
        chunk(l, &job, &to, n, 0, ones ? counted : NULL);
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
