// out = RMSNorm(y * silu(gate)) inside each group of channels, times weight: the gate comes first; without a gate RMSNorm alone.
// Forward and backward in one pass each. And the squared ReLU.

#include <cmath>
#include <vector>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {

static vec root(vec x) {
    for (int i = 0; i < lanes; i++) x[i] = std::sqrt(x[i]);
    return x;
}

void gated_norm_forward(const GatedNorm& n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < n.tokens * n.groups; task++) {
        const int64_t t = task / n.groups, g = task % n.groups, at = task * n.width;
        const float *y = n.y + at, *gate = n.gate ? n.gate + t * n.gate_stride + g * n.width : nullptr, *weight = n.weight + g * n.width;
        float* out = n.out + at;
        vec squares{};
        for (int64_t i = 0; i < n.width; i += lanes) {
            vec v = load(y + i, n.width - i);
            if (gate) {
                const vec z = load(gate + i, n.width - i);
                __builtin_prefetch(gate + n.gate_stride + i);  // rows of a gate lie apart, which a processor does not foresee
                v *= z * sigmoid(z);
                store(out + i, v, n.width - i);
            }
            squares += v * v;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n.width) + n.eps);
        n.scale[task] = scale;
        const float* from = gate ? out : y;
        for (int64_t i = 0; i < n.width; i += lanes)
            store(out + i, load(from + i, n.width - i) * scale * load(weight + i, n.width - i), n.width - i);
    }
}

// With v = y silu(gate), u = v * scale: dv = scale (w dout - u mean(u w dout)).
void gated_norm_backward(const GatedNorm& n, const GatedNormGradients& grads, int threads) {
    const int64_t rows = (n.tokens + threads - 1) / threads;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float* dweight = grads.dweight + part * n.groups * n.width;
        std::vector<float> unit(round_up(n.width)), open(round_up(n.width));
        const int64_t end = std::min<int64_t>(n.tokens, (part + 1) * rows);
        for (int64_t task = part * rows * n.groups; task < end * n.groups; task++) {
            const int64_t t = task / n.groups, g = task % n.groups, at = task * n.width;
            const float *y = n.y + at, *gate = n.gate ? n.gate + t * n.gate_stride + g * n.width : nullptr;
            const float *weight = n.weight + g * n.width, *dout = grads.dout + at, scale = n.scale[task];
            float *dy = grads.dy + at, *dgate = gate ? grads.dgate + t * grads.dgate_stride + g * n.width : nullptr, *dw = dweight + g * n.width;
            vec total{};
            for (int64_t i = 0; i < n.width; i += lanes) {
                const int64_t left = n.width - i;
                vec u = load(y + i, left) * scale;
                if (gate) {
                    const vec z = load(gate + i, left), s = sigmoid(z);
                    __builtin_prefetch(gate + n.gate_stride + i), __builtin_prefetch(dgate + grads.dgate_stride + i, 1);
                    store(&open[i], s);
                    u *= z * s;
                }
                const vec d = load(dout + i, left) * u;
                store(&unit[i], u), store(dw + i, load(dw + i, left) + d, left);
                total += d * load(weight + i, left);
            }
            const float mean = sum(total) / static_cast<float>(n.width);
            for (int64_t i = 0; i < n.width; i += lanes) {
                const int64_t left = n.width - i;
                const vec dv = scale * (load(weight + i, left) * load(dout + i, left) - load(&unit[i]) * mean);
                if (gate) {
                    const vec z = load(gate + i, left), s = load(&open[i]);
                    store(dy + i, dv * z * s, left), store(dgate + i, dv * load(y + i, left) * s * (1.0f + z * (1.0f - s)), left);
                } else {
                    store(dy + i, dv, left);
                }
            }
        }
    }
}

// out = max(x, 0)^2, or with dy its gradient 2 max(x, 0) dy; the root of a square is what was squared, to the last bit.
void relu2(const Relu2& r, int threads) {
    constexpr int64_t piece = 4096;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < r.count; from += piece)
        for (int64_t i = from; i < std::min(r.count, from + piece); i += lanes) {
            const int64_t left = r.count - i;
            const vec x = load(r.x + i, left), up = r.squared ? root(x) : above_zero(x);
            store(r.out + i, r.dy ? 2.0f * up * load(r.dy + i, left) : up * up, left);
        }
}

}  // namespace whimbrel::WHIMBREL_ISA
