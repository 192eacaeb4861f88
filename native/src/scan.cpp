// The scan of Mamba-2 (arXiv 2405.21060, section 6), forward and backward, as a recurrence that lives in the L1 cache.
//
//   S_t = exp(dt_t a) S_{t-1} + u_t B_t^T      u_t = dt_t x_t,  S is P x N
//   y_t = S_t C_t + D x_t
//
// One kernel does all the work. It carries a matrix M of `rows` x `lanes` through the tokens of one sequence and one head:
//
//   M <- decay M + row_in (x) lane_in          out[lanes] += row_out . M
//
//   forward          rows N, lanes P   row_in B   lane_in u   row_out C    out y
//   gradient of C    rows P, lanes N   row_in u   lane_in B   row_out dy   out dC
// and, with M the gradient of the state, backwards in time,
//   gradient of u    rows N, lanes P   row_in C   lane_in dy  row_out B    out du
//   gradient of B    rows P, lanes N   row_in dy  lane_in C   row_out u    out dB
//
// The gradient of the decays needs no state: with r_t = <dS_t, S_t>, one has <dS_t, decay_t S_{t-1}> = r_t - u_t . du_t and
// r_{t-1} = dy_{t-1} . (S_{t-1} C_{t-1}) + that. Rounding errors of this running difference are cut off every `span` blocks
// of tokens, where r is computed from a state that the gradient of C left behind.
//
// Tokens are worked on in blocks; rows that are not whole vectors are copied and padded with zeros.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t block = 32;                       // tokens
constexpr int64_t span = 2;                         // blocks from one kept state to the next
constexpr int tile = WHIMBREL_LANES == 16 ? 2 : 1;  // vectors of lanes held in registers at a time, for four tokens

float dot(const float* x, const float* y, int64_t n) {
    vec total{};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) total += load(x + i) * load(y + i);
    float rest = sum(total);
    for (; i < n; i++) rest += x[i] * y[i];
    return rest;
}

// A token's part of one kernel call.
struct Token {
    float decay;
    const float* row_in;
    const float* lane_in;
    const float* row_out;
    float* out;
};

template <int width>
void advance_one(float* m, int64_t rows, int64_t stride, const Token& t, int64_t at) {
    vec lane[width], out[width];
    for (int i = 0; i < width; i++) lane[i] = load(t.lane_in + at + i * lanes), out[i] = vec{};
    const vec decay = broadcast(t.decay);
    for (int64_t r = 0; r < rows; r++) {
        float* row = m + r * stride + at;
        const vec in = broadcast(t.row_in[r]), weight = broadcast(t.row_out[r]);
        for (int i = 0; i < width; i++) {
            const vec v = load(row + i * lanes) * decay + in * lane[i];
            store(row + i * lanes, v);
            out[i] += weight * v;
        }
    }
    for (int i = 0; i < width; i++) store(t.out + at + i * lanes, out[i]);
}

// What four tokens contribute to each other's outputs, and how they fade, apart from M: with D_k the decay from before the
// first to token k, out_k = D_k (row_out_k . M) + sum_{j <= k} mix_kj lane_in_j, and M' = D_3 M + sum_j fade_j row_in_j (x) lane_in_j.
struct Four {
    Token t[4];
    float decay[4], fade[4], mix[3][3];

    Four(const Token& a, const Token& b, const Token& c, const Token& d, int64_t rows) : t{a, b, c, d} {
        decay[0] = a.decay;
        for (int k = 1; k < 4; k++) decay[k] = decay[k - 1] * t[k].decay;
        fade[3] = 1.0f;
        for (int k = 2; k >= 0; k--) fade[k] = fade[k + 1] * t[k + 1].decay;
        for (int k = 0; k < 3; k++) {
            float between = 1.0f;
            for (int j = k; j >= 0; j--) {
                mix[k][j] = between * dot(t[k].row_out, t[j].row_in, rows);
                between *= t[j].decay;
            }
        }
    }
};

