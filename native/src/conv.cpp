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

constexpr int64_t most_width = 64, block = 8;  // taps, and rows that one vector of channels passes through in registers

// Weights and bias of some channels, and the input rows of one output, oldest first. W 0: any width.
template <int W>
struct Taps {
    vec weight[W ? W : most_width], x[W ? W : most_width], bias;

    // Before the row whose older inputs are `rows`; `left` of the channels from i on are real.
    [[gnu::always_inline]] Taps(const Conv& c, const float* const* rows, int64_t i, int64_t left) : bias(c.bias ? load(c.bias + i, left) : vec{}) {
        UNROLL for (int k = 0; k < (W ? W : c.width); k++) weight[k] = load(c.weight + k * c.channels + i, left);
        UNROLL for (int k = 0; k < (W ? W : c.width); k++) x[k] = k < (W ? W : c.width) - 1 ? load(rows[k] + i, left) : vec{};
    }
    // What SiLU is applied to.
    [[gnu::always_inline]] vec total(int64_t width) const {
        vec v = bias;
        UNROLL for (int k = 0; k < (W ? W : width); k++) v += weight[k] * x[k];
        return v;
    }
    [[gnu::always_inline]] void shift(int64_t width) {
        UNROLL for (int k = 0; k < (W ? W : width) - 1; k++) x[k] = x[k + 1];
    }
};

template <int W>
void forward_band(const Conv& c, int64_t s, int64_t from, int64_t to) {
    const int64_t width = W ? W : c.width, history = width - 1, length = c.offsets[s + 1] - c.offsets[s];
    const float* taps[most_width + block];
    for (int64_t t = 0; t < length; t += block) {
        const int64_t count = std::min(block, length - t);
        float* const y = c.y + (c.offsets[s] + t) * c.channels;
        for (int64_t k = 0; k < count + history; k++) taps[k] = row(c, s, t - history + k);
        for (int64_t i = from; i < to; i += lanes) {
            const int64_t left = to - i;
            Taps<W> of(c, taps, i, left);
            for (int64_t r = 0; r < count; r++) {  // a band is a part of a row: what comes next is asked for
                const float* const x = taps[history + r] + i;
                __builtin_prefetch(x + block * c.x_stride), __builtin_prefetch(y + (block + r) * c.channels + i, 1);
                of.x[history] = load(x, left);
                const vec v = of.total(width);
                store(y + r * c.channels + i, v * sigmoid(v), left);
                of.shift(width);
            }
        }
    }
    for (int64_t k = 0; k < history; k++)
        std::copy(row(c, s, length - history + k) + from, row(c, s, length - history + k) + to,
                  c.tail + (s * history + k) * c.channels + from);
}

// dx_u = sum_k w_k dpre_{u + W-1 - k} is complete when dpre_{u + W-1} is known: the W-1 dpre before are kept.
template <int W>
void backward_band(const Conv& c, const ConvGradients& out, int64_t from, int64_t to) {
    const int64_t width = W ? W : c.width, history = width - 1, wide = round_up(to - from);
    std::vector<float> kept(history * wide), dw(width * wide), db(wide);
    const float* taps[most_width + block];
    for (int64_t s = 0; s < c.sequences; s++) {
        const int64_t length = c.offsets[s + 1] - c.offsets[s];
        std::fill(kept.begin(), kept.end(), 0.0f);
        for (int64_t t = 0; t < length + history; t += block) {
            const int64_t count = std::min(block, length + history - t);
            const float *dy[block], *dtail[block];
            float* dx[block];
            for (int64_t k = 0; k < count + history; k++) taps[k] = row(c, s, std::min(t - history + k, length - 1));
            for (int64_t r = 0; r < count; r++) {
                const int64_t u = t + r - history;
                dy[r] = t + r < length ? out.dy + (c.offsets[s] + t + r) * c.channels : nullptr;
                dx[r] = u >= 0 ? out.dx + (c.offsets[s] + u) * out.dx_stride : out.dinitial + (s * history + t + r) * c.channels;
                dtail[r] = out.dtail && u >= length - history ? out.dtail + (s * history + u - length + history) * c.channels : nullptr;
            }
            for (int64_t i = from; i < to; i += lanes) {
                const int64_t left = to - i, j = i - from;
                Taps<W> of(c, taps, i, left);
                vec past[W ? W : most_width], sum[W ? W : most_width], bias = load(&db[j]);
                UNROLL for (int k = 0; k < width; k++) sum[k] = load(&dw[k * wide + j]);
                UNROLL for (int k = 1; k < width; k++) past[k] = load(&kept[(k - 1) * wide + j]);
                for (int64_t r = 0; r < count; r++) {
                    __builtin_prefetch(dx[r] + block * out.dx_stride + i, 1);
                    past[0] = vec{};
                    if (dy[r]) {
                        const float* const x = taps[history + r] + i;
                        __builtin_prefetch(x + block * c.x_stride), __builtin_prefetch(dy[r] + block * c.channels + i);
                        of.x[history] = load(x, left);
                        const vec pre = of.total(width), gate = sigmoid(pre);
                        bias += past[0] = load(dy[r] + i, left) * gate * (1.0f + pre * (1.0f - gate));
                        UNROLL for (int k = 0; k < width; k++) sum[k] += of.x[k] * past[0];
                    }
                    vec all = dtail[r] ? load(dtail[r] + i, left) : vec{};
                    UNROLL for (int k = 0; k < width; k++) all += of.weight[k] * past[k];
                    store(dx[r] + i, all, left);
                    UNROLL for (int64_t k = history; k > 0; k--) past[k] = past[k - 1];
                    of.shift(width);
                }
                store(&db[j], bias);
                UNROLL for (int k = 0; k < width; k++) store(&dw[k * wide + j], sum[k]);
                UNROLL for (int k = 1; k < width; k++) store(&kept[(k - 1) * wide + j], past[k]);
            }
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
