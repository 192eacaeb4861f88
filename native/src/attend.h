// Attention of one token over keys and values in blocks: a piece of the context at a time, so that threads share a long one
// and the pieces, which do not depend on the threads, are put together at the end. All query heads of a key head go
// together: keys and values come from memory once.
#pragma once

#include <algorithm>
#include <cmath>

#include "half.h"
#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {

constexpr int64_t tile = 32;  // tokens whose weights are held at once

// Tokens of one piece: at most 32 pieces.
inline int64_t piece(int64_t length) { return std::max<int64_t>(64, (length + 2047) / 2048 * 64); }

// What a query head keeps of a piece: the largest score, the sum of the weights, and the weighted values [E].
inline int64_t kept(const Decode& d) { return d.head_width + 2; }

template <typename T>
struct Attend {
    const Decode& d;
    const Layer& l;
    const T* k[2 * tile];  // the tokens in hand, and the next ones
    const T* v[2 * tile];

    // Where the keys and values of tokens [from, from + count) of a row lie.
    void find(int64_t row, int64_t from, int64_t count, int64_t at) {
        const int64_t size = d.kv_heads * d.head_width;
        for (int64_t j = 0; j < count; j++) {
            const int64_t block = d.table[row * d.table_stride + (from + j) / d.block_size];
            const int64_t place = (block * d.block_size + (from + j) % d.block_size) * size;
            k[at + j] = static_cast<const T*>(l.keys) + place;
            v[at + j] = static_cast<const T*>(l.values) + place;
        }
    }

    // Tokens [from, to) of a row, all heads: q [heads, E] (scaled) to `out` [heads, kept].
    void piece(int64_t row, int64_t from, int64_t to, const float* q, float* out) {
        const int64_t group = d.heads / d.kv_heads;
        for (int64_t h = 0; h < d.heads; h++) {
            std::fill_n(out + h * kept(d), kept(d), 0.0f);
            out[h * kept(d)] = -INFINITY;
        }
        find(row, from, std::min(tile, to - from), 0);
        for (int64_t at = from; at < to; at += tile) {
            const int64_t count = std::min(tile, to - at), next = std::clamp<int64_t>(to - at - tile, 0, tile);
            find(row, at + tile, next, tile);
            for (int64_t h = 0; h < d.heads;) {
                const int64_t together = std::min<int64_t>(4, group - h % group), key = h / group * d.head_width;
                const float* queries = q + h * d.head_width;
                float* to_heads = out + h * kept(d);
                if (together == 4) heads<4>(queries, key, count, next, to_heads);
                if (together == 3) heads<3>(queries, key, count, next, to_heads);
                if (together == 2) heads<2>(queries, key, count, next, to_heads);
                if (together == 1) heads<1>(queries, key, count, next, to_heads);
                h += together;
            }
            std::copy_n(k + tile, next, k);
            std::copy_n(v + tile, next, v);
        }
    }

    // `wide` query heads of one key head over the tokens in hand.
    template <int wide>
    void heads(const float* q, int64_t key, int64_t count, int64_t next, float* out) {
        float weights[wide][tile];
        for (int64_t j = 0; j < tile; j++)
            for (int h = 0; h < wide; h++) weights[h][j] = -INFINITY;
        for (int64_t j = 0; j < count; j += 2) {
            ask(j, key, next), ask(j + 1, key, next);
            scores<wide>(q, key, j, std::min(j + 1, count - 1), weights);
        }
        float rescale[wide];
        for (int h = 0; h < wide; h++) {
            float *most = out + h * kept(d), largest = *most, total = 0;
            for (int64_t j = 0; j < tile; j++) largest = std::max(largest, weights[h][j]);
            for (int64_t j = 0; j < tile; j++) weights[h][j] = j < count ? fast_exp(weights[h][j] - largest) : 0.0f;
            for (int64_t j = 0; j < tile; j++) total += weights[h][j];
            rescale[h] = fast_exp(*most - largest);
            most[0] = largest;
            most[1] = most[1] * rescale[h] + total;
        }
        int64_t e = 0;
        for (; e + 2 * lanes <= d.head_width; e += 2 * lanes) mix<wide, 2>(key + e, count, weights, rescale, out + 2 + e);
        for (; e + lanes <= d.head_width; e += lanes) mix<wide, 1>(key + e, count, weights, rescale, out + 2 + e);
        for (; e < d.head_width; e++)
            for (int h = 0; h < wide; h++) {
                float& value = out[h * kept(d) + 2 + e];
                value *= rescale[h];
                for (int64_t j = 0; j < count; j++) value += weights[h][j] * widen(v[j][key + e]);
            }
    }

    // Ask memory for key and value of one head of the token that comes a tile later.
    void ask(int64_t j, int64_t key, int64_t next) const {
        if (j >= next) return;
        for (int64_t e = 0; e < d.head_width; e += 64 / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(k[tile + j] + key + e);
            __builtin_prefetch(v[tile + j] + key + e);
        }
    }

    // Scores of two tokens.
    template <int wide>
    void scores(const float* q, int64_t key, int64_t one, int64_t two, float (&weights)[wide][tile]) const {
        const T *first = k[one] + key, *second = k[two] + key;
        vec a[wide] = {}, b[wide] = {};
        int64_t e = 0;
        for (; e + lanes <= d.head_width; e += lanes) {
            const vec k_a = load(first + e), k_b = load(second + e);
            for (int h = 0; h < wide; h++) {
                const vec query = load(q + h * d.head_width + e);
                a[h] += query * k_a;
                b[h] += query * k_b;
            }
        }
        for (int h = 0; h < wide; h++) {
            float s = sum(a[h]), t = sum(b[h]);
            for (int64_t i = e; i < d.head_width; i++) {
                s += q[h * d.head_width + i] * widen(first[i]);
                t += q[h * d.head_width + i] * widen(second[i]);
            }
            weights[h][one] = s;
            weights[h][two] = t;
        }
    }

    // out = rescale * out + weights times `vectors` vectors of the values.
    template <int wide, int vectors>
    void mix(int64_t at, int64_t count, const float (&weights)[wide][tile], const float (&rescale)[wide], float* out) const {
        vec total[wide][vectors];
        for (int h = 0; h < wide; h++)
            for (int i = 0; i < vectors; i++) total[h][i] = load(out + h * kept(d) + i * lanes) * rescale[h];
        for (int64_t j = 0; j < count; j++) {
            vec value[vectors];
            for (int i = 0; i < vectors; i++) value[i] = load(v[j] + at + i * lanes);
            for (int h = 0; h < wide; h++)
                for (int i = 0; i < vectors; i++) total[h][i] += value[i] * weights[h][j];
        }
        for (int h = 0; h < wide; h++)
            for (int i = 0; i < vectors; i++) store(out + h * kept(d) + i * lanes, total[h][i]);
    }
};

// The attention of one head from its `pieces` pieces, [pieces, stride], in their order.
inline void join(const Decode& d, const float* pieces, int64_t count, int64_t stride, float* y) {
    float most = -INFINITY, total = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, pieces[i * stride]);
    std::fill_n(y, d.head_width, 0.0f);
    for (int64_t i = 0; i < count; i++) {
        const float* part = pieces + i * stride;
        const float weight = fast_exp(part[0] - most);
        total += weight * part[1];
        for (int64_t e = 0; e < d.head_width; e++) y[e] += weight * part[2 + e];
    }
    for (int64_t e = 0; e < d.head_width; e++) y[e] /= total;
}

}  // namespace whimbrel::WHIMBREL_ISA
