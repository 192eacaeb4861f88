// The scan of Mamba-2 (arXiv 2405.21060, section 6), forward and backward, in chunks of 32 tokens that lie in the caches.
//
//   S_t = exp(dt_t a) S_{t-1} + dt_t x_t B_t^T      y_t = S_t C_t + D x_t      S is P x N
//
// With L_ij the product of the decays of tokens j+1 ... i of a chunk (0 for j > i), E_i that from its start to i, F_j that from
// j to its end, S the state before it, and (CB)_ij = C_i . B_j, which the heads of a group share:
//
//   y   = E_i (S C_i) + sum_j W_ij x_j                   W_ij = (CB)_ij L_ij dt_j, plus D where i = j
//   S'  = E_last S + sum_j F_j dt_j x_j B_j^T
//
// and backwards, with dS the gradient of the state after the chunk and G_ij = (dy_i . x_j) L_ij dt_j summed over the heads:
//
//   du_j = F_j (dS B_j) + sum_i (CB)_ij L_ij dy_i        dx_j = dt_j du_j + D dy_j
//   dB_j = sum_heads F_j dt_j (dS^T x_j) + sum_i G_ij C_i
//   dC_i = sum_heads E_i (S^T dy_i) + sum_j G_ij B_j
//   dS'  = E_last dS + sum_i E_i dy_i C_i^T
//
// All of these are small products of packed matrices (product.h). L is built row by row, L_i = decay_i L_{i-1}: no exponential but
// those of single tokens, and none that could overflow.
//
// The gradient of the decays needs no states: with r_t = <dS_t, S_t>, one has <dS_t, decay_t S_{t-1}> = r_t - dt_t (x_t . du_t)
// and r_{t-1} = dy_{t-1} . (S_{t-1} C_{t-1}) + that, where dy_i . (S_i C_i) = C_i . dC_i, the head's own part of dC. Rounding errors
// of this running difference are cut off at the end of each chunk, where r is computed from the two states.
//
// The caller cuts a sequence into pieces of some hundred tokens. The forward pass keeps one state a piece; the backward pass
// takes the pieces from the last to the first and computes the states between the chunks of one piece again, a group of heads at a
// time, so that what it computes and reads lies in the second-level cache until it is used. The state after a piece is that before the next.

#include <vector>

#include "product.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr float least = 1e-30f;  // products of decays below this are 0, long before numbers become slow; NaN stays

float dot(const float* x, const float* y, int64_t n) {
    vec total{};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) total += load(x + i) * load(y + i);
    float rest = sum(total);
    for (; i < n; i++) rest += x[i] * y[i];
    return rest;
}

// Sizes of one call, and how its pointers are walked. P is padded to `wide`, N to `deep`; rows of scratch are w_row, d_row apart.
struct Shape {
    const Scan& s;
    const int64_t shared, wide, deep, w_row, d_row;

    explicit Shape(const Scan& scan)
        : s(scan), shared(scan.heads / scan.groups), wide(round_up(scan.width)), deep(round_up(scan.size)),
          w_row(pitch(scan.width)), d_row(pitch(scan.size)) {}

    const float* x(int64_t t, int64_t h) const { return s.x + t * s.x_stride + h * s.width; }
    const float* b(int64_t t, int64_t g) const { return s.b + t * s.b_stride + g * s.size; }
    const float* c(int64_t t, int64_t g) const { return s.c + t * s.c_stride + g * s.size; }
    int64_t at(int64_t t, int64_t h) const { return t * s.heads + h; }
    int64_t state(int64_t row, int64_t h) const { return (row * s.heads + h) * s.width * s.size; }
    int64_t first(int64_t sequence) const { return s.pieces[s.first[sequence]]; }
};

// The decays of one head over one chunk.
struct alignas(64) Decays {
    float dt[chunk], decay[chunk], from_start[chunk], to_end[chunk], weight[chunk];  // …, E, F, and F dt
    float fade = 1.0f;

