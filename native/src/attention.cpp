// Causal attention: many queries of a sequence over its keys, a block of keys at a time (arXiv 2205.14135, section 3.1).
//
// A task takes the queries of some neighbouring tokens, for all heads that share one key head: some hundred rows, which lie packed
// and scaled in the second-level cache. For each block of keys, turned once for all rows,
//
//   scores = Q K^T      top' = max(top, scores)      P = exp(scores - top')      O' = exp(top - top') O + P V
//
// and at the end y = O / sum P. Blocks that lie beyond a row's own token are not computed for it.
//
// Its gradients (appendix B.4 there) compute P again from the logarithm of each row's total: with D = dy . y of a row,
//
//   dV += P^T dY      dS = P (dY V^T - D)      dQ += dS K      dK += dS^T Q
//
// A long sequence is worked on in parts with dK and dV of their own, which are added up in the end.

#include <cmath>
#include <memory>
#include <vector>

#include "product.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t block = 64;      // keys worked on together
constexpr int64_t most_rows = 240;  // rows of a task, unless one token has more

struct Block {
    const Attention& a;
    const int64_t group, rows, wide, row, across;  // rows of a task; of scratch they lie `row` apart, of scores `across`
    const float scale;
    Ahead ahead;
    float *keys, *keys_turned, *values;  // of a block

    Block(const Attention& attention, int64_t tokens)
        : a(attention), group(a.heads / a.kv_heads), rows(tokens * group), wide(round_up(a.width)), row(pitch(a.width)),
          across(pitch(block)), scale(1 / std::sqrt(static_cast<float>(a.width))) {}

    // Packs `some` keys and values from `at` on, and asks for those of the next block, up to `last`.
    void fetch(const float* k, const float* v, int64_t at, int64_t some, int64_t last) {
        pack(k + at * a.k_stride, a.k_stride, some, a.width, keys, row);
        pack(v + at * a.v_stride, a.v_stride, some, a.width, values, row);
        transpose(keys, row, round_up(some), wide, keys_turned, block);
        const int64_t next = std::min(block, last - at - some);
        ahead.add(k + (at + some) * a.k_stride, a.k_stride, next, a.width);
        ahead.add(v + (at + some) * a.v_stride, a.v_stride, next, a.width);
    }
};

struct Forward : Block {
    Arena arena;
    float *q, *weights, *sums, *tops, *totals, *fades;

    Forward(const Attention& attention, int64_t tokens)
        : Block(attention, tokens), arena(rows * (2 * row + across + 3) + block * 2 * row + wide * block + 256), q(arena.take(rows * row)),
          weights(arena.take(rows * across)), sums(arena.take(rows * row)), tops(arena.take(rows)), totals(arena.take(rows)),
          fades(arena.take(rows)) {
        keys = arena.take(block * row), keys_turned = arena.take(wide * block), values = arena.take(block * row);
    }