// Four tokens in one pass over M: a quarter of the loads and stores, and nine products where one by one take twelve.
template <int width>
void advance_four(float* m, int64_t rows, int64_t stride, const Four& f, int64_t at) {
    vec lane[4][width], out[4][width];
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < width; i++) lane[k][i] = load(f.t[k].lane_in + at + i * lanes) * f.fade[k], out[k][i] = vec{};
    const vec decay = broadcast(f.decay[3]);
    for (int64_t r = 0; r < rows; r++) {
        float* row = m + r * stride + at;
        for (int i = 0; i < width; i++) {
            const vec v = load(row + i * lanes);
            vec next = v * decay;
            for (int k = 0; k < 3; k++) out[k][i] += broadcast(f.t[k].row_out[r]) * v;
            for (int k = 0; k < 4; k++) next += broadcast(f.t[k].row_in[r]) * lane[k][i];
            out[3][i] += broadcast(f.t[3].row_out[r]) * next;
            store(row + i * lanes, next);
        }
    }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < width; i++) {
            vec y = k < 3 ? out[k][i] * f.decay[k] : out[k][i];
            for (int j = 0; j <= k && k < 3; j++) y += load(f.t[j].lane_in + at + i * lanes) * f.mix[k][j];
            store(f.t[k].out + at + i * lanes, y);
        }
}

// Carries M through `count` tokens, four at a time; `token(i)` describes the i-th, whichever way time runs.
template <class Describe>
void run(std::vector<float>& matrix, int64_t rows, int64_t stride, int64_t count, Describe token) {
    float* m = matrix.data();
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const Four four(token(i), token(i + 1), token(i + 2), token(i + 3), rows);
        int64_t at = 0;
        for (; at + tile * lanes <= stride; at += tile * lanes) advance_four<tile>(m, rows, stride, four, at);
        for (; at < stride; at += lanes) advance_four<1>(m, rows, stride, four, at);
    }
    for (; i < count; i++) {
        const Token t = token(i);
        int64_t at = 0;
        for (; at + tile * lanes <= stride; at += tile * lanes) advance_one<tile>(m, rows, stride, t, at);
        for (; at < stride; at += lanes) advance_one<1>(m, rows, stride, t, at);
    }
}

// Sums over the heads of a group: the first head sets, the others add.
void put(float* to, const float* x, int64_t n, bool first) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = first ? x[i] : to[i] + x[i];
}

// Neighbouring tokens of a head lie pages apart, where no hardware looks ahead: ask for a row long before it is needed.
void fetch(const float* row, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i);
}

// Rows of one block of tokens: in place where they are whole vectors already, else copied and padded with zeros.
struct Rows {
    int64_t width, padded;
    std::vector<float> scratch;
    const float* first = nullptr;
    int64_t stride = 0;

    explicit Rows(int64_t width) : width(width), padded(round_up(width)), scratch(padded == width ? 0 : block * padded) {}

    void read(const float* from, int64_t from_stride, int64_t count) {
        first = from, stride = from_stride;
        if (padded == width) return;
        for (int64_t i = 0; i < count; i++) std::copy_n(from + i * from_stride, width, &scratch[i * padded]);
        first = scratch.data(), stride = padded;
    }
    const float* operator[](int64_t i) const { return first + i * stride; }
};

// One head of one sequence, and scratch rows for one block of its tokens. P is padded to `wide`, N to `deep`.
struct Head {
    const Scan& s;
    const int64_t h, g, begin, length, state, wide, deep;
    std::vector<float> decay, u, by_width, by_size, y, z, states;
    double da = 0, dd = 0, behind = 0;
    const bool leads;  // the first head of its group
    Rows b, c, dy;

    Head(const Scan& scan, int64_t sequence, int64_t head)
        : s(scan), h(head), g(head / (scan.heads / scan.groups)), begin(scan.offsets[sequence]),
          length(scan.offsets[sequence + 1] - begin), state((sequence * scan.heads + head) * scan.width * scan.size),
          wide(round_up(scan.width)), deep(round_up(scan.size)), decay(block + 1), u(block * wide),
          by_width(s.size * wide), by_size(s.width * deep), y(block * wide), z(block * deep),
          leads(head % (scan.heads / scan.groups) == 0), b(s.size), c(s.size), dy(s.width) {}

    const float* x(int64_t t) const { return s.x + (begin + t) * s.x_stride + h * s.width; }
    int64_t at(int64_t t) const { return (begin + t) * s.heads + h; }
    float decay_at(int64_t t) const { return t < length ? fast_exp(s.dt[at(t)] * s.a[h]) : 1.0f; }

