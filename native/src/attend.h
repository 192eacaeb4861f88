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

constexpr int64_t stretch = 512;  // tokens whose weights are held at once
constexpr int64_t step = 8;       // tokens whose keys are read for one key head after the other
constexpr int64_t tile = 16;      // ... and values

// Elements of a cache line.
template <typename T>
constexpr int64_t line = 64 / sizeof(T);

// Tokens of one piece: at most 32 pieces.
inline int64_t piece(int64_t length) { return std::max<int64_t>(64, (length + 2047) / 2048 * 64); }

// What a query head keeps of a piece: the largest score, the sum of the weights, and the weighted values [E].
inline int64_t kept(const Decode& d) { return d.head_width + 2; }

// What to ask of memory next: cache lines of rows [0, count) in the order in which they lie. Products jump from head to head and
// from token to token, and lines asked for in that order come at half the speed: processors foresee what goes straight on.
template <typename T>
struct Ahead {
    const T* const* rows;
    int64_t count, width, row, at = 0;

    // Inlined before gcc looks for functions without effects, or it would drop the calls.
    [[gnu::always_inline]] void ask() {
        if (row >= count) return;
        __builtin_prefetch(rows[row] + at);
        at += line<T>;
        if (at >= width) at = 0, row++;
    }
};

template <typename T>
struct Attend {
    const Decode& d;
    const Layer& l;
    float* weights;            // [heads, stretch]
    const T* rows[2 * stretch];  // keys, then values, of the tokens in hand

    // Where the keys and values of tokens [from, from + count) of a row lie.
    void find(int64_t row, int64_t from, int64_t count) {
        const int64_t size = d.kv_heads * d.head_width;
        for (int64_t j = 0; j < count; j++) {
            const int64_t block = d.table[row * d.table_stride + (from + j) / d.block_size];
            const int64_t place = (block * d.block_size + (from + j) % d.block_size) * size;
            rows[j] = static_cast<const T*>(l.keys) + place;
            rows[count + j] = static_cast<const T*>(l.values) + place;
        }
    }

    // Tokens [from, to) of a row, all heads: q [heads, E] (scaled) to `out` [heads, kept].
    void piece(int64_t row, int64_t from, int64_t to, const float* q, float* out) {
        for (int64_t h = 0; h < d.heads; h++) {
            std::fill_n(out + h * kept(d), kept(d), 0.0f);
            out[h * kept(d)] = -INFINITY;
        }
        for (int64_t at = from; at < to; at += stretch) {
            const int64_t count = std::min(stretch, to - at);
            find(row, at, count);
            Ahead<T> ahead{rows, 2 * count, d.kv_heads * d.head_width, 2 * step};
            for (int64_t j = 0; j < count; j += step)
                each([&]<int wide>(int64_t h, int64_t key, bool first) {
                    scores<wide>(q + h * d.head_width, key, j, count - 1, weights + h * stretch, first ? &ahead : nullptr);
                });
            for (int64_t h = 0; h < d.heads; h++) weigh(weights + h * stretch, count, out + h * kept(d));
            for (int64_t j = 0; j < count; j += tile)
                each([&]<int wide>(int64_t h, int64_t key, bool first) {
                    values<wide>(key, count + j, std::min(tile, count - j), weights + h * stretch + j, out + h * kept(d) + 2,
                                 first ? &ahead : nullptr);
                });
        }
    }

    // Calls `work` for all heads, up to four of one key head at a time.
    [[gnu::always_inline]] void each(auto work) const {
        const int64_t group = d.heads / d.kv_heads;
        for (int64_t h = 0; h < d.heads;) {
            const int64_t left = std::min<int64_t>(4, group - h % group), key = h / group * d.head_width;
            const bool first = h % group == 0;
            if (left == 4) work.template operator()<4>(h, key, first);
            if (left == 3) work.template operator()<3>(h, key, first);
            if (left == 2) work.template operator()<2>(h, key, first);
            if (left == 1) work.template operator()<1>(h, key, first);
            h += left;
        }
    }