    void read(const Shape& k, int64_t from, int64_t count, int64_t h) {
        for (int64_t i = 0; i < count; i++) dt[i] = k.s.dt[k.at(from + i, h)];
        for (int64_t i = count; i < chunk; i++) dt[i] = 0.0f;
        const float a = k.s.a[h];
        for (int64_t i = 0; i < chunk; i++) decay[i] = fast_exp(dt[i] * a);
        float gone = 1.0f;
        for (int64_t i = 0; i < count; i++) {
            gone *= decay[i];
            from_start[i] = gone = gone < least ? 0.0f : gone;
        }
        fade = gone, gone = 1.0f;
        for (int64_t i = count - 1; i >= 0; i--) {
            to_end[i] = gone = gone < least ? 0.0f : gone;
            weight[i] = gone * dt[i];
            gone *= decay[i];
        }
    }
};

// L of one head, a row at a time, in registers: L_i = decay_i L_{i-1}, and 1 on the diagonal.
struct Between {
    vec row[chunk / lanes] = {};

    // Lanes of vector q that are token i.
    static auto diagonal(int64_t q, int64_t i) {
        places token{};
        for (int l = 0; l < lanes; l++) token[l] = l;
        return token == places{} + static_cast<int32_t>(i - q * lanes);
    }
    [[gnu::always_inline]] void next(int64_t i, float decay) {
        UNROLL for (int64_t q = 0; q < chunk / lanes; q++) {
            const vec v = row[q] * decay;
            row[q] = diagonal(q, i) ? vec{} + 1.0f : v < least ? vec{} : v;
        }
    }
};

// Rows of `high` tokens as `pack` has them, and each times its factor; `plain` may be null.
void pack_scaled(const float* from, int64_t from_row, int64_t high, int64_t width, const float* factor, float* plain, float* scaled,
                 int64_t to_row) {
    for (int64_t r = 0; r < high; r++)
        for (int64_t i = 0; i < width; i += lanes) {
            const vec v = load(from + r * from_row + i, width - i);
            if (plain) store(plain + r * to_row + i, v);
            store(scaled + r * to_row + i, v * factor[r]);
        }
    for (int64_t r = high; r < round_up(high) && plain; r++) std::fill_n(plain + r * to_row, round_up(width), 0.0f);
}

// B and C of one group over one chunk, by rows and turned, and C B^T.
struct Pair {
    float *b, *c, *b_turned, *cb;

    Pair(const Shape& k, Arena& arena)
        : b(arena.take(chunk * k.d_row)), c(arena.take(chunk * k.d_row)), b_turned(arena.take(k.deep * chunk)),
          cb(arena.take(chunk * chunk)) {}

    void read(const Shape& k, int64_t from, int64_t count, int64_t g) {
        const int64_t high = round_up(count);
        pack(k.b(from, g), k.s.b_stride, count, k.s.size, b, k.d_row);
        pack(k.c(from, g), k.s.c_stride, count, k.s.size, c, k.d_row);
        transpose(b, k.d_row, high, k.deep, b_turned, chunk);
        multiply({.a = c, .b = b_turned, .a_row = k.d_row, .a_step = 1, .b_step = chunk, .depth = k.s.size,
                  .out = cb, .out_row = chunk, .lower = true},
                 count, high);
    }
};

// The state of a head as [deep, w_row] (N by P) from and to the caller's [P, N].
void take_turned(const Shape& k, const float* from, float* scratch, float* to) {
    pack(from, k.s.size, k.s.width, k.s.size, scratch, k.d_row);
    transpose(scratch, k.d_row, k.wide, k.deep, to, k.w_row);
}
void give_turned(const Shape& k, const float* from, float* scratch, float* to) {
    transpose(from, k.w_row, k.deep, k.wide, scratch, k.d_row);
    for (int64_t p = 0; p < k.s.width; p++) std::copy_n(scratch + p * k.d_row, k.s.size, to + p * k.s.size);
}

