// Causal attention of prompts: many queries of a sequence over its keys, a block of keys at a time (arXiv 2205.14135, section 3.1).
//
// A task takes the queries of some neighbouring tokens, for all heads that share one key head: some hundred rows, which lie packed
// and scaled in the second-level cache. For each block of keys, turned once for all rows,
//
//   scores = Q K^T      top' = max(top, scores)      P = exp(scores - top')      O' = exp(top - top') O + P V
//
// and at the end y = O / sum P. Blocks that lie beyond a row's own token are not computed for it.

#include <cmath>

#include "product.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t block = 64;      // keys worked on together
constexpr int64_t most_rows = 240;  // rows of a task, unless one token has more

struct Prompt {
    const Attention& a;
    const int64_t group, tokens, rows, wide, row, across;  // rows of scratch lie `row` apart, of scores `across`
    const float scale;
    Arena arena;
    Ahead ahead;
    float *q, *keys, *keys_turned, *values, *weights, *sums, *tops, *totals, *fades;

    explicit Prompt(const Attention& attention, int64_t at_once)
        : a(attention), group(a.heads / a.kv_heads), tokens(at_once), rows(tokens * group), wide(round_up(a.width)),
          row(pitch(a.width)), across(pitch(block)), scale(1 / std::sqrt(static_cast<float>(a.width))),
          arena(rows * (2 * row + across + 3) + block * 2 * row + wide * block + 256), q(arena.take(rows * row)),
          keys(arena.take(block * row)), keys_turned(arena.take(wide * block)), values(arena.take(block * row)),
          weights(arena.take(rows * across)), sums(arena.take(rows * row)), tops(arena.take(rows)), totals(arena.take(rows)),
          fades(arena.take(rows)) {}

    // Tokens from … from + count of a sequence with `history` keys before its first query; k, v of the sequence and key head.
    void run(const float* queries, const float* k, const float* v, float* y, int64_t from, int64_t count, int64_t history) {
        for (int64_t r = 0; r < count * group; r++) {
            const float* of = queries + (from + r / group) * a.q_stride + r % group * a.width;
            for (int64_t e = 0; e < wide; e += lanes) store(q + r * row + e, load(of + e, a.width - e) * scale);
            tops[r] = -INFINITY, totals[r] = 0;
        }
        const int64_t last = history + from + count;  // keys of the last token
        for (int64_t at = 0; at < last; at += block) {
            const int64_t some = std::min(block, last - at), first = std::max<int64_t>(0, at - history - from) * group;
            pack(k + at * a.k_stride, a.k_stride, some, a.width, keys, row);
            pack(v + at * a.v_stride, a.v_stride, some, a.width, values, row);
            transpose(keys, row, round_up(some), wide, keys_turned, block);
            const int64_t next = std::min(block, last - at - some);
            ahead.add(k + (at + some) * a.k_stride, a.k_stride, next, a.width);
            ahead.add(v + (at + some) * a.v_stride, a.v_stride, next, a.width);
            multiply({.a = q + first * row, .b = keys_turned, .a_row = row, .a_step = 1, .b_step = block, .depth = a.width,
                      .out = weights + first * across, .out_row = across, .ahead = &ahead},
                     count * group - first, round_up(some));
            for (int64_t r = first; r < count * group; r++)
                weigh(r, std::min(some, history + from + r / group + 1 - at), some);
            multiply({.a = weights + first * across, .b = values, .a_row = across, .a_step = 1, .b_step = row, .depth = some,
                      .base = at ? sums + first * row : nullptr, .fades = fades + first, .out = sums + first * row,
                      .out_row = row, .ahead = &ahead},
                     count * group - first, wide);
        }
        for (int64_t r = 0; r < count * group; r++) {
            float* to = y + (from + r / group) * a.heads * a.width + r % group * a.width;
            const float share = 1 / totals[r];
            for (int64_t e = 0; e < a.width; e += lanes) store(to + e, load(sums + r * row + e) * share, a.width - e);
        }
    }

    // Scores of a row to weights, of which the first `seen` count and the others of `some` are 0.
    void weigh(int64_t r, int64_t seen, int64_t some) {
        float* score = weights + r * across;
        std::fill(score + seen, score + round_up(some), -INFINITY);
        vec high = broadcast(tops[r]), total{};
        for (int64_t j = 0; j < some; j += lanes) high = larger(high, load(score + j));
        const float top = largest(high);
        for (int64_t j = 0; j < some; j += lanes) {
            const vec it = load(score + j), weight = it == -INFINITY ? vec{} : fast_exp(it - top);
            store(score + j, weight);
            total += weight;
        }
        fades[r] = tops[r] == top ? 1.0f : fast_exp(tops[r] - top);
        totals[r] = totals[r] * fades[r] + sum(total);
        tops[r] = top;
    }
};

}  // namespace

void attention(const Attention& a, int threads) {
    const int64_t group = a.heads / a.kv_heads, at_once = std::max<int64_t>(1, most_rows / group);
    const auto length = [&](int64_t s) { return a.queries[s + 1] - a.queries[s]; };
    const auto tasks_of = [&](int64_t s) { return (length(s) + at_once - 1) / at_once * a.kv_heads; };
    int64_t most = 0, tasks = 0;
    for (int64_t s = 0; s < a.sequences; s++) most = std::max(most, length(s)), tasks += tasks_of(s);
#pragma omp parallel num_threads(threads)
    {
        Prompt work(a, std::min(at_once, most));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t left = tasks - 1 - task, s = 0;  // the last queries of a sequence have the most keys, and come first
            for (; left >= tasks_of(s); s++) left -= tasks_of(s);
            const int64_t begin = a.queries[s], count = length(s), key = left % a.kv_heads;
            const int64_t from = left / a.kv_heads * at_once, head = key * group * a.width;
            work.run(a.q + begin * a.q_stride + head, a.k + a.keys[s] * a.k_stride + key * a.width,
                     a.v + a.keys[s] * a.v_stride + key * a.width, a.y + begin * a.heads * a.width + head, from,
                     std::min(at_once, count - from), a.keys[s + 1] - a.keys[s] - count);
        }
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