    // Tokens from … from + count of a sequence with `history` keys before its first query; k, v of the sequence and key head.
    void run(const float* queries, const float* k, const float* v, float* y, float* logs, int64_t from, int64_t count, int64_t history) {
        for (int64_t r = 0; r < count * group; r++) {
            const float* of = queries + (from + r / group) * a.q_stride + r % group * a.width;
            for (int64_t e = 0; e < wide; e += lanes) store(q + r * row + e, load(of + e, a.width - e) * scale);
            tops[r] = -INFINITY, totals[r] = 0;
        }
        const int64_t last = history + from + count;  // keys of the last token
        for (int64_t at = 0; at < last; at += block) {
            const int64_t some = std::min(block, last - at), first = std::max<int64_t>(0, at - history - from) * group;
            fetch(k, v, at, some, last);
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
            const int64_t place = (from + r / group) * a.heads + r % group;
            float* to = y + place * a.width;
            const float share = 1 / totals[r];
            logs[place] = tops[r] + std::log(totals[r]);
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

// The same rows of a task, and what of the gradients they bring.
struct Backward : Block {
    Arena arena;
    float *q, *dy, *dq, *values_turned, *weights, *changes, *dk, *dv, *logs, *drops;

    Backward(const Attention& attention, int64_t tokens)
        : Block(attention, tokens), arena(rows * (3 * row + 2 * across + 2) + 4 * block * row + 2 * wide * block + 512), q(arena.take(rows * row)),
          dy(arena.take(rows * row)), dq(arena.take(rows * row)), values_turned(arena.take(wide * block)),
          weights(arena.take(rows * across)), changes(arena.take(rows * across)), dk(arena.take(block * row)), dv(arena.take(block * row)),
          logs(arena.take(rows)), drops(arena.take(rows)) {
        keys = arena.take(block * row), keys_turned = arena.take(wide * block), values = arena.take(block * row);
    }

    // As Forward::run, with dk and dv of the sequence and key head. `place` is that of the first query in arrays by token and head.
    void run(const AttentionGradients& g, const float* queries, int64_t place, const float* k, const float* v, float* all_dk, float* all_dv,
             int64_t from, int64_t count, int64_t history) {
        const int64_t some_rows = count * group;
        const auto place_of = [&](int64_t r) { return place + (from + r / group) * a.heads + r % group; };
        for (int64_t r = 0; r < some_rows; r++) {
            const float* of = queries + (from + r / group) * a.q_stride + r % group * a.width;
            const float *up = g.dy + place_of(r) * a.width, *y = a.y + place_of(r) * a.width;
            vec total{};
            for (int64_t e = 0; e < wide; e += lanes) {
                const vec change = load(up + e, a.width - e);
                store(q + r * row + e, load(of + e, a.width - e) * scale);
                store(dy + r * row + e, change);
                store(dq + r * row + e, vec{});
                total += change * load(y + e, a.width - e);
            }
            logs[r] = a.logs[place_of(r)], drops[r] = sum(total);
        }
        const int64_t last = history + from + count;
        for (int64_t at = 0; at < last; at += block) {
            const int64_t some = std::min(block, last - at), first = std::max<int64_t>(0, at - history - from) * group, high = some_rows - first;
            fetch(k, v, at, some, last);
            transpose(values, row, round_up(some), wide, values_turned, block);
            const auto scores = [&](const float* left, const float* turned, float* to) {
                multiply({.a = left + first * row, .b = turned, .a_row = row, .a_step = 1, .b_step = block, .depth = a.width,
                          .out = to + first * across, .out_row = across, .ahead = &ahead}, high, round_up(some));
            };
            scores(q, keys_turned, weights);
            scores(dy, values_turned, changes);
            for (int64_t r = first; r < some_rows; r++) {
                float *weight = weights + r * across, *change = changes + r * across;
                const int64_t seen = std::min(some, history + from + r / group + 1 - at);
                std::fill(weight + seen, weight + round_up(some), -INFINITY);
                for (int64_t j = 0; j < some; j += lanes) {
                    const vec score = load(weight + j), p = score == -INFINITY ? vec{} : fast_exp(score - logs[r]);
                    store(weight + j, p);
                    store(change + j, score == -INFINITY ? vec{} : p * (load(change + j) - drops[r]));
                }
            }
            multiply({.a = changes + first * across, .b = keys, .a_row = across, .a_step = 1, .b_step = row, .depth = some,
                      .base = dq + first * row, .out = dq + first * row, .out_row = row, .ahead = &ahead}, high, wide);
            const auto by_keys = [&](const float* left, const float* right, float* to, float* total) {
                multiply({.a = left + first * across, .b = right + first * row, .a_row = 1, .a_step = across, .b_step = row, .depth = high,
                          .out = to, .out_row = row, .ahead = &ahead}, some, wide);
                for (int64_t j = 0; j < some; j++)
                    for (int64_t e = 0; e < wide; e += lanes) {
                        float* const sum = total + (at + j) * a.kv_heads * a.width + e;
                        store(sum, load(sum, a.width - e) + load(to + j * row + e), a.width - e);
                    }
            };
            by_keys(weights, dy, dv, all_dv);
            by_keys(changes, q, dk, all_dk);
        }
        for (int64_t r = 0; r < some_rows; r++)
            for (int64_t e = 0; e < wide; e += lanes) store(g.dq + place_of(r) * a.width + e, load(dq + r * row + e) * scale, a.width - e);
    }
};

// Where the parts end that the queries of a sequence are cut into, with about as many pairs of a query and a key in each. They depend
// on nothing but the sequence, so that threads change no bit.
std::vector<int64_t> ends(int64_t count, int64_t history, int64_t at_once) {
    const int64_t tiles = (count + at_once - 1) / at_once, parts = std::clamp<int64_t>(tiles / 8, 1, 4);
    const auto pairs = [&](int64_t tile) { return static_cast<double>(tile) * static_cast<double>(2 * history + tile * at_once); };
    std::vector<int64_t> ends;
    for (int64_t part = 1, tile = 0; part <= parts; part++) {
        while (tile < tiles && pairs(tile) * static_cast<double>(parts) < pairs(tiles) * static_cast<double>(part)) tile++;
        ends.push_back(std::min(count, tile * at_once));
    }
    return ends;
}

}  // namespace

void attention_backward(const Attention& a, const AttentionGradients& g, int threads) {
    const int64_t group = a.heads / a.kv_heads, width = a.kv_heads * a.width;
    const int64_t at_once = std::max<int64_t>(1, (lanes == 16 ? most_rows : most_rows / 2) / group);
    struct Task {
        int64_t sequence, key, from, to;
        float *dk, *dv;  // of the sequence's first key and this head
    };
    struct Sum {  // of a part that does not end its sequence
        int64_t sequence, keys;
        float *dk, *dv;
    };
    std::vector<Task> tasks;
    std::vector<Sum> sums;
    std::vector<std::unique_ptr<float[]>> memory;
    for (int64_t s = 0; s < a.sequences; s++) {
        const int64_t count = a.queries[s + 1] - a.queries[s], all = a.keys[s + 1] - a.keys[s], first = a.keys[s] * width;
        std::fill_n(g.dk + first, all * width, 0.0f);
        std::fill_n(g.dv + first, all * width, 0.0f);
        int64_t from = 0;
        for (const int64_t to : ends(count, all - count, at_once)) {
            if (to == from) continue;
            float *dk = g.dk + first, *dv = g.dv + first;
            if (to < count) {
                const int64_t keys = all - count + to;
                memory.emplace_back(new float[2 * keys * width]());
                dk = memory.back().get(), dv = dk + keys * width;
                sums.push_back({s, keys, dk, dv});
            }
            for (int64_t key = 0; key < a.kv_heads; key++) tasks.push_back({s, key, from, to, dk + key * a.width, dv + key * a.width});
            from = to;
        }
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t most = 1;
        for (const Task& t : tasks) most = std::max(most, t.to - t.from);
        Backward work(a, std::min(at_once, most));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = static_cast<int64_t>(tasks.size()) - 1; i >= 0; i--) {
            const Task& t = tasks[i];
            const int64_t begin = a.queries[t.sequence], head = t.key * group, history = a.keys[t.sequence + 1] - a.keys[t.sequence] - a.queries[t.sequence + 1] + begin;
            for (int64_t from = t.from; from < t.to; from += at_once)
                work.run(g, a.q + begin * a.q_stride + head * a.width, begin * a.heads + head, a.k + a.keys[t.sequence] * a.k_stride + t.key * a.width,
                         a.v + a.keys[t.sequence] * a.v_stride + t.key * a.width, t.dk, t.dv, from, std::min(at_once, t.to - from), history);
        }
        for (const Sum& sum : sums) {
            const int64_t first = a.keys[sum.sequence] * width;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < sum.keys; i++)
                for (int64_t e = i * width; e < (i + 1) * width; e++) g.dk[first + e] += sum.dk[e], g.dv[first + e] += sum.dv[e];
        }
    }
}

