/* Spiking layers: currents by adding up the weights' rows of the inputs that spiked, neurons, sums of spikes. */
#define EK_VECTORS
#include "internal.h"


/* Appends the rows of inputs that spiked once; counts of spikes go to y at once. */
static const int8_t **visit(const int8_t *x, uint32_t n, const int8_t *weights, uint32_t stride, const int8_t **list, int16_t *y, uint32_t outputs) {
#if EK_SET != EK_PORTABLE
    for (; n >= 4; n -= 4, x += 4, weights += 4 * stride) {
        uint32_t four = *(const ek_word *)(const void *)x;
        if (four & 0xfefefefeu) break; /* counts */
        for (; four; four &= four - 1) *list++ = weights + ((uint32_t)__builtin_ctz(four) >> 3) * stride;
    }
#endif
    for (; n; n--, x++, weights += stride) {
        const int32_t s = *x;
        if (s == 1)
            *list++ = weights;
        else if (s)
            for (uint32_t o = 0; o < outputs; o++) y[o] = (int16_t)(y[o] + s * weights[o]);
    }
    return list;
}

/* y[o] += the rows. */
static void add_rows(const int8_t *const *list, const int8_t *const *end, int16_t *y, uint32_t n) {
    uint32_t o = 0;
#if EK_SET == EK_DSP
    for (; o + 16 <= n; o += 16) { /* pairs of 16 bits: (0, 2), (1, 3) of four neighbours */
        register const int8_t *const *l __asm("r0") = list;
        register uint32_t a0 __asm("r1") = 0, a1 __asm("r2") = 0, a2 __asm("r3") = 0, a3 __asm("r4") = 0;
        register uint32_t a4 __asm("r5") = 0, a5 __asm("r6") = 0, a6 __asm("r8") = 0, a7 __asm("r9") = 0;
        register uint32_t place __asm("r10") = o;
        __asm volatile("cmp r0, %[end]\n beq 2f\n"
                       "1: ldr r11, [r0], #4\n add r11, r10\n ldrd r12, lr, [r11]\n sxtab16 r1, r1, r12\n sxtab16 r2, r2, r12, ror #8\n"
                       "sxtab16 r3, r3, lr\n sxtab16 r4, r4, lr, ror #8\n"
                       "ldrd r12, lr, [r11, #8]\n sxtab16 r5, r5, r12\n sxtab16 r6, r6, r12, ror #8\n"
                       "sxtab16 r8, r8, lr\n sxtab16 r9, r9, lr, ror #8\n cmp r0, %[end]\n bne 1b\n2:\n"
                       : "+r"(l), "+r"(a0), "+r"(a1), "+r"(a2), "+r"(a3), "+r"(a4), "+r"(a5), "+r"(a6), "+r"(a7)
                       : "r"(place), [end] "r"(end)
                       : "r11", "r12", "lr", "cc", "memory");
        ek_word *to = (ek_word *)(void *)(y + o);
        const uint32_t even[4] = {a0, a2, a4, a6}, odd[4] = {a1, a3, a5, a7};
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t low, high, sum;
            __asm("pkhbt %0, %2, %3, lsl #16\n pkhtb %1, %3, %2, asr #16" : "=&r"(low), "=r"(high) : "r"(even[i]), "r"(odd[i]));
            __asm("sadd16 %0, %1, %2" : "=r"(sum) : "r"(to[2 * i]), "r"(low));
            to[2 * i] = sum;
            __asm("sadd16 %0, %1, %2" : "=r"(sum) : "r"(to[2 * i + 1]), "r"(high));
            to[2 * i + 1] = sum;
        }
    }