    // Asks for the rows of tokens from … from + count, clipped to the sequence.
    void ask(int64_t from, int64_t count, const float* gradient, const float* output) const {
        for (int64_t t = std::max<int64_t>(from, 0); t < std::min(from + count, length); t++) {
            fetch(x(t), s.width);
            fetch(s.b + (begin + t) * s.b_stride + g * s.size, s.size);
            fetch(s.c + (begin + t) * s.c_stride + g * s.size, s.size);
            if (gradient) fetch(gradient + at(t) * s.width, s.width);
            if (output) fetch(output + at(t) * s.width, s.width);
        }
    }

    // Prepares tokens from … from + count; decay[i] is that of token from + i, one more than the block has.
    void read(int64_t from, int64_t count, const float* gradient) {
        b.read(s.b + (begin + from) * s.b_stride + g * s.size, s.b_stride, count);
        c.read(s.c + (begin + from) * s.c_stride + g * s.size, s.c_stride, count);
        if (gradient) dy.read(gradient + at(from) * s.width, s.heads * s.width, count);
        for (int64_t i = 0; i < count; i++) {
            const float dt = s.dt[at(from + i)], *row = x(from + i);
            float* to = &u[i * wide];
            decay[i] = decay_at(from + i);
            for (int64_t p = 0; p < s.width; p++) to[p] = dt * row[p];
        }
        decay[count] = decay_at(from + count);
    }

    // Is the state after the block that begins here kept? After every `span` blocks, and at the end.
    bool keeps(int64_t from) const { return from / block % span == span - 1 || from + block >= length; }

    // A state [P, N] into and out of both ways of holding it.
    void take(const float* state_PN) {
        for (int64_t p = 0; p < s.width; p++)
            for (int64_t n = 0; n < s.size; n++)
                by_width[n * wide + p] = by_size[p * deep + n] = state_PN ? state_PN[p * s.size + n] : 0.0f;
    }
    void give(float* state_PN) const {
        for (int64_t p = 0; p < s.width; p++)
            for (int64_t n = 0; n < s.size; n++) state_PN[p * s.size + n] = by_width[n * wide + p];
    }
};

void forward_block(Head& k, int64_t from) {
    const Scan& s = k.s;
    const int64_t count = std::min(block, k.length - from);
    k.read(from, count, nullptr);
    k.ask(from + block, block, nullptr, nullptr);
    run(k.by_width, s.size, k.wide, count, [&](int64_t i) {
        return Token{k.decay[i], k.b[i], &k.u[i * k.wide], k.c[i], &k.y[i * k.wide]};
    });
    for (int64_t i = 0; i < count; i++) {
        const float *x = k.x(from + i), *y = &k.y[i * k.wide], d = s.d[k.h];
        float* to = s.y + k.at(from + i) * s.width;
#pragma omp simd
        for (int64_t p = 0; p < s.width; p++) to[p] = y[p] + d * x[p];
    }
}

// Forwards in time, M = S as P rows of N lanes: the gradient of C, and S after every block.
void gradient_of_c(Head& k, const ScanGradients& out, int64_t from) {
    const Scan& s = k.s;
    const int64_t count = std::min(block, k.length - from);
    k.read(from, count, out.dy);
    k.ask(from + block, block, out.dy, nullptr);
    run(k.by_size, s.width, k.deep, count, [&](int64_t i) {
        return Token{k.decay[i], &k.u[i * k.wide], k.b[i], k.dy[i], &k.z[i * k.deep]};
    });
    for (int64_t i = 0; i < count; i++)
        put(out.dc + ((k.begin + from + i) * s.groups + k.g) * s.size, &k.z[i * k.deep], s.size, k.leads);
    if (k.keeps(from)) k.states.insert(k.states.end(), k.by_size.begin(), k.by_size.end());
}

