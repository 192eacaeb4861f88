// One token of a few sequences through all layers of a network, in one parallel region. Every thread streams its own rows
// of each weight matrix; they wait for each other only where a product needs all of its input.

#include <omp.h>

#include <cmath>

#include "attend.h"
#include "rows.h"
#include "scratch.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

enum Mixer : int64_t { mamba, attention, feed_forward };
constexpr int64_t most_taps = 8;  // of a convolution whose channels go side by side

// Widths that all layers of one network share, and the memory of a step.
struct Sizes {
    int64_t inner, channels, projected, queries, keys, pieces, widest_in, widest_out;
    explicit Sizes(const Decode& d) : pieces(0), widest_in(d.width), widest_out(d.width) {
        inner = d.mamba_heads * d.mamba_width;
        channels = inner + 2 * d.groups * d.state_size;
        projected = inner + channels + d.mamba_heads;
        queries = d.heads * d.head_width;
        keys = d.kv_heads * d.head_width;
        for (int64_t i = 0; i < d.count; i++) {
            const Layer& l = d.layers[i];
            widest_in = std::max(widest_in, l.last.matrix.inputs);
            widest_out = std::max(widest_out, l.kind == attention ? queries + 2 * keys : l.first.matrix.outputs);
            if (l.kind == attention && !pieces)
                for (int64_t r = 0; r < d.rows; r++) pieces += (d.lengths[r] + piece(d.lengths[r]) - 1) / piece(d.lengths[r]);
        }
    }
    // Shared: the stream, what projections give, the input of last projections, pieces of attention; and a thread's own input.
    size_t shared(const Decode& d) const {
        const int64_t floats = d.rows * (2 * d.width + 2 * widest_out + 2 * d.half) + pieces * d.heads * kept(d);
        return (4 * floats + Activations::bytes(d.rows, widest_in) + 1024 + 8 * fence) / 64 * 64;
    }
    size_t own(const Decode& d) const {
        return (Activations::bytes(d.rows, widest_in) + 4 * d.heads * stretch + 127 + fence) / 64 * 64;
    }
};

