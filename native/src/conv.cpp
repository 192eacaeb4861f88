// Causal depth-wise convolution and SiLU, forward and backward, one band of channels a thread.
// y_t = silu(bias + sum_k w_k x_{t - (W-1) + k}); before a sequence stand its W-1 initial rows.

#include <algorithm>
#include <vector>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

// The input row at place t of a sequence; places -W+1 … -1 are its initial rows.
const float* row(const Conv& c, int64_t sequence, int64_t t) {
    if (t >= 0) return c.x + (c.offsets[sequence] + t) * c.x_stride;
    return c.initial + (sequence * (c.width - 1) + t + c.width - 1) * c.channels;
}

void forward_band(const Conv& c, int64_t s, int64_t from, int64_t to) {
    const int64_t history = c.width - 1, length = c.offsets[s + 1] - c.offsets[s];
    std::vector<const float*> taps(c.width);
    for (int64_t t = 0; t < length; t++) {
        float *pre = c.pre + (c.offsets[s] + t) * c.channels, *y = c.y + (c.offsets[s] + t) * c.channels;
        for (int64_t k = 0; k < c.width; k++) taps[k] = row(c, s, t - history + k);
        for (int64_t i = from; i < to; i += lanes) {
            const int64_t n = to - i;
            vec v = c.bias ? load(c.bias + i, n) : vec{};
            for (int64_t k = 0; k < c.width; k++) v += load(c.weight + k * c.channels + i, n) * load(taps[k] + i, n);
            store(pre + i, v, n), store(y + i, v * sigmoid(v), n);
        }
    }
    for (int64_t k = 0; k < history; k++)
        std::copy(row(c, s, length - history + k) + from, row(c, s, length - history + k) + to,
                  c.tail + (s * history + k) * c.channels + from);
}

// dx_u = sum_k w_k dpre_{u + W-1 - k} is complete when dpre_{u + W-1} is known: W rows of dpre lie in a ring.
void backward_band(const Conv& c, const ConvGradients& out, int64_t from, int64_t to) {
    const int64_t history = c.width - 1, wide = round_up(to - from);
    std::vector<float> ring(c.width * wide), dw(c.width * wide), db(wide);
    for (int64_t s = 0; s < c.sequences; s++) {
        const int64_t length = c.offsets[s + 1] - c.offsets[s];
        std::fill(ring.begin(), ring.end(), 0.0f);
        for (int64_t t = 0; t < length + history; t++) {
            float* own = &ring[t % c.width * wide];
            const int64_t place = (c.offsets[s] + t) * c.channels, u = t - history;
            float* dx = u >= 0 ? out.dx + (c.offsets[s] + u) * c.channels : out.dinitial + (s * history + t) * c.channels;
            const float* dtail = u >= length - history ? out.dtail + (s * history + u - length + history) * c.channels : nullptr;
            for (int64_t i = from; i < to; i += lanes) {
                const int64_t n = to - i, j = i - from;
                vec d{};
                if (t < length) {
                    const vec pre = load(c.pre + place + i, n), gate = sigmoid(pre);
                    d = load(out.dy + place + i, n) * gate * (1.0f + pre * (1.0f - gate));
                    store(&db[j], load(&db[j]) + d);
                    for (int64_t k = 0; k < c.width; k++) {
                        float* sum = &dw[k * wide + j];
                        store(sum, load(sum) + load(row(c, s, u + k) + i, n) * d);
                    }
                }
                store(own + j, d);
                vec total = dtail ? load(dtail + i, n) : vec{};
                for (int64_t k = 0; k <= std::min(t, history); k++)
                    total += load(c.weight + k * c.channels + i, n) * load(&ring[(t - k) % c.width * wide + j]);
                store(dx + i, total, n);
            }
        }
    }
    for (int64_t k = 0; k < c.width; k++) std::copy_n(&dw[k * wide], to - from, out.dweight + k * c.channels + from);
    std::copy_n(db.data(), to - from, out.dbias + from);
}

// Channels of a task: at most 512, so that W rows of sums stay in the first-level cache, and as many tasks for each thread.
int64_t band(int64_t channels, int threads) {
    const int64_t bands = ((channels + 511) / 512 + threads - 1) / threads * threads;
    return round_up((channels + bands - 1) / bands);
}

}  // namespace

void conv_forward(const Conv& c, int threads) {
    const int64_t wide = band(c.channels, threads), bands = (c.channels + wide - 1) / wide;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < bands * c.sequences; task++) {
        const int64_t from = task / c.sequences * wide;
        forward_band(c, task % c.sequences, from, std::min(c.channels, from + wide));
    }
}

void conv_backward(const Conv& c, const ConvGradients& out, int threads) {
    const int64_t wide = band(c.channels, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < c.channels; from += wide) backward_band(c, out, from, std::min(c.channels, from + wide));
}

}  // namespace whimbrel::WHIMBREL_ISA
