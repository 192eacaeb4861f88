// out = RMSNorm(y * silu(gate)) inside each group of channels, times weight: the gate comes first. Forward and backward in one pass each.

#include <cmath>
#include <vector>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {

void gated_norm_forward(const GatedNorm& n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < n.tokens * n.groups; task++) {
        const int64_t t = task / n.groups, g = task % n.groups, at = task * n.width;
        const float *y = n.y + at, *gate = n.gate + t * n.gate_stride + g * n.width, *weight = n.weight + g * n.width;
        float* out = n.out + at;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n.width; i++) {
            out[i] = y[i] * gate[i] * sigmoid(gate[i]);
            squares += out[i] * out[i];
        }
        const float scale = 1.0f / std::sqrt(squares / static_cast<float>(n.width) + n.eps);
        n.scale[task] = scale;
        for (int64_t i = 0; i < n.width; i++) out[i] *= scale * weight[i];
    }
}

// With v = y silu(gate), u = v * scale: dv = scale (w dout - u mean(u w dout)).
void gated_norm_backward(const GatedNorm& n, const GatedNormGradients& grads, int threads) {
    const int64_t rows = (n.tokens + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float* dweight = grads.dweight + part * n.groups * n.width;
        std::vector<float> unit(n.width), open(n.width);
        const int64_t end = std::min<int64_t>(n.tokens, (part + 1) * rows);
        for (int64_t task = part * rows * n.groups; task < end * n.groups; task++) {
            const int64_t t = task / n.groups, g = task % n.groups, at = task * n.width;
            const float *y = n.y + at, *gate = n.gate + t * n.gate_stride + g * n.width, *weight = n.weight + g * n.width;
            const float *dout = grads.dout + at, scale = n.scale[task];
            float *dy = grads.dy + at, *dgate = grads.dgate + at, *dw = dweight + g * n.width;
            float mean = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < n.width; i++) {
                open[i] = sigmoid(gate[i]);
                unit[i] = y[i] * gate[i] * open[i] * scale;
                dw[i] += dout[i] * unit[i];
                mean += dout[i] * weight[i] * unit[i];
            }
            mean /= static_cast<float>(n.width);
            for (int64_t i = 0; i < n.width; i++) {
                const float dv = scale * (weight[i] * dout[i] - unit[i] * mean);
                dy[i] = dv * gate[i] * open[i];
                dgate[i] = dv * y[i] * open[i] * (1.0f + gate[i] * (1.0f - open[i]));
            }
        }
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