struct Forward : Shape {
    Arena arena;
    Pair pair;
    Decays decays;
    Ahead ahead;
    float *x, *scaled, *mix, *y, *scratch, *states;

    Forward(const Scan& scan, int64_t most_heads)
        : Shape(scan),
          arena(chunk * (2 * d_row + 2 * deep + 3 * w_row + 2 * chunk) + wide * d_row + most_heads * deep * w_row + 256),
          pair(*this, arena), x(arena.take(chunk * w_row)), scaled(arena.take(chunk * w_row)), mix(arena.take(chunk * chunk)),
          y(arena.take(chunk * w_row)), scratch(arena.take(wide * d_row)), states(arena.take(most_heads * deep * w_row)) {}

    void run_chunk(int64_t from, int64_t count, int64_t h, float* state, bool empty) {
        decays.read(*this, from, count, h);
        pack_scaled(Shape::x(from, h), s.x_stride, count, s.width, decays.weight, x, scaled, w_row);
        Between between;
        for (int64_t i = 0; i < count; i++) {
            between.next(i, decays.decay[i]);
            UNROLL for (int64_t q = 0; q < chunk / lanes; q++) {
                if (q * lanes > i) break;
                const int64_t place = i * chunk + q * lanes;
                const vec d = Between::diagonal(q, i) ? vec{} + s.d[h] : vec{};
                store(mix + place, load(pair.cb + place) * between.row[q] * load(decays.dt + q * lanes) + d);
            }
        }
        const bool whole = s.width % lanes == 0;  // rows of whole vectors need no scratch
        float* const rows = s.y + at(from, h) * s.width;
        multiply({.a = pair.c, .b = state, .a_row = d_row, .a_step = 1, .b_step = w_row, .depth = empty ? 0 : s.size,
                  .scale = decays.from_start, .c = mix, .d = x, .c_row = chunk, .c_step = 1, .d_step = w_row, .tokens = count,
                  .order = Product::past, .out = whole ? rows : y, .out_row = whole ? s.heads * s.width : w_row, .ahead = &ahead},
                 count, wide);
        multiply({.a = pair.b_turned, .b = scaled, .a_row = chunk, .a_step = 1, .b_step = w_row, .depth = count,
                  .base = empty ? nullptr : state, .fade = decays.fade, .out = state, .out_row = w_row, .ahead = &ahead},
                 s.size, wide);
        for (int64_t i = 0; i < count && !whole; i++) std::copy_n(y + i * w_row, s.width, rows + i * s.heads * s.width);
    }

    // Asks for the rows of heads of one group.
    void ask(int64_t from, int64_t size, int64_t h, int64_t count) {
        ahead.add(b(from, h / shared), s.b_stride, size, s.size), ahead.add(c(from, h / shared), s.c_stride, size, s.size);
        ahead.add(Shape::x(from, h), s.x_stride, size, count * s.width);
        ahead.add(s.y + at(from, h) * s.width, s.heads * s.width, size, count * s.width, true);
    }

