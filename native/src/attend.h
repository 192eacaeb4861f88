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
        constexpr int together = std::min(8, lanes / (wide > 2 ? 4 : wide));  // tokens: as many sums as a vector has lanes
        for (int64_t j = 0; j < count; j += together) {
            for (int64_t i = j; i < j + together; i++) ask(i, key, next);
            scores<wide, together>(q, key, j, count - 1, weights);
        }
        for (int h = 0; h < wide; h++) std::fill(weights[h] + count, weights[h] + tile, -INFINITY);
        float rescale[wide];
        for (int h = 0; h < wide; h++) {
            float* most = out + h * kept(d);
            vec high = broadcast(*most), total{};
            for (int64_t j = 0; j < tile; j += lanes) high = larger(high, load(weights[h] + j));
            const float top = largest(high);
            for (int64_t j = 0; j < tile; j += lanes) {
                const vec weight = fast_exp(load(weights[h] + j) - top);
                store(weights[h] + j, weight);
                total += weight;
            }
            rescale[h] = fast_exp(*most - top);
            most[0] = top;
            most[1] = most[1] * rescale[h] + sum(total);
        }
        int64_t e = 0;
        if (lanes == 16)
            for (; e + 4 * lanes <= d.head_width; e += 4 * lanes) mix<wide, 4>(key + e, count, weights, rescale, out + 2 + e);
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
    // Inlined before gcc looks for functions without effects, or it would drop the calls.
    [[gnu::always_inline]] void ask(int64_t j, int64_t key, int64_t next) const {
        if (j >= next) return;
        for (int64_t e = 0; e < d.head_width; e += 64 / static_cast<int64_t>(sizeof(T))) {
            __builtin_prefetch(k[tile + j] + key + e);
            __builtin_prefetch(v[tile + j] + key + e);
        }
    }

    // Scores of `count` tokens from `one` on; after the `last` it is taken again.
    template <int wide, int count>
    void scores(const float* q, int64_t key, int64_t one, int64_t last, float (&weights)[wide][tile]) const {
        constexpr int high = wide > 2 ? 4 : wide;
        const T* from[count];
        UNROLL for (int j = 0; j < count; j++) from[j] = k[std::min(one + j, last)] + key;
        vec total[high * count] = {};
        int64_t e = 0;
        for (; e + lanes <= d.head_width; e += lanes) {
            vec query[wide];
            UNROLL for (int h = 0; h < wide; h++) query[h] = load(q + h * d.head_width + e);
            UNROLL for (int j = 0; j < count; j++) {
                const vec it = load(from[j] + e);
                UNROLL for (int h = 0; h < wide; h++) total[h * count + j] += query[h] * it;
            }
        }
        float all[std::max(high * count, lanes)];
        sums(total, all);
        UNROLL for (int h = 0; h < wide; h++)
            UNROLL for (int j = 0; j < count; j++) {
                float& value = weights[h][one + j] = all[h * count + j];
                for (int64_t i = e; i < d.head_width; i++) value += q[h * d.head_width + i] * widen(from[j][i]);
            }
    }

    // out = rescale * out + weights times `vectors` vectors of the values.
    template <int wide, int vectors>
    void mix(int64_t at, int64_t count, const float (&weights)[wide][tile], const float (&rescale)[wide], float* out) const {
        vec total[wide][vectors];
        UNROLL for (int h = 0; h < wide; h++)
            UNROLL for (int i = 0; i < vectors; i++) total[h][i] = load(out + h * kept(d) + i * lanes) * rescale[h];
        for (int64_t j = 0; j < count; j++) {
            vec value[vectors];
            UNROLL for (int i = 0; i < vectors; i++) value[i] = load(v[j] + at + i * lanes);
            UNROLL for (int h = 0; h < wide; h++)
                UNROLL for (int i = 0; i < vectors; i++) total[h][i] += value[i] * weights[h][j];
        }
        UNROLL for (int h = 0; h < wide; h++)
            UNROLL for (int i = 0; i < vectors; i++) store(out + h * kept(d) + i * lanes, total[h][i]);
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
