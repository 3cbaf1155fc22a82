/* Signs of activations, packed along the channels. */
#include "internal.h"

enum { PIECE = 64 };

/* One byte of 8 channels for each of up to 64 places, in a form that compilers vectorize. */
#define BYTES_OF(TYPE) \
    for (int32_t i = 0; i < n; i++) { \
        const TYPE *row = x + (c + i) * (ptrdiff_t)inner; \
        const TYPE t = limit[i]; \
        for (int32_t j = 0; j < count; j++) \
            byte[j] |= (uint8_t)((row[j] >= t) << i); \
    }

static void columns_int8(const int8_t *x, const int16_t *t, int32_t step, int32_t channels, int32_t inner, int32_t count, uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8;
    for (int32_t c = 0; c < channels; c += 8) {
        uint8_t byte[PIECE] = {0};
        int8_t limit[8];
        int32_t n = channels - c < 8 ? channels - c : 8;
        for (int32_t i = 0; i < n; i++) { /* beyond int8: never */
            int16_t wanted = t[step * (c + i)];
            limit[i] = (int8_t)(wanted < -128 ? -128 : wanted > 127 ? 127 : wanted);
        }
        BYTES_OF(int8_t)
        for (int32_t i = 0; i < n; i++)
            if (t[step * (c + i)] > 127)
                for (int32_t j = 0; j < count; j++)
                    byte[j] &= (uint8_t)~(1u << i);
        for (int32_t j = 0; j < count; j++)
            out[(ptrdiff_t)j * bytes + c / 8] = byte[j];
    }
}

static void columns_float(const float *x, const float *t, int32_t step, int32_t channels, int32_t inner, int32_t count, uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8;
    for (int32_t c = 0; c < channels; c += 8) {
        uint8_t byte[PIECE] = {0};
        float limit[8];
        int32_t n = channels - c < 8 ? channels - c : 8;
        for (int32_t i = 0; i < n; i++)
            limit[i] = t[step * (c + i)];
        BYTES_OF(float)
        for (int32_t j = 0; j < count; j++)
            out[(ptrdiff_t)j * bytes + c / 8] = byte[j];
    }
}

#define ROWS_OF \
    for (int32_t r = 0; r < outer; r++, x += channels, out += bytes) \
        for (int32_t c = 0; c < channels; c += 8) { \
            uint32_t byte = 0; \
            int32_t n = channels - c < 8 ? channels - c : 8; \
            for (int32_t i = 0; i < n; i++) \
                byte |= (uint32_t)(x[c + i] >= threshold[step * (c + i)]) << i; \
            out[c / 8] = (uint8_t)byte; \
        }

void ekb_binarize_int8(int32_t outer, int32_t channels, int32_t inner, const int8_t *x, const int16_t *threshold, int32_t thresholds,
                       uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8, step = thresholds > 1;
    if (inner == 1) {
        ROWS_OF
        return;
    }
    for (int32_t r = 0; r < outer; r++, x += (ptrdiff_t)channels * inner, out += (ptrdiff_t)bytes * inner)
        for (int32_t j = 0; j < inner; j += PIECE)
            columns_int8(x + j, threshold, step, channels, inner, inner - j < PIECE ? inner - j : PIECE, out + (ptrdiff_t)j * bytes);
}

void ekb_binarize_float(int32_t outer, int32_t channels, int32_t inner, const float *x, const float *threshold, int32_t thresholds,
                        uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8, step = thresholds > 1;
    if (inner == 1) {
        ROWS_OF
        return;
    }
    for (int32_t r = 0; r < outer; r++, x += (ptrdiff_t)channels * inner, out += (ptrdiff_t)bytes * inner)
        for (int32_t j = 0; j < inner; j += PIECE)
            columns_float(x + j, threshold, step, channels, inner, inner - j < PIECE ? inner - j : PIECE, out + (ptrdiff_t)j * bytes);
}
