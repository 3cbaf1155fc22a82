/* Signs of activations, packed along the channels. */
#include "internal.h"

enum { PIECE = 64 };

typedef int8_t bytes16 __attribute__((vector_size(16)));

/* One byte of 8 channels for each of up to 64 places. */
static void columns_int8(const int8_t *x, const int16_t *t, int32_t step, int32_t channels, int32_t inner, int32_t count, uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8;
    for (int32_t c = 0; c < channels; c += 8) {
        uint8_t byte[PIECE] = {0};
        const int32_t n = channels - c < 8 ? channels - c : 8;
        for (int32_t i = 0; i < n; i++) {
            const int8_t *row = x + (c + i) * (ptrdiff_t)inner;
            const int16_t wanted = t[step * (c + i)];
            const int8_t limit = (int8_t)(wanted < -128 ? -128 : wanted), bit = (int8_t)(1u << i);
            if (wanted > 127) /* beyond int8: never */
                continue;
            int32_t j = 0;
            for (; j + 16 <= count; j += 16) {
                bytes16 v, known;
                memcpy(&v, row + j, 16);
                memcpy(&known, byte + j, 16);
                known |= (bytes16)(v >= limit) & bit;
                memcpy(byte + j, &known, 16);
            }
            for (; j < count; j++)
                byte[j] |= (uint8_t)((row[j] >= limit) << i);
        }
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
        for (int32_t i = 0; i < n; i++)
            for (int32_t j = 0; j < count; j++)
                byte[j] |= (uint8_t)((x[(c + i) * (ptrdiff_t)inner + j] >= limit[i]) << i);
        for (int32_t j = 0; j < count; j++)
            out[(ptrdiff_t)j * bytes + c / 8] = byte[j];
    }
}

/* Rows of channels: 16 comparisons at once, whose bits are distinct within each half, so that adding its bytes joins them. */
static void rows_int8(int32_t rows, int32_t channels, const int8_t *x, const int16_t *t, int32_t step, uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8;
    const bytes16 bits = {1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128};
    for (int32_t c = 0; c < channels; c += 16) {
        const int32_t n = channels - c < 16 ? channels - c : 16;
        bytes16 limit = {0}, counts = {0};
        for (int32_t i = 0; i < n; i++) {
            const int16_t wanted = t[step * (c + i)];
            limit[i] = (int8_t)(wanted < -128 ? -128 : wanted);
            counts[i] = wanted > 127 ? 0 : bits[i]; /* beyond int8: never */
        }
        for (int32_t r = 0; r < rows; r++) {
            bytes16 v = {0};
            memcpy(&v, x + (ptrdiff_t)r * channels + c, (size_t)n);
            v = (bytes16)(v >= limit) & counts;
            uint64_t half[2];
            memcpy(half, &v, 16);
            out[(ptrdiff_t)r * bytes + c / 8] = (uint8_t)(half[0] * 0x0101010101010101u >> 56);
            if (n > 8)
                out[(ptrdiff_t)r * bytes + c / 8 + 1] = (uint8_t)(half[1] * 0x0101010101010101u >> 56);
        }
    }
}

void ekb_binarize_int8(int32_t outer, int32_t channels, int32_t inner, const int8_t *x, const int16_t *threshold, int32_t thresholds,
                       uint8_t *out)
{
    const int32_t bytes = (channels + 7) / 8, step = thresholds > 1;
    if (inner == 1) {
        rows_int8(outer, channels, x, threshold, step, out);
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
    for (int32_t r = 0; r < outer; r++, x += (ptrdiff_t)channels * inner, out += (ptrdiff_t)bytes * inner) {
        for (int32_t c = 0; c < channels && inner == 1; c += 8) {
            uint32_t byte = 0;
            for (int32_t i = 0; i < 8 && c + i < channels; i++)
                byte |= (uint32_t)(x[c + i] >= threshold[step * (c + i)]) << i;
            out[c / 8] = (uint8_t)byte;
        }
        for (int32_t j = 0; j < inner && inner > 1; j += PIECE)
            columns_float(x + j, threshold, step, channels, inner, inner - j < PIECE ? inner - j : PIECE, out + (ptrdiff_t)j * bytes);
    }
}
