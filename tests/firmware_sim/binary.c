/* Runs 1-bit layers that come on standard input, until it ends: 24 int32s (what, its shape, byte counts of 6 arrays), the arrays,
 * and back comes the result. Every array has a block of memory of its own size, for the sanitizers. */
#include "binary.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *take(int32_t bytes)
{
    void *block = malloc((size_t)bytes + !bytes);
    if (bytes && fread(block, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(2);
    return block;
}

int main(void)
{
    int32_t h[24];
    while (fread(h, 4, 24, stdin) == 24) {
        const int32_t *p = h + 1, *sizes = h + 17;
        uint8_t *x = take(sizes[0]), *w = take(sizes[1]), *packed = malloc((size_t)sizes[1] + 1);
        int32_t *threshold = take(sizes[2]);
        float *scale = take(sizes[3]);
        int32_t *bias = take(sizes[4]);
        float *out_scale = take(sizes[5]);
        uint8_t *out = malloc((size_t)sizes[6] + !sizes[6]);
        memset(out, 0xA5, (size_t)sizes[6]);
        ekb_end end = {.scale = scale, .bias = bias, .out_zp = p[13], .low = p[14], .high = p[15]};
        if (sizes[5])
            end.out_scale = *out_scale;
        if (sizes[2])
            end.bits = out, end.threshold = threshold;
        else
            end.integers = (int8_t *)out;
        int failed = 0;
        if (h[0] == 0) {
            ekb_conv s = {p[0], p[1], p[2], p[3], 0, 0, p[4], {p[5], p[6]}, {p[7] & 15, p[7] >> 4}, {p[8] & 15, p[8] >> 4},
                          {p[9] & 15, p[9] >> 4}, p[10]};
            s.out_height = p[11], s.out_width = p[12];
            int32_t outputs = s.out_channels / s.groups, bytes = sizes[1] / s.out_channels;
            for (int32_t g = 0; g < s.groups; g++)
                ekb_pack_weights(outputs, bytes, w + g * outputs * bytes, packed + g * outputs * bytes);
            failed = ekb_conv2d(&s, x, packed, &end);
        } else if (h[0] == 1) {
            ekb_pack_weights(p[2], sizes[1] / p[2], w, packed);
            failed = ekb_linear(p[0], p[1], p[2], x, packed, &end);
        } else if (h[0] == 2) {
            failed = ekb_matmul(p[0], p[1], p[2], p[3], p[4], x, w, &end);
        } else if (h[0] == 3) {
            ekb_binarize_int8(p[0], p[1], p[2], (int8_t *)x, (int16_t *)w, p[3], out);
        } else if (h[0] == 4) {
            ekb_binarize_float(p[0], p[1], p[2], (float *)x, (float *)w, p[3], out);
        } else {
            memset(out, 0, (size_t)sizes[6]);
            strncpy((char *)out, ekb_isa(), (size_t)sizes[6] - 1);
        }
        if (failed)
            return 3;
        fwrite(out, 1, (size_t)sizes[6], stdout);
        fflush(stdout);
        void *blocks[] = {x, w, packed, threshold, scale, bias, out_scale, out};
        for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
            free(blocks[i]);
    }
    return 0;
}