    // Scores of `step` tokens from `one` on; after the `last` it is taken again.
    template <int wide>
    void scores(const float* q, int64_t key, int64_t one, int64_t last, float* to, Ahead<T>* ahead) const {
        constexpr int high = wide > 2 ? 4 : wide, count = std::min<int>(step, lanes / high);  // as many sums as a vector has lanes
        for (int64_t many = 0; many < step; many += count, one += count) {
            const T* from[count];
            UNROLL for (int j = 0; j < count; j++) from[j] = rows[std::min(one + j, last)] + key;
            vec total[high * count] = {};
            int64_t e = 0;
            for (; e + lanes <= d.head_width; e += lanes) {
                vec query[wide];
                UNROLL for (int h = 0; h < wide; h++) query[h] = load(q + h * d.head_width + e);
                UNROLL for (int j = 0; j < count; j++) {
                    if (ahead && e % line<T> == 0) ahead->ask();
                    const vec it = load(from[j] + e);
                    UNROLL for (int h = 0; h < wide; h++) total[h * count + j] += query[h] * it;
                }
            }
            float all[std::max(high * count, lanes)];
            sums(total, all);
            UNROLL for (int h = 0; h < wide; h++)
                UNROLL for (int j = 0; j < count; j++) {
                    float& value = to[h * stretch + one + j] = all[h * count + j];
                    for (int64_t i = e; i < d.head_width; i++) value += q[h * d.head_width + i] * widen(from[j][i]);
                }
        }
    }

    // Scores of one head to weights; what it had before goes down to the new largest score.
    void weigh(float* score, int64_t count, float* head) const {
        std::fill(score + count, score + round_up(count), -INFINITY);
        vec high = broadcast(*head), total{};
        for (int64_t j = 0; j < count; j += lanes) high = larger(high, load(score + j));
        const float top = largest(high), rescale = fast_exp(*head - top);
        for (int64_t j = 0; j < count; j += lanes) {
            const vec weight = fast_exp(load(score + j) - top);
            store(score + j, weight);
            total += weight;
        }
        head[0] = top;
        head[1] = head[1] * rescale + sum(total);
        for (int64_t e = 2; e < kept(d); e++) head[e] *= rescale;
    }

    // Adds the weighted values of `count` tokens whose rows begin with `one`.
    template <int wide>
    void values(int64_t key, int64_t one, int64_t count, const float* weight, float* out, Ahead<T>* ahead) const {
        int64_t e = 0;
        if (lanes == 16)
            for (; e + 4 * lanes <= d.head_width; e += 4 * lanes) mix<wide, 4>(key + e, one, count, weight, out + e, ahead);
        for (; e + 2 * lanes <= d.head_width; e += 2 * lanes) mix<wide, 2>(key + e, one, count, weight, out + e, ahead);
        for (; e + lanes <= d.head_width; e += lanes) mix<wide, 1>(key + e, one, count, weight, out + e, ahead);
        for (; e < d.head_width; e++)
            for (int h = 0; h < wide; h++)
                for (int64_t j = 0; j < count; j++) out[h * kept(d) + e] += weight[h * stretch + j] * widen(rows[one + j][key + e]);
    }

    // ... `vectors` vectors of them.
    template <int wide, int vectors>
    void mix(int64_t at, int64_t one, int64_t count, const float* weight, float* out, Ahead<T>* ahead) const {
        vec total[wide][vectors];
        UNROLL for (int h = 0; h < wide; h++)
            UNROLL for (int i = 0; i < vectors; i++) total[h][i] = load(out + h * kept(d) + i * lanes);
        for (int64_t j = 0; j < count; j++) {
            vec value[vectors];
            UNROLL for (int i = 0; i < vectors; i++) {
                if (ahead && (at + i * lanes) % line<T> == 0) ahead->ask();
                value[i] = load(rows[one + j] + at + i * lanes);
            }
            UNROLL for (int h = 0; h < wide; h++)
                UNROLL for (int i = 0; i < vectors; i++) total[h][i] += value[i] * weight[h * stretch + j];
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