#elif EK_SET == EK_MVE
    const uint32_t events = (uint32_t)(end - list);
    for (; events && o + 32 <= n; o += 32) {
        register const int8_t *const *l __asm("r0") = list;
        register int16_t *to __asm("r1") = y + o;
        register uint32_t place __asm("r2") = o, turns __asm("r3") = events;
        __asm volatile("vldrh.16 q0, [r1]\n vldrh.16 q1, [r1, #16]\n vldrh.16 q2, [r1, #32]\n vldrh.16 q3, [r1, #48]\n dls lr, r3\n"
                       "1: ldr r4, [r0], #4\n add r4, r2\n vldrb.s16 q4, [r4]\n vadd.i16 q0, q0, q4\n vldrb.s16 q5, [r4, #8]\n vadd.i16 q1, q1, q5\n"
                       "vldrb.s16 q6, [r4, #16]\n vadd.i16 q2, q2, q6\n vldrb.s16 q7, [r4, #24]\n vadd.i16 q3, q3, q7\n le lr, 1b\n"
                       "vstrh.16 q0, [r1]\n vstrh.16 q1, [r1, #16]\n vstrh.16 q2, [r1, #32]\n vstrh.16 q3, [r1, #48]\n"
                       : "+r"(l)
                       : "r"(to), "r"(place), "r"(turns)
                       : "r4", "lr", "cc", "memory", "q0", "q1", "q2", "q3", "q4", "q5", "q6", "q7");
    }
    for (; events && o < n; o += 8) {
        const mve_pred16_t lanes = vctp16q(n - o);
        int16x8_t a = vld1q_z_s16(y + o, lanes);
        for (const int8_t *const *l = list; l < end; l++) a = vaddq_s16(a, vldrbq_z_s16(*l + o, lanes));
        vst1q_p_s16(y + o, a, lanes);
    }
#endif
    for (; o + 4 <= n; o += 4) {
        int32_t a = y[o], b = y[o + 1], c = y[o + 2], d = y[o + 3];
        for (const int8_t *const *l = list; l < end; l++) {
            const int8_t *row = *l + o;
            a += row[0], b += row[1], c += row[2], d += row[3];
        }
        y[o] = (int16_t)a, y[o + 1] = (int16_t)b, y[o + 2] = (int16_t)c, y[o + 3] = (int16_t)d;
    }
    for (; o < n; o++) {
        int32_t a = y[o];
        for (const int8_t *const *l = list; l < end; l++) a += (*l)[o];
        y[o] = (int16_t)a;
    }
}

EK_NOINLINE void ek_spiking_s16(const ek_spiking *p, const int8_t *x, int16_t *y, void *scratch) {
    const uint32_t in_n = p->in_c / p->groups, out_n = p->out_c / p->groups, stride = ek_round4(out_n), taps = (uint32_t)p->kernel_h * p->kernel_w;
    const int8_t **const list = scratch;
    for (uint32_t t = 0; t < p->steps; t++, x += (uint32_t)p->in_h * p->in_w * p->in_c)
        for (uint32_t oy = 0; oy < p->out_h; oy++)
            for (uint32_t ox = 0; ox < p->out_w; ox++) {
                const int8_t *weights = p->weights;
                ek_copy((int8_t *)y, (const int8_t *)p->bias, 2u * p->out_c);
                for (uint32_t g = 0; g < p->groups; g++, y += out_n, weights += taps * in_n * stride) {
                    const int8_t **end = list;
                    for (uint32_t i = 0; i < p->kernel_h; i++) {
                        const uint32_t iy = oy * p->stride_h + i * p->dilation_h - p->pad_top;
                        for (uint32_t c = 0; c < p->kernel_w; c++) {
                            const uint32_t ix = ox * p->stride_w + c * p->dilation_w - p->pad_left;
                            if (iy < p->in_h && ix < p->in_w)
                                end = visit(x + (iy * p->in_w + ix) * p->in_c + g * in_n, in_n, weights + (i * p->kernel_w + c) * in_n * stride, stride, end, y, out_n);
                        }
                    }
                    add_rows(list, end, y, out_n);
                }
            }
}

EK_INLINE int32_t saturated(int32_t v) {
#if EK_SET != EK_PORTABLE
    __asm("ssat %0, #16, %0" : "+r"(v));
    return v;
#else
    return ek_clamp(v, -32768, 32767);
#endif
}

