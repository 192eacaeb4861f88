// Causal depth-wise convolution and SiLU, forward and backward, one band of channels a thread.
// y_t = silu(bias + sum_k w_k x_{t - (W-1) + k}); before a sequence stand its W-1 initial rows.

#include <algorithm>
#include <vector>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t band = 64;  // channels a task works on, so that its rows stay in the first-level cache

// The input row at place t of a sequence; places -W+1 … -1 are its initial rows.
const float* row(const Conv& c, int64_t sequence, int64_t t) {
    if (t >= 0) return c.x + (c.offsets[sequence] + t) * c.x_stride;
    return c.initial + (sequence * (c.width - 1) + t + c.width - 1) * c.channels;
}

void forward_band(const Conv& c, int64_t from, int64_t to) {
    const int64_t history = c.width - 1;
    for (int64_t s = 0; s < c.sequences; s++) {
        const int64_t length = c.offsets[s + 1] - c.offsets[s];
        for (int64_t t = 0; t < length; t++) {
            float* pre = c.pre + (c.offsets[s] + t) * c.channels;
            float* y = c.y + (c.offsets[s] + t) * c.channels;
            for (int64_t i = from; i < to; i++) pre[i] = c.bias ? c.bias[i] : 0.0f;
            for (int64_t k = 0; k < c.width; k++) {
                const float *x = row(c, s, t - history + k), *w = c.weight + k * c.channels;
                for (int64_t i = from; i < to; i++) pre[i] += w[i] * x[i];
            }
            for (int64_t i = from; i < to; i++) y[i] = pre[i] * sigmoid(pre[i]);
        }
        for (int64_t k = 0; k < history; k++)
            std::copy(row(c, s, length - history + k) + from, row(c, s, length - history + k) + to,
                      c.tail + (s * history + k) * c.channels + from);
    }
}

void backward_band(const Conv& c, const ConvGradients& out, int64_t from, int64_t to) {
    const int64_t history = c.width - 1, wide = to - from;
    std::vector<float> dpre(wide), dw(c.width * wide, 0), db(wide, 0);
    for (int64_t s = 0; s < c.sequences; s++) {
        const int64_t length = c.offsets[s + 1] - c.offsets[s];
        const auto target = [&](int64_t t) {
            return t >= 0 ? out.dx + (c.offsets[s] + t) * c.channels : out.dinitial + (s * history + t + history) * c.channels;
        };
        for (int64_t t = -history; t < length; t++) std::fill(target(t) + from, target(t) + to, 0.0f);
        for (int64_t k = 0; k < history; k++) {
            const float* dtail = out.dtail + (s * history + k) * c.channels;
            float* to_row = target(length - history + k);
            for (int64_t i = from; i < to; i++) to_row[i] += dtail[i];
        }
        for (int64_t t = 0; t < length; t++) {
            const float *pre = c.pre + (c.offsets[s] + t) * c.channels, *dy = out.dy + (c.offsets[s] + t) * c.channels;
            for (int64_t i = from; i < to; i++) {
                const float gate = sigmoid(pre[i]);
                dpre[i - from] = dy[i] * gate * (1.0f + pre[i] * (1.0f - gate));
                db[i - from] += dpre[i - from];
            }
            for (int64_t k = 0; k < c.width; k++) {
                const float *x = row(c, s, t - history + k), *w = c.weight + k * c.channels;
                float *dx = target(t - history + k), *dwk = &dw[k * wide];
                for (int64_t i = from; i < to; i++) dx[i] += w[i] * dpre[i - from];
                for (int64_t i = from; i < to; i++) dwk[i - from] += x[i] * dpre[i - from];
            }
        }
    }
    for (int64_t k = 0; k < c.width; k++) std::copy_n(&dw[k * wide], wide, out.dweight + k * c.channels + from);
    std::copy_n(db.data(), wide, out.dbias + from);
}

}  // namespace

void conv_forward(const Conv& c, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < c.channels; from += band) forward_band(c, from, std::min(c.channels, from + band));
}

void conv_backward(const Conv& c, const ConvGradients& out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < c.channels; from += band) backward_band(c, out, from, std::min(c.channels, from + band));
}

}  // namespace whimbrel::WHIMBREL_ISA