// Backwards in time with M = dS held both ways. The decay between tokens t+1 and t belongs to t+1.
void backward_block(Head& k, const ScanGradients& out, int64_t from) {
    const Scan& s = k.s;
    const int64_t wide = k.wide, deep = k.deep, count = std::min(block, k.length - from), last = count - 1;
    if (from + count < k.length) k.read(from, count, out.dy);  // the last block is still there from the gradient of C
    k.ask(from - block, block, out.dy, s.y);
    // <decay_{t+1} dS_{t+1}, S_t> at the last token t of the block: carried on, or afresh where S_t was kept.
    if (k.keeps(from))
        k.behind = dot(&k.states[from / block / span * s.width * deep], k.by_size.data(), s.width * deep) * k.decay[count];
    double behind = k.behind;
    run(k.by_width, s.size, wide, count, [&](int64_t i) {
        const int64_t t = last - i;
        return Token{k.decay[t + 1], k.c[t], k.dy[t], k.b[t], &k.y[t * wide]};
    });
    run(k.by_size, s.width, deep, count, [&](int64_t i) {
        const int64_t t = last - i;
        return Token{k.decay[t + 1], k.dy[t], k.c[t], &k.u[t * wide], &k.z[t * deep]};
    });
    const float a = s.a[k.h], d = s.d[k.h];
    for (int64_t t = last; t >= 0; t--) {
        const int64_t at = k.at(from + t);
        const float *x = k.x(from + t), *g = k.dy[t], *du = &k.y[t * wide], dt = s.dt[at];
        const float skip = dot(g, x, s.width), pull = dot(du, x, s.width);
        const double r = behind + dot(g, s.y + at * s.width, s.width) - static_cast<double>(d) * skip;
        behind = r - static_cast<double>(dt) * pull;
        out.ddt[at] = static_cast<float>(a * behind) + pull;
        k.da += dt * behind, k.dd += skip;
        float* dx = out.dx + at * s.width;
#pragma omp simd
        for (int64_t p = 0; p < s.width; p++) dx[p] = dt * du[p] + d * g[p];
        put(out.db + ((k.begin + from + t) * s.groups + k.g) * s.size, &k.z[t * deep], s.size, k.leads);
    }
    k.behind = behind;
}

// Heads that one thread works on together, block by block, because they share B and C.
std::vector<Head> heads_of(const Scan& s, int64_t sequence, int64_t first, int64_t count) {
    std::vector<Head> heads;
    heads.reserve(count);
    for (int64_t i = 0; i < count; i++) heads.emplace_back(s, sequence, first + i);
    return heads;
}

void forward_heads(const Scan& s, int64_t sequence, int64_t first, int64_t count) {
    std::vector<Head> heads = heads_of(s, sequence, first, count);
    for (Head& k : heads) k.take(s.initial ? s.initial + k.state : nullptr);
    for (int64_t from = 0; from < heads[0].length; from += block)
        for (Head& k : heads) forward_block(k, from);
    for (Head& k : heads) k.give(s.final + k.state);
}

void backward_heads(const Scan& s, const ScanGradients& out, int64_t sequence, int64_t first, int64_t count) {
    std::vector<Head> heads = heads_of(s, sequence, first, count);
    const int64_t length = heads[0].length, blocks = (length + block - 1) / block;
    for (Head& k : heads) k.take(s.initial ? s.initial + k.state : nullptr);
    for (int64_t i = 0; i < blocks; i++)
        for (Head& k : heads) gradient_of_c(k, out, i * block);
    for (Head& k : heads) k.take(out.dfinal + k.state);
    for (int64_t i = blocks - 1; i >= 0; i--)
        for (Head& k : heads) backward_block(k, out, i * block);
    for (Head& k : heads) {
        out.da[sequence * s.heads + k.h] = static_cast<float>(k.da);
        out.dd[sequence * s.heads + k.h] = static_cast<float>(k.dd);
        k.give(out.dinitial + k.state);
        const float decay = k.decay_at(0);
        for (int64_t i = 0; i < s.width * s.size; i++) out.dinitial[k.state + i] *= decay;
    }
}

}  // namespace

void scan_forward(const Scan& s, int threads) {
    const int64_t shared = s.heads / s.groups;
    const int64_t together = s.sequences * s.groups >= threads ? shared : 1, tasks = s.heads / together;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < s.sequences * tasks; task++)
        forward_heads(s, task / tasks, task % tasks * together, together);
}

// dB and dC are sums over the heads of a group, so a group is the work of one thread.
void scan_backward(const Scan& s, const ScanGradients& out, int threads) {
    const int64_t shared = s.heads / s.groups;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < s.sequences * s.groups; task++)
        backward_heads(s, out, task / s.groups, task % s.groups * shared, shared);
}

}  // namespace whimbrel::WHIMBREL_ISA
