// The layers of binary.h as kernels of ExecuTorch, operators edgekit_kernels::*.out; targets/executorch_binary.py has their schemas.
// Constants are as the frozen program has them, but for the order of a weight's bytes, which is that of binary.h.
#include "binary.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>

namespace {

using executorch::aten::ArrayRef;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using Context = executorch::runtime::KernelRuntimeContext;
using Ints = ArrayRef<int64_t>;

int32_t rows_before_last(const Tensor& t, int64_t last = 1)
{
    int64_t n = 1;
    for (int64_t i = 0; i < t.dim() - last; i++)
        n *= t.size(i);
    return static_cast<int32_t>(n);
}

Tensor& ended(Context& context, int failed, Tensor& out)
{
    if (failed)
        context.fail(Error::MemoryAllocationFailed);
    return out;
}

ekb_end to_bits(const Tensor& threshold, Tensor& out)
{
    ekb_end end = {};
    end.bits = out.mutable_data_ptr<uint8_t>();
    end.threshold = threshold.const_data_ptr<int32_t>();
    return end;
}

ekb_end to_integers(double out_scale, int64_t zp, int64_t low, int64_t high, Tensor& out)
{
    ekb_end end = {};
    end.integers = out.mutable_data_ptr<int8_t>();
    end.out_scale = static_cast<float>(out_scale);
    end.out_zp = static_cast<int32_t>(zp), end.low = static_cast<int32_t>(low), end.high = static_cast<int32_t>(high);
    return end;
}

// first: the dimension of the height in x and in out
ekb_conv geometry(const Tensor& x, const Tensor& weight, int64_t channels, Ints stride, Ints padding, Ints dilation, int64_t groups,
                  const Tensor& out, int64_t height)
{
    auto n = [](int64_t v) { return static_cast<int32_t>(v); };
    ekb_conv s = {};
    s.batch = n(x.size(0)), s.height = n(x.size(1)), s.width = n(x.size(2)), s.channels = n(channels);
    s.out_height = n(out.size(height)), s.out_width = n(out.size(height + 1)), s.out_channels = n(weight.size(0));
    for (int d = 0; d < 2; d++) {
        s.kernel[d] = n(weight.size(1 + d)), s.stride[d] = n(stride[d]), s.padding[d] = n(padding[d]);
        s.dilation[d] = n(dilation[d]);
    }
    s.groups = n(groups);
    return s;
}

Tensor& binarize(Context& context, const Tensor& x, const Tensor& threshold, int64_t dim, Tensor& out)
{
    int64_t outer = 1, inner = 1;
    dim += dim < 0 ? x.dim() : 0;
    for (int64_t i = 0; i < x.dim(); i++)
        (i < dim ? outer : inner) *= i == dim ? 1 : x.size(i);
    auto o = static_cast<int32_t>(outer), c = static_cast<int32_t>(x.size(dim)), i = static_cast<int32_t>(inner);
    auto count = static_cast<int32_t>(threshold.numel());
    if (x.scalar_type() == ScalarType::Float)
        ekb_binarize_float(o, c, i, x.const_data_ptr<float>(), threshold.const_data_ptr<float>(), count, out.mutable_data_ptr<uint8_t>());
    else if (x.scalar_type() == ScalarType::Char)
        ekb_binarize_int8(o, c, i, x.const_data_ptr<int8_t>(), threshold.const_data_ptr<int16_t>(), count, out.mutable_data_ptr<uint8_t>());
    else
        context.fail(Error::InvalidArgument);
    return out;
}

Tensor& conv2d(Context& context, const Tensor& x, const Tensor& weight, int64_t channels, const Tensor& threshold, Ints stride,
               Ints padding, Ints dilation, int64_t groups, Tensor& out)
{
    ekb_conv s = geometry(x, weight, channels, stride, padding, dilation, groups, out, 1);
    ekb_end end = to_bits(threshold, out);
    return ended(context, ekb_conv2d(&s, x.const_data_ptr<uint8_t>(), weight.const_data_ptr<uint8_t>(), &end), out);
}

Tensor& qconv2d(Context& context, const Tensor& x, const Tensor& weight, int64_t channels, const Tensor& scale, const Tensor& bias,
                double out_scale, int64_t out_zp, int64_t low, int64_t high, Ints stride, Ints padding, Ints dilation, int64_t groups,
                Tensor& out)
{
    ekb_conv s = geometry(x, weight, channels, stride, padding, dilation, groups, out, 2);
    ekb_end end = to_integers(out_scale, out_zp, low, high, out);
    end.scale = scale.const_data_ptr<float>(), end.bias = bias.const_data_ptr<int32_t>();
    return ended(context, ekb_conv2d(&s, x.const_data_ptr<uint8_t>(), weight.const_data_ptr<uint8_t>(), &end), out);
}

Tensor& linear(Context& context, const Tensor& x, const Tensor& weight, int64_t features, const Tensor& threshold, Tensor& out)
{
    ekb_end end = to_bits(threshold, out);
    int failed = ekb_linear(rows_before_last(x), static_cast<int32_t>(features), static_cast<int32_t>(weight.size(0)),
                            x.const_data_ptr<uint8_t>(), weight.const_data_ptr<uint8_t>(), &end);
    return ended(context, failed, out);
}

Tensor& qlinear(Context& context, const Tensor& x, const Tensor& weight, int64_t features, const Tensor& scale, const Tensor& bias,
                double out_scale, int64_t out_zp, int64_t low, int64_t high, Tensor& out)
{
    ekb_end end = to_integers(out_scale, out_zp, low, high, out);
    end.scale = scale.const_data_ptr<float>(), end.bias = bias.const_data_ptr<int32_t>();
    int failed = ekb_linear(rows_before_last(x), static_cast<int32_t>(features), static_cast<int32_t>(weight.size(0)),
                            x.const_data_ptr<uint8_t>(), weight.const_data_ptr<uint8_t>(), &end);
    return ended(context, failed, out);
}

Tensor& qmatmul(Context& context, const Tensor& a, const Tensor& b, int64_t features, bool a_unsigned, double scale, double out_scale,
                int64_t out_zp, int64_t low, int64_t high, Tensor& out)
{
    float one = static_cast<float>(scale);
    ekb_end end = to_integers(out_scale, out_zp, low, high, out);
    end.scale = &one;
    int failed = ekb_matmul(rows_before_last(a, 2), static_cast<int32_t>(a.size(a.dim() - 2)), static_cast<int32_t>(b.size(b.dim() - 2)),
                            static_cast<int32_t>(features), a_unsigned, a.const_data_ptr<uint8_t>(), b.const_data_ptr<uint8_t>(), &end);
    return ended(context, failed, out);
}

} // namespace

EXECUTORCH_LIBRARY(edgekit_kernels, "binarize.out", binarize);
EXECUTORCH_LIBRARY(edgekit_kernels, "binary_conv2d.out", conv2d);
EXECUTORCH_LIBRARY(edgekit_kernels, "binary_qconv2d.out", qconv2d);
EXECUTORCH_LIBRARY(edgekit_kernels, "binary_linear.out", linear);
EXECUTORCH_LIBRARY(edgekit_kernels, "binary_qlinear.out", qlinear);
EXECUTORCH_LIBRARY(edgekit_kernels, "binary_qmatmul.out", qmatmul);

// The rest of the library is hidden; these two are for tests and measurements.
extern "C" __attribute__((visibility("default"))) const char* edgekit_binary_isa(void) { return ekb_isa(); }
extern "C" __attribute__((visibility("default"))) int edgekit_binary_choose_isa(const char* name) { return ekb_choose_isa(name); }
