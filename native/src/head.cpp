// Losses of rows of logits, and in their place the gradient: (softmax - target) times what stands before each row, where the
// target is one entry (cross-entropy) or the softmax of a teacher (Kullback-Leibler divergence).

#include <cmath>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {

namespace {

float most_of(const float* x, int64_t columns) {
    const int64_t whole = columns - columns % lanes;
    vec tops = broadcast(x[0]);
    for (int64_t i = 0; i < whole; i += lanes) tops = larger(tops, load(x + i));
    float most = largest(tops);
    for (int64_t i = whole; i < columns; i++) most = std::max(most, x[i]);
    return most;
}

// What is no number stays none.
vec power(vec x) { return x == x ? fast_exp(x) : x; }
float power(float x) { return x == x ? fast_exp(x) : x; }

}  // namespace

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
        const float most = most_of(x, e.columns);
        vec total{};
        float rest = 0.0f;
        for (int64_t i = 0; i < whole; i += lanes) {
            const vec v = power(load(x + i) - most);
            total += v;
            if (e.learn) store(x + i, v);
        }
        for (int64_t i = whole; i < e.columns; i++) {
            const float v = power(x[i] - most);
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

// sum_v p_v ((t_v - log T) - (s_v - log S)), p the softmax of t.
void divergence(const Divergence& e, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < e.rows; r++) {
        float *s = e.logits + r * e.columns, *t = e.teacher + r * e.columns;
        e.loss[r] = 0.0f;
        if (!e.columns) continue;
        const int64_t whole = e.columns - e.columns % lanes;
        const float most_s = most_of(s, e.columns), most_t = most_of(t, e.columns);
        vec all_s{}, all_t{}, gap{};
        for (int64_t i = 0; i < whole; i += lanes) {
            const vec below_s = load(s + i) - most_s, below_t = load(t + i) - most_t, of_s = power(below_s), of_t = power(below_t);
            all_s += of_s, all_t += of_t, gap += of_t * (below_t - below_s);
            if (e.learn) store(s + i, of_s), store(t + i, of_t);
        }
        float sum_s = sum(all_s), sum_t = sum(all_t), sum_gap = sum(gap);
        for (int64_t i = whole; i < e.columns; i++) {
            const float below_s = s[i] - most_s, below_t = t[i] - most_t, of_s = power(below_s), of_t = power(below_t);
            sum_s += of_s, sum_t += of_t, sum_gap += of_t * (below_t - below_s);
            if (e.learn) s[i] = of_s, t[i] = of_t;
        }
        e.loss[r] = sum_gap / sum_t + static_cast<float>(std::log(static_cast<double>(sum_s)) - std::log(static_cast<double>(sum_t)));
        if (!e.learn) continue;
        const float up = e.up ? e.up[r] : 1.0f, scale_s = up / sum_s, scale_t = up / sum_t;
        for (int64_t i = 0; i < whole; i += lanes) store(s + i, load(s + i) * scale_s - load(t + i) * scale_t);
        for (int64_t i = whole; i < e.columns; i++) s[i] = s[i] * scale_s - t[i] * scale_t;
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