    // Heads first … first + count of one sequence.
    void run(int64_t sequence, int64_t first_head, int64_t count) {
        const int64_t end = s.pieces[s.first[sequence + 1]];
        const auto state = [&](int64_t i) { return states + i * deep * w_row; };
        bool empty = !s.initial;
        for (int64_t i = 0; i < count && !empty; i++)
            take_turned(*this, s.initial + Shape::state(sequence, first_head + i), scratch, state(i));
        for (int64_t piece = s.first[sequence]; piece < s.first[sequence + 1]; piece++) {
            for (int64_t from = s.pieces[piece]; from < s.pieces[piece + 1]; from += chunk) {
                const int64_t size = std::min(chunk, s.pieces[piece + 1] - from);
                for (int64_t i = 0; i < count; i++) {
                    const int64_t h = first_head + i;
                    if (!i || h % shared == 0) {
                        const int64_t next = (h / shared + 1) * shared;
                        pair.read(*this, from, size, h / shared);
                        if (next < first_head + count) ask(from, size, next, std::min(shared, first_head + count - next));
                        else ask(from + size, std::min(chunk, end - from - size), first_head, std::min(shared, count));
                    }
                    run_chunk(from, size, h, state(i), empty);
                }
                empty = false;
            }
            const bool last = piece + 1 == s.first[sequence + 1];
            for (int64_t i = 0; i < count; i++) {
                if (s.saved && !last) give_turned(*this, state(i), scratch, s.saved + Shape::state(piece + 1, first_head + i));
                if (s.slots[piece] >= 0) give_turned(*this, state(i), scratch, s.kept + Shape::state(s.slots[piece], first_head + i));
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float* final = s.final + Shape::state(sequence, first_head + i);
            if (empty) std::fill_n(final, s.width * s.size, 0.0f);  // no token, and no state before it
            else give_turned(*this, state(i), scratch, final);
        }
    }
};

struct Backward : Shape {
    const ScanGradients& out;
    const int64_t most;  // chunks of a piece
    Arena arena;
    Pair pair;
    Decays decays;
    Ahead ahead;
    float *x, *dy, *du, *scaled, *x_turned, *mix, *pairs, *sums, *own, *db, *dc, *ds, *ds_turned, *chain;
    std::vector<double> behind, da, dd;
    int64_t first_head = 0, heads = 0;  // of the present task: whole groups

    Backward(const Scan& scan, const ScanGradients& gradients, int64_t most_chunks, int64_t most_heads)
        : Shape(scan), out(gradients), most(most_chunks),
          arena(chunk * (5 * d_row + 2 * deep + 4 * w_row + 2 * wide + 4 * chunk) + deep * w_row +
                (most_heads + shared * (most + 1)) * wide * d_row + 512),
          pair(*this, arena), x(arena.take(chunk * w_row)), dy(arena.take(chunk * w_row)), du(arena.take(chunk * w_row)),
          scaled(arena.take(chunk * w_row)), x_turned(arena.take(wide * chunk)),
          mix(arena.take(chunk * chunk)), pairs(arena.take(chunk * chunk)), sums(arena.take(chunk * chunk)),
          own(arena.take(chunk * d_row)), db(arena.take(chunk * d_row)), dc(arena.take(chunk * d_row)),
          ds(arena.take(most_heads * wide * d_row)), ds_turned(arena.take(deep * w_row)),
          chain(arena.take(shared * (most + 1) * wide * d_row)), behind(most_heads), da(most_heads), dd(most_heads) {}

    // State of head i of the task, of its present group, before chunk k of the present piece, [P, d_row].
    float* before(int64_t i, int64_t k) { return chain + (i % shared * (most + 1) + k) * wide * d_row; }
    float* gradient(int64_t i) { return ds + i * wide * d_row; }

    // The state after a chunk from that before it, for the heads of a group from the task's head `first_of` on.
    void restore_chunk(int64_t from, int64_t count, int64_t first_of, int64_t k, bool empty) {
        pack(b(from, (first_head + first_of) / shared), s.b_stride, count, s.size, pair.b, d_row);
        for (int64_t i = first_of; i < first_of + shared; i++) {
            const int64_t h = first_head + i;
            decays.read(*this, from, count, h);
            pack_scaled(Shape::x(from, h), s.x_stride, count, s.width, decays.weight, nullptr, scaled, w_row);
            multiply({.a = scaled, .b = pair.b, .a_row = 1, .a_step = w_row, .b_step = d_row, .depth = count,
                      .base = empty ? nullptr : before(i, k), .fade = decays.fade, .out = before(i, k + 1), .out_row = d_row,
                      .ahead = &ahead},
                     s.width, deep);
        }
    }