#if EK_SET == EK_MVE
EK_INLINE void eight_neurons(const int16_t *x, int16_t *v, int8_t *spikes, const int16_t *threshold, const int16_t *decay, uint32_t leak, uint32_t zero) {
    const int16x8_t u = vld1q_s16(v), t = vld1q_s16(threshold);
    int16x8_t w = u;
    if (leak) {
        const int16x8_t d = vld1q_s16(decay);
        w = vqrdmulhq_s16(u, d); /* (u * d + 2^14) >> 15 */
        if (leak > 1) {
            const int16x8_t leaks = vshrq_n_s16(vaddq_s16(d, vdupq_n_s16(-32767)), 15); /* 0: none */
            w = vorrq_s16(vandq_s16(w, leaks), vbicq_s16(u, leaks));
        }
    }
    w = vqaddq_s16(w, vld1q_s16(x));
    const int16x8_t below = vshrq_n_s16(vqsubq_s16(w, t), 15); /* -1: no spike */
    w = zero ? vandq_s16(w, below) : vsubq_s16(w, vbicq_s16(t, below));
    vst1q_s16(v, w);
    vstrbq_s16(spikes, vaddq_n_s16(below, 1));
}
#endif

/* One step of `period` neurons of one spike at most. */
EK_INLINE void one_spike(const ek_neurons *p, const int16_t *x, int16_t *v, int8_t *spikes) {
    const int16_t *threshold = p->threshold, *decay = p->decay;
    const uint32_t zero = p->zero;
    uint32_t n = p->period;
#if EK_SET == EK_MVE || EK_SET == EK_DSP
    const uint32_t leak = p->leak;
#endif
#if EK_SET == EK_MVE
    for (; n >= 16; n -= 16, x += 16, v += 16, spikes += 16, decay += 16, threshold += 16) {
        eight_neurons(x, v, spikes, threshold, decay, leak, zero);
        eight_neurons(x + 8, v + 8, spikes + 8, threshold + 8, decay + 8, leak, zero);
    }
#elif EK_SET == EK_DSP
    /* two neurons a turn: SSUB16 notes for both whether the threshold is reached, SEL takes what follows */
    const uint32_t keep = zero ? 0 : ~0u;
    if (leak < 2)
        for (; n >= 2; n -= 2, x += 2, v += 2, spikes += 2, decay += 2, threshold += 2) {
            uint32_t w = *(const ek_word *)(const void *)v, s, rest;
            if (leak) {
                uint32_t a, b;
                const uint32_t d = *(const ek_word *)(const void *)decay;
                __asm("smlabb %[a], %[u], %[d], %[half]\n smlatt %[b], %[u], %[d], %[half]\n lsl %[b], #1\n pkhtb %[u], %[b], %[a], asr #15"
                      : [u] "+r"(w), [a] "=&r"(a), [b] "=&r"(b)
                      : [d] "r"(d), [half] "r"(0x4000));
            }
            __asm("qadd16 %[w], %[w], %[x]\n ssub16 %[s], %[w], %[t]\n and %[r], %[s], %[keep]\n sel %[w], %[r], %[w]\n sel %[s], %[one], %[none]"
                  : [w] "+&r"(w), [s] "=&r"(s), [r] "=&r"(rest)
                  : [x] "r"(*(const ek_word *)(const void *)x), [t] "r"(*(const ek_word *)(const void *)threshold), [keep] "r"(keep), [one] "r"(0x10001), [none] "r"(0));
            *(ek_word *)(void *)v = w;
            spikes[0] = (int8_t)s, spikes[1] = (int8_t)(s >> 16);
        }
#endif
    for (; n; n--) {
        const int32_t d = *decay++, t = *threshold++, u = *v;
        int32_t w = d == 32767 ? u : (u * d + 0x4000) >> 15;
        w = saturated(w + *x++);
        const int32_t fired = w >= t;
        if (fired) w = zero ? 0 : w - t;
        *v++ = (int16_t)w, *spikes++ = (int8_t)fired;
    }
}

