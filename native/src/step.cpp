// One layer of decoding for a few sequences, one token each: x + mixer(rms_norm(x)), in one parallel region with a barrier
// where a matrix product needs all of its input. Between the barriers every thread streams its own rows of the weights.

#include <omp.h>

#include <cmath>
#include <vector>

#include "linear.h"
#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

void rms_norm(const float* x, const float* weight, float* y, int64_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

// Turns the pairs (i, i + half) of a head.
void rotate(float* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

float dot(const float* x, const float* y, int64_t n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += x[i] * y[i];
    return total;
}

float* place(float* pool, const AttentionStep& a, int64_t row, int64_t position) {
    const int64_t block = a.table[row * a.table_stride + position / a.block_size];
    return pool + (block * a.block_size + position % a.block_size) * a.kv_heads * a.head_width;
}

// Attention of one query head over all keys of its sequence.
void attend(const AttentionStep& a, int64_t row, int64_t h, const float* q, float* out, std::vector<float>& weights) {
    const int64_t length = a.lengths[row], width = a.head_width, at = h / (a.heads / a.kv_heads) * width;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    weights.resize(length);
    float most = -INFINITY;
    for (int64_t j = 0; j < length; j++) {
        weights[j] = dot(q, place(a.k, a, row, j) + at, width) * scale;
        most = std::max(most, weights[j]);
    }
    float total = 0;
    std::fill_n(out, width, 0.0f);
    for (int64_t j = 0; j < length; j++) {
        const float weight = fast_exp(weights[j] - most), *value = place(a.v, a, row, j) + at;
        total += weight;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) out[i] += weight * value[i];
    }
    for (int64_t i = 0; i < width; i++) out[i] /= total;
}

}  // namespace

void attention_step(const AttentionStep& a, int threads) {
    const int64_t queries = a.heads * a.head_width, keys = a.kv_heads * a.head_width;
    std::vector<float> q(a.rows * queries), k(a.rows * keys), v(a.rows * keys), mixed(a.rows * queries);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        std::vector<float> x(a.rows * a.width), weights;
        for (int64_t r = 0; r < a.rows; r++) rms_norm(a.x + r * a.width, a.norm, &x[r * a.width], a.width, a.eps);
        const Part qs(queries, thread, team), ks(keys, thread, team);
        product({x.data(), a.wq, a.bq, q.data(), a.rows, a.width, queries}, qs.from, qs.to);
        product({x.data(), a.wk, a.bk, k.data(), a.rows, a.width, keys}, ks.from, ks.to);
        product({x.data(), a.wv, a.bv, v.data(), a.rows, a.width, keys}, ks.from, ks.to);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * (a.heads + a.kv_heads); task++) {
            const int64_t r = task / (a.heads + a.kv_heads), h = task % (a.heads + a.kv_heads) - a.kv_heads;
            float* head = h < 0 ? &k[r * keys + (h + a.kv_heads) * a.head_width] : &q[r * queries + h * a.head_width];
            const float* norm = h < 0 ? a.k_norm : a.q_norm;
            if (norm) rms_norm(head, norm, head, a.head_width, a.eps);
            if (a.half) rotate(head, a.cos + r * a.half, a.sin + r * a.half, a.half);
            if (h >= 0) continue;
            const int64_t at = (h + a.kv_heads) * a.head_width;
            std::copy_n(head, a.head_width, place(a.k, a, r, a.lengths[r] - 1) + at);
            std::copy_n(&v[r * keys + at], a.head_width, place(a.v, a, r, a.lengths[r] - 1) + at);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.rows * a.heads; task++) {
            const int64_t at = task * a.head_width;
            attend(a, task / a.heads, task % a.heads, &q[at], &mixed[at], weights);
        }
        const Part part(a.width, thread, team);
        product({mixed.data(), a.wo, a.bo, a.y, a.rows, queries, a.width}, part.from, part.to);
        for (int64_t r = 0; r < a.rows; r++)
            for (int64_t i = part.from; i < part.to; i++) a.y[r * a.width + i] += a.x[r * a.width + i];
    }
}

void mlp_step(const MlpStep& m, int threads) {
    std::vector<float> up(m.rows * m.wide), gate(m.gate ? m.rows * m.wide : 0);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num(), team = omp_get_num_threads();
        std::vector<float> x(m.rows * m.width);
        for (int64_t r = 0; r < m.rows; r++) rms_norm(m.x + r * m.width, m.norm, &x[r * m.width], m.width, m.eps);
        const Part wide(m.wide, thread, team);
        product({x.data(), m.up, m.up_bias, up.data(), m.rows, m.width, m.wide}, wide.from, wide.to);
        if (m.gate) product({x.data(), m.gate, m.gate_bias, gate.data(), m.rows, m.width, m.wide}, wide.from, wide.to);
        for (int64_t r = 0; r < m.rows; r++)
            for (int64_t i = r * m.wide + wide.from; i < r * m.wide + wide.to; i++) {
                const float positive = std::max(up[i], 0.0f);
                up[i] = m.gate ? up[i] * gate[i] * sigmoid(gate[i]) : positive * positive;
            }
#pragma omp barrier
        const Part part(m.width, thread, team);
        product({up.data(), m.down, m.down_bias, m.y, m.rows, m.wide, m.width}, part.from, part.to);
        for (int64_t r = 0; r < m.rows; r++)
            for (int64_t i = part.from; i < part.to; i++) m.y[r * m.width + i] += m.x[r * m.width + i];
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