    // empty: the state before the chunk is zero; idle: so is the gradient of the state after it; start: nobody asks for the one before.
    void head(int64_t from, int64_t count, int64_t i, int64_t k, bool empty, bool idle, bool start) {
        const int64_t h = first_head + i, high = round_up(count);
        const bool opens = h % shared == 0, closes = (h + 1) % shared == 0;  // of its group, the first head and the last
        pack(Shape::x(from, h), s.x_stride, count, s.width, x, w_row);
        decays.read(*this, from, count, h);
        pack_scaled(out.dy + at(from, h) * s.width, s.heads * s.width, count, s.width, decays.from_start, dy, scaled, w_row);
        transpose(x, w_row, high, wide, x_turned, chunk);
        multiply({.a = dy, .b = x_turned, .a_row = w_row, .a_step = 1, .b_step = chunk, .depth = s.width,
                  .out = pairs, .out_row = chunk, .lower = true, .ahead = &ahead},
                 count, high);
        multiply({.a = dy, .b = before(i, k), .a_row = w_row, .a_step = 1, .b_step = d_row, .depth = empty ? 0 : s.width,
                  .scale = decays.from_start, .out = own, .out_row = d_row, .ahead = &ahead},
                 count, deep);
        float pull[chunk];  // dy_r . (S_r C_r)
        Between between;
        for (int64_t r = 0; r < count; r++) {
            vec total{};
            between.next(r, decays.decay[r]);
            UNROLL for (int64_t q = 0; q < chunk / lanes; q++) {
                if (q * lanes > r) break;
                const int64_t place = r * chunk + q * lanes;
                const vec cb = load(pair.cb + place), part = load(pairs + place) * between.row[q] * load(decays.dt + q * lanes);
                total += part * cb;
                store(mix + place, cb * between.row[q]);
                store(sums + place, opens ? part : load(sums + place) + part);
            }
            for (int64_t n = 0; n < deep; n += lanes) {
                const vec part = load(own + r * d_row + n);
                total += part * load(pair.c + r * d_row + n);
                store(dc + r * d_row + n, opens ? part : load(dc + r * d_row + n) + part);
            }
            pull[r] = sum(total);
        }
        if (closes)
            multiply({.c = sums, .d = pair.b, .c_row = chunk, .c_step = 1, .d_step = d_row, .tokens = count,
                      .order = Product::past, .base = dc, .out = dc, .out_row = d_row, .ahead = &ahead},
                     count, deep);
        multiply({.a = x_turned, .b = gradient(i), .a_row = 1, .a_step = chunk, .b_step = d_row, .depth = idle ? 0 : s.width,
                  .scale = decays.weight, .c = sums, .d = pair.c, .c_row = 1, .c_step = chunk, .d_step = d_row,
                  .tokens = count, .order = closes ? Product::future : Product::none, .base = opens ? nullptr : db, .out = db,
                  .out_row = d_row, .ahead = &ahead},
                 count, deep);
        if (!idle) {
            transpose(gradient(i), d_row, wide, deep, ds_turned, w_row);
            vec total{};
            for (int64_t p = 0; p < s.width; p++)
                for (int64_t n = 0; n < deep; n += lanes)
                    total += load(gradient(i) + p * d_row + n) * load(before(i, k + 1) + p * d_row + n);
            behind[i] = sum(total);
        }
        multiply({.a = pair.b_turned, .b = ds_turned, .a_row = 1, .a_step = chunk, .b_step = w_row, .depth = idle ? 0 : s.size,
                  .scale = decays.to_end, .c = mix, .d = dy, .c_row = 1, .c_step = chunk, .d_step = w_row, .tokens = count,
                  .order = Product::future, .out = du, .out_row = w_row, .ahead = &ahead},
                 count, wide);
        if (!start) {
            multiply({.a = scaled, .b = pair.c, .a_row = 1, .a_step = w_row, .b_step = d_row, .depth = count,
                      .base = idle ? nullptr : gradient(i), .fade = decays.fade, .out = gradient(i), .out_row = d_row,
                      .ahead = &ahead},
                     s.width, deep);
        }
        give(from, count, i, pull);
    }

