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

// What SiLU is applied to, at channels i … of which `left` are real; taps are rows of the input, oldest first. W 0: any width.
template <int W>
[[gnu::always_inline]] inline vec total(const Conv& c, const float* const* taps, int64_t i, int64_t left) {
    vec v = c.bias ? load(c.bias + i, left) : vec{};
    if constexpr (W > 0) {
        UNROLL for (int k = 0; k < W; k++) v += load(c.weight + k * c.channels + i, left) * load(taps[k] + i, left);
    } else {
        for (int64_t k = 0; k < c.width; k++) v += load(c.weight + k * c.channels + i, left) * load(taps[k] + i, left);
    }
    return v;
}

constexpr int64_t most_width = 64;

template <int W>
void forward_band(const Conv& c, int64_t s, int64_t from, int64_t to) {
    const int64_t history = c.width - 1, length = c.offsets[s + 1] - c.offsets[s], whole = to - (to - from) % lanes;
    const float* taps[most_width] = {};
    for (int64_t t = 0; t < length; t++) {
        float* y = c.y + (c.offsets[s] + t) * c.channels;
        for (int64_t k = 0; k < c.width; k++) taps[k] = row(c, s, t - history + k);
        const auto some = [&](int64_t i, int64_t left) {
            const vec v = total<W>(c, taps, i, left);
            store(y + i, v * sigmoid(v), left);
        };
        for (int64_t i = from; i < whole; i += lanes) some(i, lanes);
        if (whole < to) some(whole, to - whole);
    }
    for (int64_t k = 0; k < history; k++)
        std::copy(row(c, s, length - history + k) + from, row(c, s, length - history + k) + to,
                  c.tail + (s * history + k) * c.channels + from);
}

// dx_u = sum_k w_k dpre_{u + W-1 - k} is complete when dpre_{u + W-1} is known: W rows of dpre lie in a ring.
template <int W>
void backward_band(const Conv& c, const ConvGradients& out, int64_t from, int64_t to) {
    const int64_t width = W > 0 ? W : c.width, history = width - 1, wide = round_up(to - from), whole = to - (to - from) % lanes;
    std::vector<float> ring(width * wide), dw(width * wide), db(wide);
    const float *taps[most_width] = {}, *newer[most_width] = {};
    for (int64_t s = 0; s < c.sequences; s++) {
        const int64_t length = c.offsets[s + 1] - c.offsets[s];
        std::fill(ring.begin(), ring.end(), 0.0f);
        for (int64_t t = 0; t < length + history; t++) {
            float* own = &ring[t % width * wide];
            const int64_t u = t - history;
            const float* dy = out.dy + (c.offsets[s] + t) * c.channels;
            float* dx = u >= 0 ? out.dx + (c.offsets[s] + u) * out.dx_stride : out.dinitial + (s * history + t) * c.channels;
            const float* dtail = out.dtail && u >= length - history ? out.dtail + (s * history + u - length + history) * c.channels : nullptr;
            for (int64_t k = 0; k < width; k++) {
                if (t < length) taps[k] = row(c, s, u + k);
                newer[k] = t >= k ? &ring[(t - k) % width * wide] : nullptr;
            }
            const auto some = [&](int64_t i, int64_t left) {
                const int64_t j = i - from;
                vec d{};
                if (t < length) {
                    const vec pre = total<W>(c, taps, i, left), gate = sigmoid(pre);
                    d = load(dy + i, left) * gate * (1.0f + pre * (1.0f - gate));
                    store(&db[j], load(&db[j]) + d);
                    UNROLL for (int64_t k = 0; k < width; k++) {
                        float* sum = &dw[k * wide + j];
                        store(sum, load(sum) + load(taps[k] + i, left) * d);
                    }
                }
                store(own + j, d);
                vec all = dtail ? load(dtail + i, left) : vec{};
                UNROLL for (int64_t k = 0; k < width; k++)
                    if (newer[k]) all += load(c.weight + k * c.channels + i, left) * load(newer[k] + j);
                store(dx + i, all, left);
            };
            for (int64_t i = from; i < whole; i += lanes) some(i, lanes);
            if (whole < to) some(whole, to - whole);
        }
    }
    for (int64_t k = 0; k < width; k++) std::copy_n(&dw[k * wide], to - from, out.dweight + k * c.channels + from);
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
        (c.width == 4 ? forward_band<4> : forward_band<0>)(c, task % c.sequences, from, std::min(c.channels, from + wide));
    }
}

void conv_backward(const Conv& c, const ConvGradients& out, int threads) {
    const int64_t wide = band(c.channels, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t from = 0; from < c.channels; from += wide)
        (c.width == 4 ? backward_band<4> : backward_band<0>)(c, out, from, std::min(c.channels, from + wide));
}

}  // namespace whimbrel::WHIMBREL_ISA
