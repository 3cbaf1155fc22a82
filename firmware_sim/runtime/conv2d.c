/* Convolution: the input window of an output position is laid into a column, then meets the rows of the weights. */
#include "internal.h"

typedef struct {
    int32_t y, x;      /* upper left corner of the window in the input; may be negative */
    uint32_t first, n; /* first input channel and number of channels of the group */
} window;

/* The window as bytes in the order of the weights (height, width, channel). */
EK_NOINLINE static void gather(const ek_conv2d *p, const int8_t *x, const window *at, int8_t *to) {
    const int32_t width = p->in_w, step = p->dilation_w;
    const uint32_t run = p->kernel_w * at->n;
    const int whole = step == 1 && p->groups == 1 && at->x >= 0 && at->x + p->kernel_w <= width;
    int32_t iy = at->y;
    for (uint32_t i = 0; i < p->kernel_h; i++, iy += p->dilation_h) {
        if (iy < 0 || iy >= p->in_h) {
            ek_fill(to, p->in_zp, run);
            to += run;
            continue;
        }
        const int8_t *from = x + (iy * width + at->x) * p->in_c + (int32_t)at->first;
        if (whole) {
            ek_copy(to, from, run);
            to += run;
            continue;
        }
        int32_t ix = at->x;
        for (uint32_t j = 0; j < p->kernel_w; j++, ix += step, from += step * p->in_c, to += at->n)
            if (ix < 0 || ix >= width)
                ek_fill(to, p->in_zp, at->n);
            else
                ek_copy(to, from, at->n);
    }
}

#if EK_SET == EK_DSP
/* The window as pairs, straight from the input: channels of the group are a multiple of 4. */
EK_NOINLINE static void gather_pairs(const ek_conv2d *p, const int8_t *x, const window *at, uint32_t *to, uint32_t step) {
    const int32_t width = p->in_w, dilation = p->dilation_w;
    const uint32_t zero = ((uint32_t)p->in_zp & 0xffffu) * 0x10001u;
    const int whole = dilation == 1 && p->groups == 1 && at->x >= 0 && at->x + p->kernel_w <= width;
    int32_t iy = at->y;
    for (uint32_t i = 0; i < p->kernel_h; i++, iy += p->dilation_h) {
        const int outside = iy < 0 || iy >= p->in_h;
        const int8_t *from = x + (iy * width + at->x) * p->in_c + (int32_t)at->first;
        int32_t ix = at->x;
        uint32_t runs = p->kernel_w, run = at->n;
        if (whole && !outside) run *= runs, runs = 1;
        for (; runs; runs--, ix += dilation, from += dilation * p->in_c)
            if (outside || ix < 0 || ix >= width)
                for (uint32_t k = 0; k < run; k += 4, to += step) to[0] = to[1] = zero;
            else
                to = ek_expand(from, run, to, step);
    }
}
#endif

typedef struct {
    int8_t *bytes;   /* one column */
    uint32_t *pairs; /* DSP: four columns, expanded */
    int pointwise;   /* the column is a run of the input itself */
} room;

#if EK_SET == EK_DSP
EK_INLINE void prepare(const ek_conv2d *p, const int8_t *x, const window *at, const room *s, uint32_t k, uint32_t slot, uint32_t step) {
    if (s->pointwise)
        ek_expand(x + (at->y * p->in_w + at->x) * p->in_c, k, s->pairs + slot, step);
    else if ((at->n & 3u) == 0)
        gather_pairs(p, x, at, s->pairs + slot, step);
    else {
        gather(p, x, at, s->bytes);
        ek_expand(s->bytes, k, s->pairs + slot, step);
    }
}
#endif

EK_INLINE void advance(const ek_conv2d *p, window *at, uint32_t *ox) {
    at->x += p->stride_w;
    if (++*ox == p->out_w) {
        *ox = 0;
        at->x = -(int32_t)p->pad_left;
        at->y += p->stride_h;
    }
}

/* All positions of one group. */
static void convolve(const ek_conv2d *p, const ek_rows *r, uint32_t first, const int8_t *x, int8_t *y, const room *s) {
    window at = {-(int32_t)p->pad_top, -(int32_t)p->pad_left, first, p->in_c / p->groups};
    uint32_t ox = 0, left = (uint32_t)p->out_h * p->out_w;
#if EK_SET == EK_DSP
    for (; left >= 4; left -= 4, y += 4u * p->out_c) {
        for (uint32_t slot = 0; slot < 8; slot += 2) {
            prepare(p, x, &at, s, r->k, slot, 8);
            advance(p, &at, &ox);
        }
        ek_rows_four(r, s->pairs, y, p->out_c);
    }
    for (; left; left--, y += p->out_c) {
        prepare(p, x, &at, s, r->k, 0, 2);
        advance(p, &at, &ox);
        ek_rows_one(r, (const int8_t *)s->pairs, y);
    }
#else
    for (; left; left--, y += p->out_c) {
        const int8_t *column = s->bytes;
        if (s->pointwise)
            column = x + (at.y * p->in_w + at.x) * p->in_c;
        else
            gather(p, x, &at, s->bytes);
        advance(p, &at, &ox);
        ek_rows_one(r, column, y);
    }
#endif
}

EK_NOINLINE void ek_conv2d_s8(const ek_conv2d *p, const int8_t *x, int8_t *y, void *scratch) {
    const uint32_t in_n = p->in_c / p->groups, out_n = p->out_c / p->groups, k = p->kernel_h * p->kernel_w * in_n;
    /* no window of a pointwise layer may leave the input: padding on the far side shows in the output's size */
    const int inside = (p->out_h - 1) * p->stride_h < p->in_h && (p->out_w - 1) * p->stride_w < p->in_w;
    const int pointwise = p->kernel_h == 1 && p->kernel_w == 1 && p->groups == 1 && !p->pad_top && !p->pad_left && inside;
    int8_t *free = scratch;
    room s = {free, NULL, pointwise};
    free += pointwise ? 0 : ek_round16(k);
#if EK_SET == EK_DSP
    s.pairs = (uint32_t *)(void *)free;
    free += 8 * ek_round4(k);
#endif
    ek_rows r = {p->weights, p->bias, p->multiplier, p->shift, free, k, out_n, ek_row_bytes(k, p->weight_bits),
                 p->out_zp, p->act_min, p->act_max, p->weight_bits, ek_plain(p->shift, p->out_c, p->act_min, p->act_max)};
    for (uint32_t g = 0; g < p->groups; g++, y += out_n) {
        convolve(p, &r, g * in_n, x, y, &s);
        r.weights += out_n * r.row_bytes;
        r.bias += out_n, r.multiplier += out_n, r.shift += out_n;
    }
}