    // What is left is a token's own: dx, ddt, and its parts of da and dd.
    void give(int64_t from, int64_t count, int64_t i, const float* pull) {
        const int64_t h = first_head + i;
        const float a = s.a[h], d = s.d[h];
        double carried = behind[i];
        for (int64_t t = count - 1; t >= 0; t--) {
            const int64_t place = at(from + t, h);
            const float dt = decays.dt[t], push = dot(du + t * w_row, x + t * w_row, wide);
            carried += static_cast<double>(pull[t]) - static_cast<double>(dt) * push;
            out.ddt[place] = static_cast<float>(a * carried) + push;
            da[i] += dt * carried, dd[i] += pairs[t * chunk + t];
            float* dx = out.dx + (from + t) * out.dx_stride + h * s.width;
            for (int64_t p = 0; p < s.width; p++) dx[p] = dt * du[t * w_row + p] + d * dy[t * w_row + p];
        }
        behind[i] = carried;
    }

    // Asks for what a chunk brings to the heads of one group: x and B, with which states are restored, and the rest.
    void ask_inputs(int64_t from, int64_t count, int64_t i) {
        const int64_t h = first_head + i;
        ahead.add(b(from, h / shared), s.b_stride, count, s.size);
        ahead.add(Shape::x(from, h), s.x_stride, count, shared * s.width);
    }
    void ask_states(const float* states, int64_t i) {
        if (states) ahead.add(states + (first_head + i) * s.width * s.size, s.size, shared * s.width, s.size);
    }
    void ask_rest(int64_t from, int64_t count, int64_t i) {
        const int64_t h = first_head + i, g = h / shared, wide_x = shared * s.width;
        ahead.add(c(from, g), s.c_stride, count, s.size);
        ahead.add(out.dy + at(from, h) * s.width, s.heads * s.width, count, wide_x);
        ahead.add(out.dx + from * out.dx_stride + h * s.width, out.dx_stride, count, wide_x, true);
        ahead.add(out.db + from * out.db_stride + g * s.size, out.db_stride, count, s.size, true);
        ahead.add(out.dc + from * out.dc_stride + g * s.size, out.dc_stride, count, s.size, true);
    }

    // Adds a gradient [S or K, H, P, N] of the state after a piece to the one that is carried.
    void add(const float* from, int64_t row, bool fresh) {
        for (int64_t i = 0; i < heads; i++)
            for (int64_t p = 0; p < s.width; p++) {
                const float* extra = from + state(row, first_head + i) + p * s.size;
                float* to = gradient(i) + p * d_row;
                for (int64_t n = 0; n < deep; n++) to[n] = (fresh ? 0.0f : to[n]) + (n < s.size ? extra[n] : 0.0f);
            }
    }

    // The heads of one group, from the task's head `first_of` on, through a piece: what they share and their states lie in the
    // caches meanwhile.
    void run_piece(int64_t piece, int64_t first_of, const float* begin, const float* end, bool idle, bool start, int64_t opening) {
        const int64_t from = s.pieces[piece], to = s.pieces[piece + 1], chunks = (to - from + chunk - 1) / chunk;
        const int64_t restored = chunks - (idle || end), g = (first_head + first_of) / shared;
        const auto fetch = [&](const float* states, int64_t i, int64_t k) {
            if (states) pack(states + (first_head + i) * s.width * s.size, s.size, s.width, s.size, before(i, k), d_row);
        };
        for (int64_t i = first_of; i < first_of + shared; i++) fetch(begin, i, 0), fetch(end, i, chunks);
        const auto size = [&](int64_t k) { return std::min(chunk, to - from - k * chunk); };
        for (int64_t k = 0; k < restored; k++) {
            if (k + 1 < chunks) ask_inputs(from + (k + 1) * chunk, size(k + 1), first_of);
            if (k + 1 >= restored) ask_rest(from + (chunks - 1) * chunk, size(chunks - 1), first_of);
            restore_chunk(from + k * chunk, size(k), first_of, k, !begin && k == 0);
        }
        for (int64_t k = chunks - 1; k >= 0; k--) {
            const int64_t at = from + k * chunk, count = size(k);
            pair.read(*this, at, count, g);
            if (k) ask_rest(at - chunk, chunk, first_of);
            else if (first_of + shared < heads) {
                ask_inputs(from, count, first_of + shared);
                ask_states(begin, first_of + shared), ask_states(end, first_of + shared);
            }
            else if (piece > opening) ask_inputs(s.pieces[piece - 1], std::min(chunk, from - s.pieces[piece - 1]), 0);
            for (int64_t i = first_of; i < first_of + shared; i++)
                head(at, count, i, k, !begin && k == 0, idle && k == chunks - 1, start && k == 0);
            for (int64_t t = 0; t < count; t++) {
                std::copy_n(db + t * d_row, s.size, out.db + (at + t) * out.db_stride + g * s.size);
                std::copy_n(dc + t * d_row, s.size, out.dc + (at + t) * out.dc_stride + g * s.size);
            }
        }
    }