EK_INLINE void more_spikes(const ek_neurons *p, const int16_t *x, int16_t *v, int8_t *spikes) {
    for (uint32_t i = 0; i < p->period; i++) {
        const int32_t d = p->decay[i], t = p->threshold[i];
        int32_t w = saturated((d == 32767 ? v[i] : (v[i] * d + 0x4000) >> 15) + x[i]), s = 0;
        if (w >= t) {
            s = w / t;
            if (s > p->max_spikes) s = p->max_spikes;
            w = p->zero ? 0 : w - s * t;
        }
        v[i] = (int16_t)w, spikes[i] = (int8_t)s;
    }
}

EK_NOINLINE void ek_neurons_s16(const ek_neurons *p, const int16_t *x, int8_t *spikes, void *scratch) {
    int16_t *const v = scratch;
    for (uint32_t i = 0; i < p->n; i += p->period) ek_copy((int8_t *)(v + i), (const int8_t *)p->v_init, 2 * p->period);
    for (uint32_t t = 0; t < p->steps; t++, x += p->x_step, spikes += p->n)
        for (uint32_t i = 0; i < p->n; i += p->period)
            if (p->max_spikes == 1)
                one_spike(p, x + i, v + i, spikes + i);
            else
                more_spikes(p, x + i, v + i, spikes + i);
}

EK_NOINLINE void ek_neurons_reset_s16(const ek_neurons *p, int16_t *v) {
    for (uint32_t i = 0; i < p->n; i += p->period) ek_copy((int8_t *)(v + i), (const int8_t *)p->v_init, 2 * p->period);
}

EK_NOINLINE void ek_neurons_step_s16(const ek_neurons *p, const int16_t *x, int8_t *spikes, int16_t *v) {
    for (uint32_t i = 0; i < p->n; i += p->period)
        if (p->max_spikes == 1)
            one_spike(p, x + i, v + i, spikes + i);
        else
            more_spikes(p, x + i, v + i, spikes + i);
}

/* y = faded `before` + x, for `period` of them; `before` may be y */
EK_INLINE void fade(const int16_t *decay, uint32_t period, const int16_t *before, const int16_t *x, int16_t *y) {
    uint32_t i = 0;
#if EK_SET == EK_MVE
    for (; i + 8 <= period; i += 8) {
        const int16x8_t u = vld1q_s16(before + i), d = vld1q_s16(decay + i);
        const int16x8_t leaks = vshrq_n_s16(vaddq_s16(d, vdupq_n_s16(-32767)), 15); /* 0: none */
        const int16x8_t left = vorrq_s16(vandq_s16(vqrdmulhq_s16(u, d), leaks), vbicq_s16(u, leaks));
        vst1q_s16(y + i, vqaddq_s16(left, vld1q_s16(x + i)));
    }
#endif
    for (; i < period; i++) {
        const int32_t d = decay[i], u = before[i];
        y[i] = (int16_t)saturated((d == 32767 ? u : (u * d + 0x4000) >> 15) + x[i]);
    }
}

EK_NOINLINE void ek_fade_s16(const ek_fade *p, const int16_t *x, int16_t *y) {
    if (y != x) ek_copy((int8_t *)y, (const int8_t *)x, 2 * p->n);
    for (uint32_t t = 1; t < p->steps; t++) {
        x += p->x_step, y += p->n;
        for (uint32_t i = 0; i < p->n; i += p->period) fade(p->decay, p->period, y - p->n + i, x + i, y + i);
    }
}

EK_NOINLINE void ek_fade_reset_s16(int16_t *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) y[i] = 0;
}

EK_NOINLINE void ek_fade_step_s16(const ek_fade *p, const int16_t *x, int16_t *y) {
    for (uint32_t i = 0; i < p->n; i += p->period) fade(p->decay, p->period, y + i, x + i, y + i);
}

EK_NOINLINE void ek_recurrent_reset_s16(const ek_recurrent *p, int16_t *state) {
    for (uint32_t i = 0; i < p->n; i += p->period) ek_copy((int8_t *)(state + i), (const int8_t *)p->v_init, 2 * p->period);
    ek_fade_reset_s16(state + p->n, 2 * p->n);
}