void normalise(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps) {
    float mean = 0, squares = 0;
    if (bias) {
        for (int64_t i = 0; i < width; i++) mean += x[i];
        mean /= static_cast<float>(width);
    }
    for (int64_t i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    if (bias)
        for (int64_t i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * (weight[i] + 1.0f) + bias[i];
    else
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

void silu(float* x, int64_t count) {
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        const vec v = load(x + i);
        store(x + i, v * sigmoid(v));
    }
    for (; i < count; i++) x[i] *= sigmoid(x[i]);
}

// S <- decay S + u B^T, y = S C + skip x for `count` rows of the state of one head.
template <int count>
void update(float* state, const float* x, float dt, float decay, const float* b, const float* c, float skip, float* y, int64_t size) {
    vec total[count] = {};
    int64_t n = 0;
    for (; n + lanes <= size; n += lanes) {
        const vec b_n = load(b + n), c_n = load(c + n);
        UNROLL for (int i = 0; i < count; i++) {
            const vec s = load(state + i * size + n) * decay + b_n * (dt * x[i]);
            store(state + i * size + n, s);
            total[i] += s * c_n;
        }
    }
    float value[std::max(count, lanes)];
    sums(total, value);
    UNROLL for (int i = 0; i < count; i++) {
        for (int64_t k = n; k < size; k++) {
            float& s = state[i * size + k];
            s = s * decay + dt * x[i] * b[k];
            value[i] += s * c[k];
        }
        y[i] = value[i] + skip * x[i];
    }
}

// The taps of a vector of channels, weights [channel][taps]: one vector for each tap.
void taps(const float* weights, int64_t count, vec* of_tap) {
    if (count == 4) {
        constexpr auto every = [](int from) {
            places m{};
            for (int l = 0; l < lanes; l++) m[l] = 2 * l + from;
            return m;
        };
        const places even = every(0), odd = every(1);
        const vec a = load(weights), b = load(weights + lanes), c = load(weights + 2 * lanes), e = load(weights + 3 * lanes);
        const vec first = __builtin_shuffle(a, b, even), second = __builtin_shuffle(a, b, odd);
        const vec third = __builtin_shuffle(c, e, even), last = __builtin_shuffle(c, e, odd);
        of_tap[0] = __builtin_shuffle(first, third, even), of_tap[2] = __builtin_shuffle(first, third, odd);
        of_tap[1] = __builtin_shuffle(second, last, even), of_tap[3] = __builtin_shuffle(second, last, odd);
    } else {
        for (int64_t k = 0; k < count; k++)
            for (int l = 0; l < lanes; l++) of_tap[k][l] = weights[l * count + k];
    }
}

// One thread's share of a step.
class Share {
    const Decode& d;
    const Sizes& sizes;
    const int thread, team;
    float *x, *change, *wide, *gate;   // [rows, width] twice, [rows, widest_out] twice
    float *cos, *sin, *pieces;         // [rows, half] twice, [pieces, heads, kept]
    Activations mixed, input;          // of all threads, and of this one alone
    float* weights;                    // of this one: [heads, stretch]

public:
    Share(const Decode& d, const Sizes& sizes, char* memory, int thread, int team)
        : d(d), sizes(sizes), thread(thread), team(team),
          x(take<float>(memory, d.rows * d.width)),
          change(take<float>(memory, d.rows * d.width)),
          wide(take<float>(memory, d.rows * sizes.widest_out)),
          gate(take<float>(memory, d.rows * sizes.widest_out)),
          cos(take<float>(memory, d.rows * d.half)),
          sin(take<float>(memory, d.rows * d.half)),
          pieces(take<float>(memory, sizes.pieces * d.heads * kept(d))),
          mixed(memory, d.rows, sizes.widest_in),
          input(memory += sizes.own(d) * thread, d.rows, sizes.widest_in),
          weights(take<float>(memory, d.heads * stretch)) {}

    void run() {
        for (int64_t r = thread; r < d.rows; r += team) {
            look_up(d.embeddings, d.tokens[r], x + r * d.width);
            for (int64_t i = 0; i < d.half; i++) {
                const double angle = static_cast<double>(d.lengths[r] - 1) * d.frequencies[i];
                cos[r * d.half + i] = static_cast<float>(std::cos(angle));
                sin[r * d.half + i] = static_cast<float>(std::sin(angle));
            }
        }
#pragma omp barrier
        for (int64_t i = 0; i < d.count; i++) {
            const Layer& l = d.layers[i];
            input.inputs = d.width;
            for (int64_t r = 0; r < d.rows; r++)
                normalise(x + r * d.width, l.norm, l.norm_bias, input.x + r * d.width, d.width, d.eps);
            if (whole_numbers(l.first.matrix) || whole_numbers(l.second.matrix) || whole_numbers(l.third.matrix))
                quantise(input, 0, d.width);
            if (l.kind == mamba) mix_mamba(l);
            if (l.kind == attention) mix_attention(l);
            if (l.kind == feed_forward) mix_feed_forward(l);
#pragma omp barrier
        }
        for (int64_t r = thread; r < d.rows; r += team)
            normalise(x + r * d.width, d.norm, d.norm_bias, d.hidden + r * d.width, d.width, d.eps);
    }

private:
    // x += last projection of `from`, in this thread's columns.
    void add(const Projection& last, const Activations& from) {
        const Part part(d.width, thread, team);
        product(last, from, change, d.width, part.from, part.to);
        for (int64_t r = 0; r < d.rows; r++)
            for (int64_t i = r * d.width + part.from; i < r * d.width + part.to; i++) x[i] += change[i];
    }

    void mix_feed_forward(const Layer& l) {
        const int64_t width = l.first.matrix.outputs;
        const Part part(width, thread, team, block);
        mixed.inputs = width;
        product(l.first, input, mixed.x, width, part.from, part.to);
        if (l.second.matrix.codes) product(l.second, input, gate, width, part.from, part.to);
        for (int64_t r = 0; r < d.rows; r++) {
            float *up = mixed.x + r * width + part.from, *open = gate + r * width + part.from;
            const int64_t count = part.to - part.from;
            if (l.second.matrix.codes) {
                silu(open, count);
                for (int64_t i = 0; i < count; i++) up[i] *= open[i];
            } else {
                for (int64_t i = 0; i < count; i++) up[i] = up[i] > 0.0f ? up[i] * up[i] : 0.0f;
            }
        }
        if (whole_numbers(l.last.matrix)) quantise(mixed, part.from, part.to);
#pragma omp barrier
        add(l.last, mixed);
    }

    void mix_mamba(const Layer& l) {
        const Part part(sizes.projected, thread, team);
        const int64_t inner = sizes.inner, to_dt = inner + sizes.channels;
        product(l.first, input, wide, sizes.projected, part.from, part.to);
        for (int64_t r = 0; r < d.rows; r++) {
            float* row = wide + r * sizes.projected;
            silu(row + part.from, std::min(part.to, inner) - part.from);
            for (int64_t i = std::max(part.from, to_dt); i < part.to; i++) {
                const float dt = row[i] + l.dt_bias[i - to_dt];
                row[i] = std::clamp(dt > 20.0f ? dt : std::log1p(std::exp(dt)), d.least_step, d.most_step);
            }
        }
        convolve(l, std::max(part.from - inner, int64_t{0}), std::min(part.to, to_dt) - inner);
#pragma omp barrier
        const Part heads(d.rows * d.mamba_heads, thread, team, 1);
        for (int64_t unit = heads.from; unit < heads.to; unit++) scan(l, unit / d.mamba_heads, unit % d.mamba_heads);
#pragma omp barrier
        input.inputs = inner;
        const int64_t width = inner / d.groups;
        for (int64_t r = 0; r < d.rows; r++)
            for (int64_t g = 0; g < d.groups; g++) {
                const int64_t at = r * inner + g * width;
                const float* open = wide + r * sizes.projected + g * width;
                for (int64_t i = 0; i < width; i++) input.x[at + i] = gate[at + i] * open[i];
                normalise(input.x + at, l.gated_norm + g * width, nullptr, input.x + at, width, d.eps);
            }
        if (whole_numbers(l.last.matrix)) quantise(input, 0, inner);
        add(l.last, input);
    }

    // Channels [from, to) of all rows: y_t = silu(bias + sum_k w_k x_{t-W+1+k}), and the tails of the slots move on.
    void convolve(const Layer& l, int64_t from, int64_t to) {
        const int64_t history = d.conv_width - 1;
        vec of_tap[most_taps];
        for (int64_t i = from; i < to; i++) {
            const bool whole = i + lanes <= to && d.conv_width <= most_taps;
            if (whole) taps(l.conv_weight + i * d.conv_width, d.conv_width, of_tap);
            for (int64_t r = 0; r < d.rows; r++) {
                float *row = wide + r * sizes.projected + sizes.inner, *tail = l.conv + d.slots[r] * history * sizes.channels + i;
                if (whole) {
                    vec total = l.conv_bias ? load(l.conv_bias + i) : vec{};
                    const vec now = load(row + i);
                    for (int64_t k = 0; k < history; k++, tail += sizes.channels) {
                        total += of_tap[k] * load(tail);
                        store(tail, k + 1 < history ? load(tail + sizes.channels) : now);
                    }
                    total += of_tap[history] * now;
                    store(row + i, total * sigmoid(total));
                } else {
                    const float* w = l.conv_weight + i * d.conv_width;
                    float total = l.conv_bias ? l.conv_bias[i] : 0.0f;
                    for (int64_t k = 0; k < history; k++, tail += sizes.channels) {
                        total += w[k] * *tail;
                        *tail = k + 1 < history ? tail[sizes.channels] : row[i];
                    }
                    total += w[history] * row[i];
                    row[i] = total * sigmoid(total);
                }
            }
            if (whole) i += lanes - 1;
        }
    }

    // State and output (to `gate`) of one head of one row.
    void scan(const Layer& l, int64_t r, int64_t h) {
        const int64_t width = d.mamba_width, size = d.state_size, g = h * d.groups / d.mamba_heads;
        const float *row = wide + r * sizes.projected + sizes.inner, *in = row + h * width;
        const float *b = row + sizes.inner + g * size, *c = b + d.groups * size, dt = row[sizes.channels + h];
        const float decay = fast_exp(-fast_exp(l.a_log[h]) * dt);
        float *state = l.ssm + (d.slots[r] * d.mamba_heads + h) * width * size, *y = gate + r * sizes.inner + h * width;
        int64_t p = 0;
        constexpr int together = lanes == 16 ? 8 : 4;
        for (; p + together <= width; p += together) update<together>(state + p * size, in + p, dt, decay, b, c, l.d[h], y + p, size);
        for (; p < width; p++) update<1>(state + p * size, in + p, dt, decay, b, c, l.d[h], y + p, size);
    }

    void mix_attention(const Layer& l) {
        const int64_t queries = sizes.queries, keys = sizes.keys, row_width = queries + 2 * keys;
        const Part qs(queries, thread, team), ks(keys, thread, team);
        product(l.first, input, wide, row_width, qs.from, qs.to);
        product(l.second, input, wide + queries, row_width, ks.from, ks.to);
        product(l.third, input, wide + queries + keys, row_width, ks.from, ks.to);
#pragma omp barrier
        const Part heads(d.rows * (d.heads + d.kv_heads), thread, team, 1);
        for (int64_t unit = heads.from; unit < heads.to; unit++)
            place(l, unit / (d.heads + d.kv_heads), unit % (d.heads + d.kv_heads));
#pragma omp barrier
        const Part part(sizes.pieces, thread, team, 1);
        if (d.kv_half)
            attend<uint16_t>(l, part);
        else
            attend<float>(l, part);
#pragma omp barrier
        const Part outputs(d.rows * d.heads, thread, team, 1);
        int64_t first = 0;
        for (int64_t r = 0; r < d.rows; r++) {
            const int64_t size = piece(d.lengths[r]), count = (d.lengths[r] + size - 1) / size;
            for (int64_t h = 0; h < d.heads; h++)
                if (r * d.heads + h >= outputs.from && r * d.heads + h < outputs.to)
                    join(d, pieces + (first * d.heads + h) * kept(d), count, d.heads * kept(d),
                         mixed.x + (r * d.heads + h) * d.head_width);
            first += count;
        }
#pragma omp barrier
        Activations from = input;
        from.inputs = queries, from.x = mixed.x;
        if (whole_numbers(l.last.matrix)) quantise(from, 0, queries);
        add(l.last, from);
    }

    // Norm, rotation and scale of a query or key head; a key head's key and value go to their block.
    void place(const Layer& l, int64_t r, int64_t h) {
        const int64_t width = d.head_width;
        float* head = wide + r * (sizes.queries + 2 * sizes.keys) + h * width;  // key heads follow the query heads
        const float* norm = h < d.heads ? l.q_norm : l.k_norm;
        if (norm) normalise(head, norm, nullptr, head, width, d.eps);
        if (d.half) rotate(head, cos + r * d.half, sin + r * d.half, d.half);
        if (h < d.heads) {
            const float scale = 1.0f / std::sqrt(static_cast<float>(width));
            for (int64_t e = 0; e < width; e++) head[e] *= scale;
            return;
        }
        const int64_t last = d.lengths[r] - 1, blocked = d.table[r * d.table_stride + last / d.block_size];
        const int64_t at = (blocked * d.block_size + last % d.block_size) * sizes.keys + (h - d.heads) * width;
        for (int64_t e = 0; e < width; e++) {
            const float key = head[e], value = head[sizes.keys + e];
            if (d.kv_half)
                put(static_cast<uint16_t*>(l.keys) + at + e, key), put(static_cast<uint16_t*>(l.values) + at + e, value);
            else
                put(static_cast<float*>(l.keys) + at + e, key), put(static_cast<float*>(l.values) + at + e, value);
        }
    }

    template <typename T>
    void attend(const Layer& l, const Part& part) {
        Attend<T> over{d, l, weights, {}};
        int64_t unit = 0;
        for (int64_t r = 0; r < d.rows; r++) {
            const int64_t size = piece(d.lengths[r]);
            for (int64_t from = 0; from < d.lengths[r]; from += size, unit++)
                if (unit >= part.from && unit < part.to)
                    over.piece(r, from, std::min(from + size, d.lengths[r]), wide + r * (sizes.queries + 2 * sizes.keys),
                               pieces + unit * d.heads * kept(d));
        }
    }
};

}  // namespace

void decode(const Decode& d, int threads) {
    const Sizes sizes(d);
    char* memory = scratch(sizes.shared(d) + threads * sizes.own(d));
#pragma omp parallel num_threads(threads)
    Share(d, sizes, memory, omp_get_thread_num(), omp_get_num_threads()).run();
}

}  // namespace whimbrel::WHIMBREL_ISA
