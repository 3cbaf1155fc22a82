/* Test firmware: each case of the input names a kernel, its numbers and its arrays; the output is what the kernel wrote.
 *
 * A case is 32-bit words: operation, in place (0 or 1), output bytes, scratch bytes, number of integers, number of arrays; the integers;
 * then each array: bytes, data padded to 4. Sixteen bytes after output and scratch are watched: a kernel that writes there ends the run. */
#include "edgekit.h"

enum { CONV2D, DEPTHWISE, LINEAR, ADD, MUL, REQUANT, CLAMP, LUT, SOFTMAX, AVERAGE, MAXIMUM, MEAN, CONCAT, PAD, GATHER, QUANTIZE,
       DEQUANTIZE, CRC, SCALE, BINARIZE, BINARY_VECTORS, BINARY_PLANES, BINARY_ROWS, BINARY_MATMUL };
enum { OVERRUN = 0x10, UNKNOWN = 0x11, TOO_LARGE = 0x12 };

static uint8_t memory[MEMORY] EK_ARENA;
static int32_t v[32];
static void *a[6];

static uint8_t *take(uint32_t *used, uint32_t bytes) {
    uint8_t *at = memory + *used;
    *used += (bytes + 15u) & ~15u;
    if (*used > sizeof memory) ek_exit(TOO_LARGE);
    return at;
}

static uint8_t *watched(uint32_t *used, uint32_t bytes) {
    uint8_t *at = take(used, bytes + 16);
    for (uint32_t i = 0; i < bytes + 16; i++) at[i] = 0x5a;
    return at;
}

static void check(const uint8_t *at, uint32_t bytes) {
    for (uint32_t i = 0; i < 16; i++)
        if (at[bytes + i] != 0x5a) ek_exit(OVERRUN);
}

static ek_conv2d conv(void) {
    return (ek_conv2d){a[1], a[2], a[3], a[4], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14],
                       v[15], v[16], v[17], v[18], v[19]};
}

static ek_pool pool(void) {
    return (ek_pool){a[1], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17],
                     v[18], v[19], v[20]};
}

static ek_binary binary(void) {
    const int bits = v[0];
    return (ek_binary){a[1], bits ? a[2] : 0, bits ? 0 : a[2], bits ? 0 : a[3], bits ? 0 : a[4], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8],
                       v[9], v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17], v[18], v[19]};
}

static void dispatch(uint32_t op, const int8_t *x, int8_t *y, void *scratch) {
    switch (op) {
    case CONV2D: { const ek_conv2d p = conv(); ek_conv2d_s8(&p, x, y, scratch); break; }
    case DEPTHWISE: { const ek_conv2d p = conv(); ek_depthwise_s8(&p, x, y, scratch); break; }
    case LINEAR: {
        const ek_linear p = {a[1], a[2], a[3], a[4], v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
        ek_linear_s8(&p, x, y, scratch);
        break;
    }
    case ADD: {
        const ek_add p = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]};
        ek_add_s8(&p, x, a[1], y);
        break;
    }
    case MUL: { const ek_mul p = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]}; ek_mul_s8(&p, x, a[1], y); break; }
    case REQUANT: { const ek_requant p = {v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; ek_requant_s8(&p, x, y); break; }
    case CLAMP: ek_clamp_s8(x, y, v[0], v[1], v[2]); break;
    case LUT: ek_lut_s8(a[1], x, y, v[0]); break;
    case SOFTMAX: { const ek_softmax p = {a[1], v[0], v[1], v[2], v[3], v[4]}; ek_softmax_s8(&p, x, y); break; }
    case AVERAGE: { const ek_pool p = pool(); ek_average_pool_s8(&p, x, y); break; }
    case MAXIMUM: { const ek_pool p = pool(); ek_max_pool_s8(&p, x, y); break; }
    case MEAN: { const ek_mean p = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]}; ek_mean_s8(&p, x, y); break; }
    case CONCAT: { const ek_concat p = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]}; ek_concat_s8(&p, x, y); break; }
    case PAD: { const ek_pad p = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]}; ek_pad_s8(&p, x, y); break; }
    case GATHER: {
        const ek_gather p = {{v[0], v[1], v[2], v[3]}, {v[4], v[5], v[6], v[7]}, v[8]};
        ek_gather_s8(&p, x, y);
        break;
    }
    case BINARIZE: { const ek_binarize p = {a[1], v[0], v[1], v[2]}; ek_binarize_s8(&p, x, y); break; }
    case BINARY_VECTORS: { const ek_binary p = binary(); ek_binary_vectors(&p, x, y, scratch); break; }
    case BINARY_PLANES: { const ek_binary p = binary(); ek_binary_planes(&p, x, y, scratch); break; }
    case BINARY_ROWS: { const ek_binary p = binary(); ek_binary_rows(&p, x, y, scratch); break; }
    case BINARY_MATMUL: {
        const ek_binary_matmul p = {a[2], v[0], v[1], v[2], v[3], v[4], v[5]};
        ek_binary_matmul_s8(&p, x, a[1], y, scratch);
        break;
    }
    case QUANTIZE: ek_quantize_f32((const float *)(const void *)x, y, v[0], *(float *)a[1], v[1]); break;
    case DEQUANTIZE: ek_dequantize_f32(x, (float *)(void *)y, v[0], *(float *)a[1], v[1]); break;
    case CRC: *(uint32_t *)(void *)y = ek_crc32(x, v[0]); break;
    case SCALE:
        for (int32_t i = 0; i < v[0]; i++)
            ((int32_t *)(void *)y)[i] = ek_requantize(((int32_t *)(void *)x)[i], ((int32_t *)a[1])[i], ((int8_t *)a[2])[i]);
        break;
    default: ek_exit(UNKNOWN);
    }
}

int ek_main(void) {
    uint32_t head[6];
    while (ek_input(head, sizeof head)) {
        uint32_t used = 0;
        if (head[4]) ek_input(v, head[4] * 4);
        for (uint32_t i = 0, bytes; i < head[5]; i++) {
            ek_input(&bytes, 4);
            a[i] = take(&used, bytes);
            if (bytes) ek_input(a[i], (bytes + 3u) & ~3u);
        }
        uint8_t *y = head[1] ? a[0] : watched(&used, head[2]), *scratch = watched(&used, head[3]);
        dispatch(head[0], a[0], (int8_t *)y, scratch);
        if (!head[1]) check(y, head[2]);
        check(scratch, head[3]);
        if (head[2]) ek_output(y, head[2]);
    }
    return 0;
}
