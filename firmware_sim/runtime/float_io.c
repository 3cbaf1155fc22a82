/* float32 to int8 and back. */
#include "internal.h"

EK_NOINLINE void ek_quantize_f32(const float *x, int8_t *y, uint32_t n, float inverse_scale, int8_t zero_point) {
    /* Adding 1.5 * 2^23 leaves no fraction bits, so the sum is rounded half to even; volatile keeps both steps apart from each other
     * and from the product (a fused multiply-add rounds once less). */
    const float magic = 12582912.0f;
    for (uint32_t i = 0; i < n; i++) {
        volatile float v = x[i] * inverse_scale;
        int32_t q = -128;
        if (v > 512.0f)
            q = 127;
        else if (v >= -512.0f) { /* NaN is not */
            v = v + magic;
            v = v - magic;
            q = ek_clamp((int32_t)v + zero_point, -128, 127);
        }
        y[i] = (int8_t)q;
    }
}

EK_NOINLINE void ek_dequantize_f32(const int8_t *x, float *y, uint32_t n, float scale, int8_t zero_point) {
    for (uint32_t i = 0; i < n; i++) y[i] = (float)(x[i] - zero_point) * scale;
}