    // Groups from … to of one sequence.
    void run(int64_t sequence, int64_t from_group, int64_t to_group) {
        first_head = from_group * shared, heads = (to_group - from_group) * shared;
        for (auto* v : {&behind, &da, &dd}) std::fill(v->begin(), v->end(), 0.0);
        bool idle = !out.dfinal;
        if (!idle) add(out.dfinal, sequence, true);
        const int64_t opening = s.first[sequence];
        for (int64_t piece = s.first[sequence + 1] - 1; piece >= opening; piece--) {
            if (s.slots[piece] >= 0 && out.dkept) add(out.dkept, s.slots[piece], idle), idle = false;
            const float* begin = piece > opening ? s.saved + state(piece, 0) : s.initial ? s.initial + state(sequence, 0) : nullptr;
            const float* end = piece + 1 < s.first[sequence + 1] ? s.saved + state(piece + 1, 0) : nullptr;
            for (int64_t group = 0; group < heads; group += shared)
                run_piece(piece, group, begin, end, idle, piece == opening && !out.dinitial, opening);
            idle = false;
        }
        for (int64_t i = 0; i < heads; i++) {
            const int64_t h = first_head + i;
            out.da[sequence * s.heads + h] = static_cast<float>(da[i]);
            out.dd[sequence * s.heads + h] = static_cast<float>(dd[i]);
            for (int64_t p = 0; p < s.width && out.dinitial; p++) {
                float* to = out.dinitial + state(sequence, h) + p * s.size;
                if (idle) std::fill_n(to, s.size, 0.0f);  // no token, and nobody asked for the state after them
                else std::copy_n(gradient(i) + p * d_row, s.size, to);
            }
        }
    }
};

}  // namespace

// A thread takes all heads, or a part of them: neighbouring heads lie on one page of memory, and to look a page up is dear.
void scan_forward(const Scan& s, int threads) {
    const int64_t of = s.sequences * s.groups >= threads ? s.groups : s.heads;  // a group is cut only if there is too little else
    const int64_t parts = std::min<int64_t>(threads, of), each = s.heads / of;
#pragma omp parallel num_threads(threads)
    {
        Forward work(s, (of + parts - 1) / parts * each);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.sequences * parts; task++) {
            const int64_t part = task % parts, from = of * part / parts * each;
            work.run(task / parts, from, of * (part + 1) / parts * each - from);
        }
    }
}

// dB and dC are sums over the heads of a group, so a group is the work of one thread.
void scan_backward(const Scan& s, const ScanGradients& out, int threads) {
    int64_t most = 0;
    for (int64_t piece = 0; piece < s.first[s.sequences]; piece++) most = std::max(most, s.pieces[piece + 1] - s.pieces[piece]);
    const int64_t parts = std::min<int64_t>(threads, s.groups);
#pragma omp parallel num_threads(threads)
    {
        Backward work(s, out, (most + chunk - 1) / chunk, (s.groups + parts - 1) / parts * (s.heads / s.groups));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s.sequences * parts; task++) {
            const int64_t part = task % parts;
            work.run(task / parts, s.groups * part / parts, s.groups * (part + 1) / parts);
        }
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
