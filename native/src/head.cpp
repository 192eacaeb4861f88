// Cross-entropy of rows of logits, and in their place its gradient: (softmax - target) times what stands before each row.

#include <cmath>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {

void cross_entropy(const Entropy& e, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < e.rows; r++) {
        float* x = e.logits + r * e.columns;
        const int64_t target = e.targets[r], whole = e.columns - e.columns % lanes;
        const float up = target < 0 ? 0.0f : e.up ? e.up[r] : 1.0f, chosen = target < 0 ? 0.0f : x[target];
        if (target < 0) e.loss[r] = 0.0f;
        if (target < 0 || !e.columns) {
            if (e.learn) std::fill_n(x, e.columns, 0.0f);
            continue;
        }
        float most = x[0];
        vec tops = broadcast(most), total{};
        for (int64_t i = 0; i < whole; i += lanes) tops = larger(tops, load(x + i));
        most = largest(tops);
        for (int64_t i = whole; i < e.columns; i++) most = std::max(most, x[i]);
        float rest = 0.0f;
        for (int64_t i = 0; i < whole; i += lanes) {
            const vec from = load(x + i), v = from == from ? fast_exp(from - most) : from;  // what is no number stays none
            total += v;
            if (e.learn) store(x + i, v);
        }
        for (int64_t i = whole; i < e.columns; i++) {
            const float v = x[i] == x[i] ? fast_exp(x[i] - most) : x[i];
            rest += v;
            if (e.learn) x[i] = v;
        }
        rest += sum(total);
        e.loss[r] = std::log(rest) + (most - chosen);
        if (!e.learn) continue;
        const float scale = up / rest;
        for (int64_t i = 0; i < whole; i += lanes) store(x + i, load(x + i) * scale);
        for (int64_t i = whole; i < e.columns; i++) x[i] *= scale;
        x[target] -= up;
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