static void recurrent_neurons(const ek_recurrent *p, const int16_t *x, int8_t *spikes, int16_t *state) {
    const ek_neurons neurons = {p->threshold, p->decay, p->v_init, p->n, p->period, 0, 1, p->leak, p->zero, p->max_spikes};
    int16_t *const v = state, *const current = v + p->n, *const given = current + p->n;
    ek_add_currents_s16(x, given, given, p->n);
    for (uint32_t i = 0; i < p->n; i += p->period) fade(p->decay_syn, p->period, current + i, given + i, current + i);
    ek_neurons_step_s16(&neurons, current, spikes, v);
}

static void feed_back(const ek_recurrent *p, const int8_t *spikes, int16_t *state, void *scratch) {
    const ek_spiking back = {p->weights, p->bias, 1, p->in_h, p->in_w, p->in_c, p->in_h, p->in_w, p->in_c,
                             p->kernel_h, p->kernel_w, 1, 1, 1, 1, p->pad_top, p->pad_left, p->groups};
    ek_spiking_s16(&back, spikes, state + 2 * p->n, scratch);
}

EK_NOINLINE void ek_recurrent_step_s16(const ek_recurrent *p, const int16_t *x, int8_t *spikes, int16_t *state, void *scratch) {
    recurrent_neurons(p, x, spikes, state);
    feed_back(p, spikes, state, scratch);
}

EK_NOINLINE void ek_recurrent_s16(const ek_recurrent *p, const int16_t *x, int8_t *spikes, void *scratch) {
    ek_recurrent_reset_s16(p, scratch);
    for (uint32_t t = 0; t < p->steps; t++, x += p->x_step, spikes += p->n) {
        if (t) feed_back(p, spikes - p->n, scratch, (int8_t *)scratch + ek_round4(6 * p->n));
        recurrent_neurons(p, x, spikes, scratch);
    }
}

/* round_half_even((float)acc * m), at the ends of int16 */
static int16_t scaled(int32_t acc, float m) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: the sum has no fraction bits */
    volatile float v = (float)acc;
    v = v * m;
    if (v > 32767.0f) return 32767;
    if (v < -32768.0f) return -32768;
    v = v + magic;
    v = v - magic;
    return (int16_t)ek_clamp((int32_t)v, -32768, 32767);
}

EK_NOINLINE void ek_current_s16(const ek_current *p, const int8_t *x, int16_t *y) {
    const uint32_t in_n = p->in_c / p->groups, out_n = p->out_c / p->groups;
    for (uint32_t t = 0; t < p->steps; t++, x += (uint32_t)p->in_h * p->in_w * p->in_c)
        for (uint32_t oy = 0; oy < p->out_h; oy++)
            for (uint32_t ox = 0; ox < p->out_w; ox++) {
                const int8_t *w = p->weights;
                for (uint32_t o = 0; o < p->out_c; o++) {
                    int32_t acc = p->bias[o];
                    for (uint32_t i = 0; i < p->kernel_h; i++) {
                        const uint32_t iy = oy * p->stride_h + i * p->dilation_h - p->pad_top;
                        for (uint32_t c = 0; c < p->kernel_w; c++, w += in_n) {
                            const uint32_t ix = ox * p->stride_w + c * p->dilation_w - p->pad_left;
                            const int in = iy < p->in_h && ix < p->in_w;
                            const int8_t *from = x + (iy * p->in_w + ix) * p->in_c + o / out_n * in_n;
                            for (uint32_t k = 0; k < in_n; k++) acc += w[k] * (in ? from[k] : p->in_zp);
                        }
                    }
                    *y++ = scaled(acc, p->multiplier[o]);
                }
            }
}

EK_NOINLINE void ek_spike_pool_s8(const ek_spike_pool *p, const int8_t *x, int8_t *y) {
    for (uint32_t t = 0; t < p->steps; t++, x += (uint32_t)p->in_h * p->in_w * p->channels)
        for (uint32_t oy = 0; oy < p->out_h; oy++)
            for (uint32_t ox = 0; ox < p->out_w; ox++, y += p->channels) {
                ek_fill(y, 0, p->channels);
                for (uint32_t i = 0; i < p->kernel_h; i++)
                    for (uint32_t c = 0; c < p->kernel_w; c++) {
                        const uint32_t iy = oy * p->stride_h + i - p->pad_top, ix = ox * p->stride_w + c - p->pad_left;
                        if (iy >= p->in_h || ix >= p->in_w) continue;
                        const int8_t *from = x + (iy * p->in_w + ix) * p->channels;
                        for (uint32_t k = 0; k < p->channels; k++) y[k] = (int8_t)(y[k] + from[k]);
                    }
            }
}