void attention_forward(const Attention& a, int threads) {
    const int64_t group = a.heads / a.kv_heads, at_once = std::max<int64_t>(1, most_rows / group);
    const auto length = [&](int64_t s) { return a.queries[s + 1] - a.queries[s]; };
    const auto tasks_of = [&](int64_t s) { return (length(s) + at_once - 1) / at_once * a.kv_heads; };
    int64_t most = 0, tasks = 0;
    for (int64_t s = 0; s < a.sequences; s++) most = std::max(most, length(s)), tasks += tasks_of(s);
#pragma omp parallel num_threads(threads)
    {
        Forward work(a, std::min(at_once, most));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t left = tasks - 1 - task, s = 0;  // the last queries of a sequence have the most keys, and come first
            for (; left >= tasks_of(s); s++) left -= tasks_of(s);
            const int64_t begin = a.queries[s], count = length(s), key = left % a.kv_heads;
            const int64_t from = left / a.kv_heads * at_once, head = key * group * a.width;
            work.run(a.q + begin * a.q_stride + head, a.k + a.keys[s] * a.k_stride + key * a.width,
                     a.v + a.keys[s] * a.v_stride + key * a.width, a.y + begin * a.heads * a.width + head,
                     a.logs + begin * a.heads + key * group, from, std::min(at_once, count - from), a.keys[s + 1] - a.keys[s] - count);
        }
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
