// y = x W^T + bias for a few rows of x: what decoding does. Each weight is read once, from memory, in one forward stream
// a thread, so that the work is to keep that stream running ahead of the arithmetic.
#pragma once

#include <algorithm>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
constexpr int most_rows = 8;  // of x in one pass over W

constexpr int64_t ahead = 1024;  // floats between the weights in use and those asked for from memory

// Rows [from, to) of W times `count` rows of x; `unrolled` vectors of a row have their own running sums.
template <int count, int unrolled>
inline void band(const Linear& l, const float* x, float* y, int64_t from, int64_t to) {
    constexpr int64_t step = unrolled * lanes;
    for (int64_t o = from; o < to; o++) {
        const float* w = l.weight + o * l.inputs;
        vec total[count][unrolled] = {};
        int64_t i = 0;
        for (; i + step <= l.inputs; i += step)
            for (int u = 0; u < unrolled; u++) {
                const int64_t at = i + u * lanes;
                __builtin_prefetch(w + at + ahead);
                const vec weight = load(w + at);
                for (int s = 0; s < count; s++) total[s][u] += load(x + s * l.inputs + at) * weight;
            }
        for (int s = 0; s < count; s++) {
            vec all = total[s][0];
            for (int u = 1; u < unrolled; u++) all += total[s][u];
            float value = sum(all) + (l.bias ? l.bias[o] : 0.0f);
            for (int64_t k = i; k < l.inputs; k++) value += x[s * l.inputs + k] * w[k];
            y[s * l.outputs + o] = value;
        }
    }
}

using Band = void (*)(const Linear&, const float*, float*, int64_t, int64_t);
constexpr Band bands[most_rows] = {band<1, 4>, band<2, 4>, band<3, 2>, band<4, 2>,
                              band<5, 1>, band<6, 1>, band<7, 1>, band<8, 1>};

// Outputs [from, to) of all rows.
inline void product(const Linear& l, int64_t from, int64_t to) {
    for (int64_t s = 0; s < l.rows; s += most_rows)
        bands[std::min<int64_t>(most_rows, l.rows - s) - 1](l, l.x + s * l.inputs, l.y + s * l.outputs, from, to);
}

// The part of `count` things that falls to one thread, in whole grains.
struct Part {
    int64_t from, to;
    Part(int64_t count, int thread, int threads, int64_t grain = 8) {
        const int64_t units = (count + grain - 1) / grain;
        from = std::min(count, units * thread / threads * grain);
        to = std::min(count, units * (thread + 1) / threads * grain);
    }
};

}  // namespace whimbrel::WHIMBREL_ISA