EK_NOINLINE void ek_delay_s8(const ek_delay *p, const int8_t *x, int8_t *y) {
    for (uint32_t t = 0; t < p->steps; t++)
        for (uint32_t i = 0; i < p->n; i += p->period)
            for (uint32_t k = 0; k < p->period; k++, x++) *y++ = p->delay[k] <= t ? x[-(int32_t)(p->delay[k] * p->n)] : 0;
}

EK_NOINLINE void ek_delay_reset_s8(const ek_delay *p, int8_t *line) { ek_fill(line, 0, p->longest * p->n); }

EK_NOINLINE void ek_delay_step_s8(const ek_delay *p, const int8_t *x, int8_t *y, int8_t *line) {
    for (uint32_t i = 0; i < p->n; i += p->period)
        for (uint32_t k = 0; k < p->period; k++) y[i + k] = p->delay[k] ? line[(p->delay[k] - 1) * p->n + i + k] : x[i + k];
    for (uint32_t i = p->longest * p->n; i-- > p->n;) line[i] = line[i - p->n];
    if (p->longest) ek_copy(line, x, p->n);
}

EK_NOINLINE void ek_accumulate_s16(const int16_t *x, int32_t *y, uint32_t n, uint32_t steps) {
    for (uint32_t i = 0; i < n; i++) {
        int32_t sum = 0;
        for (uint32_t t = 0; t < steps; t++) sum += x[t * n + i];
        y[i] = sum;
    }
}

EK_NOINLINE void ek_accumulate_s8(const int8_t *x, int32_t *y, uint32_t n, uint32_t steps) {
    for (uint32_t i = 0; i < n; i++) {
        int32_t sum = 0;
        for (uint32_t t = 0; t < steps; t++) sum += x[t * n + i];
        y[i] = sum;
    }
}

EK_NOINLINE void ek_add_currents_s16(const int16_t *a, const int16_t *b, int16_t *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) y[i] = (int16_t)saturated(a[i] + b[i]);
}

EK_NOINLINE void ek_add_spikes_s16(const int16_t *x, const int8_t *s, int16_t *y, const int16_t *amplitude, uint32_t n, uint32_t channels) {
    if (y != x) ek_copy((int8_t *)y, (const int8_t *)x, 2 * n);
    for (uint32_t i = 0; i < n; i += channels, s += channels, y += channels)
        for (uint32_t c = 0; c < channels; c++)
            if (s[c]) y[c] = (int16_t)saturated(y[c] + s[c] * amplitude[c]);
}

EK_NOINLINE void ek_accumulate_reset_s16(int32_t *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) y[i] = 0;
}

EK_NOINLINE void ek_accumulate_step_s16(const int16_t *x, int32_t *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) y[i] += x[i];
}

EK_NOINLINE void ek_accumulate_step_s8(const int8_t *x, int32_t *y, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) y[i] += x[i];
}

EK_NOINLINE int ek_sure_s32(const int32_t *y, uint32_t n, uint32_t scale, uint32_t limit) {
    int32_t most = y[0];
    uint32_t sum = 0;
    for (uint32_t i = 1; i < n; i++)
        if (y[i] > most) most = y[i];
    for (uint32_t i = 0; i < n; i++) {
        const uint64_t exponent = (uint64_t)((uint32_t)most - (uint32_t)y[i]) * scale >> 8;
        if (exponent >> 16 >= 25) continue;
        const uint32_t f = (uint32_t)exponent & 0xffff;
        uint32_t p = 15200 - (f * 2632 >> 16); /* 2^-f = 1 - f (a - f (b - f c)) */
        p = 45340 - (f * p >> 16);
        p = 65536 - (f * p >> 16);
        sum += (p << 8) >> (exponent >> 16);
    }
    return sum < limit;
}
