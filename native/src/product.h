// Small matrix products on tiles that lie in the caches: what the blocked scan is made of. All matrices are scratch with rows
// of whole vectors, so nothing here knows an odd size.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "scratch.h"

namespace whimbrel::WHIMBREL_ISA {

constexpr int64_t chunk = 32;     // tokens worked on together: the stride of matrices of tokens by tokens
constexpr int64_t at_once = 64;   // cache lines that a tile asks for
constexpr int most_high = 6;      // rows of a register tile
constexpr int most_broad = WHIMBREL_LANES == 16 ? 4 : 2;  // vectors of a register tile

// Floats from row to row of a scratch matrix: an odd number of cache lines, so that a column of them falls into different sets.
inline int64_t pitch(int64_t width) { return (width + 15) / 16 * 16 | 16; }

// One piece of memory, zeros at first, that a thread's scratch matrices are cut from; each begins on a cache line.
struct Arena {
    static constexpr int64_t most_arrays = 32;
    const int64_t size;  // bytes
    char *const begin, *next;

    explicit Arena(int64_t floats)
        : size((floats * 4 + most_arrays * fence + 63) / 64 * 64), begin(static_cast<char*>(std::aligned_alloc(64, size))), next(begin) {
        if (!begin) throw std::bad_alloc();
        std::fill_n(begin, size, char{0});
    }
    Arena(const Arena&) = delete;
    ~Arena() { std::free(begin); }

    float* take(int64_t floats) {
        float* const at = whimbrel::WHIMBREL_ISA::take<float>(next, floats);
        assert(next <= begin + size);
        return at;
    }
};

// Rows of the caller's arrays that will be needed soon. Neighbouring tokens of a head lie pages apart, where no hardware looks ahead,
// and asking for many at once only waits for them: each tile of a product asks for a few.
struct Ahead {
    struct Rows {
        const char* at;
        int64_t stride, left, bytes;
        bool write;
    };
    static constexpr int most = 8;
    Rows rows[most];
    int count = 0, next = 0;

    void add(const float* first, int64_t stride, int64_t height, int64_t width, bool write = false) {
        if (height <= 0) return;
        if (next == count) next = count = 0;
        if (count < most) rows[count++] = {reinterpret_cast<const char*>(first), stride * 4, height, width * 4, write};
    }
    void ask(int64_t lines) {
        while (lines > 0 && next < count) {
            Rows& r = rows[next];
            for (; lines > 0 && r.left > 0; r.left--, r.at += r.stride, lines -= (r.bytes + 63) / 64)
                for (int64_t i = 0; i < r.bytes; i += 64)
                    if (r.write) __builtin_prefetch(r.at + i, 1, 2);
                    else __builtin_prefetch(r.at + i, 0, 2);
            if (!r.left) next++;
        }
    }
};

// out = fade base + scale (a b) + (c d) over `high` rows and `broad` lanes, with
//   a(r, k) = a[r * a_row + k * a_step], b(k, lane) = b[k * b_step + lane], k < depth, and c, d alike over tokens.
struct Product {
    const float *a = nullptr, *b = nullptr;
    int64_t a_row = 0, a_step = 0, b_step = 0, depth = 0;
    const float* scale = nullptr;  // one of each row; null: 1
    const float *c = nullptr, *d = nullptr;
    int64_t c_row = 0, c_step = 0, d_step = 0, tokens = 0;
    enum { none, past, future } order = none;  // c(r, k) counts for k <= r, or for k >= r
    const float* base = nullptr;               // laid out as out; null: 0
    float fade = 1.0f;
    const float* fades = nullptr;  // in its place, one of each row
    float* out = nullptr;
    int64_t out_row = 0;
    bool lower = false;  // only lanes up to the row's own number are wanted
    Ahead* ahead = nullptr;
};

template <int high, int broad>
[[gnu::always_inline]] inline void sweep(vec (&acc)[high][broad], const float* a, int64_t a_row, int64_t a_step,
                                         const float* b, int64_t b_step, int64_t depth) {
    for (int64_t k = 0; k < depth; k++, a += a_step, b += b_step) {
        vec right[broad];
#pragma GCC unroll 8
        for (int i = 0; i < broad; i++) right[i] = load(b + i * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < high; r++) {
            const vec left = broadcast(a[r * a_row]);
#pragma GCC unroll 8
            for (int i = 0; i < broad; i++) acc[r][i] += left * right[i];
        }
    }
}

template <int high, int broad>
void product_tile(const Product& p, int64_t row, int64_t lane) {
    vec acc[high][broad] = {};
    if (p.depth)  // a and b may be null without
        sweep<high, broad>(acc, p.a + row * p.a_row, p.a_row, p.a_step, p.b + lane, p.b_step, p.depth);
    if (p.scale) {
#pragma GCC unroll 8
        for (int r = 0; r < high; r++)
#pragma GCC unroll 8
            for (int i = 0; i < broad; i++) acc[r][i] *= p.scale[row + r];
    }
    if (p.order) {
        const int64_t from = p.order == Product::past ? 0 : row;
        const int64_t to = p.order == Product::past ? std::min(row + high, p.tokens) : p.tokens;
        sweep<high, broad>(acc, p.c + row * p.c_row + from * p.c_step, p.c_row, p.c_step, p.d + from * p.d_step + lane,
                           p.d_step, to - from);
    }
    const float* base = p.base ? p.base + row * p.out_row + lane : nullptr;
    float* out = p.out + row * p.out_row + lane;
#pragma GCC unroll 8
    for (int r = 0; r < high; r++)
#pragma GCC unroll 8
        for (int i = 0; i < broad; i++) {
            if (base) acc[r][i] += (p.fades ? p.fades[row + r] : p.fade) * load(base + r * p.out_row + i * lanes);
            store(out + r * p.out_row + i * lanes, acc[r][i]);
        }
}

template <int broad>
inline void product_rows(const Product& p, int64_t high, int64_t lane) {
    const int64_t tiles = (high + most_high - 1) / most_high;
    for (int64_t t = 0; t < tiles; t++) {  // as even as possible: 32 rows are 6 + 6 + 5 + 5 + 5 + 5
        const int64_t row = high * t / tiles, next = high * (t + 1) / tiles;
        if (p.lower && lane >= next) continue;
        if (p.ahead) p.ahead->ask(at_once);
        switch (next - row) {
            case 1: product_tile<1, broad>(p, row, lane); break;
            case 2: product_tile<2, broad>(p, row, lane); break;
            case 3: product_tile<3, broad>(p, row, lane); break;
            case 4: product_tile<4, broad>(p, row, lane); break;
            case 5: product_tile<5, broad>(p, row, lane); break;
            default: product_tile<6, broad>(p, row, lane);
        }
    }
}

inline void multiply(const Product& p, int64_t high, int64_t width) {
    int64_t lane = 0;
    if (most_broad > 2 && p.lower)  // narrow tiles leave out more of what is not wanted, and 6 sums are enough for one unit
        for (; lane < width; lane += lanes) product_rows<1>(p, high, lane);
    for (; lane + most_broad * lanes <= width; lane += most_broad * lanes) product_rows<most_broad>(p, high, lane);
    if constexpr (most_broad > 2)
        for (; lane + 2 * lanes <= width; lane += 2 * lanes) product_rows<2>(p, high, lane);
    for (; lane < width; lane += lanes) product_rows<1>(p, high, lane);
}

// Copies `high` rows of `width` floats into rows of whole vectors; zeros beside and below them.
inline void pack(const float* from, int64_t from_row, int64_t high, int64_t width, float* to, int64_t to_row) {
    const int64_t wide = round_up(width);
    for (int64_t r = 0; r < high; r++) {
        const float* row = from + r * from_row;
        float* into = to + r * to_row;
        int64_t i = 0;
        for (; i + lanes <= width; i += lanes) store(into + i, load(row + i));
        for (; i < width; i++) into[i] = row[i];
        for (; i < wide; i++) into[i] = 0.0f;
    }
    for (int64_t r = high; r < round_up(high); r++) std::fill_n(to + r * to_row, wide, 0.0f);
}

// A square of vectors, turned in place: log2(lanes) rounds of exchanges at distance 1, 2, 4 ...
template <int distance>
[[gnu::always_inline]] inline void exchange(vec (&v)[lanes]) {
    constexpr auto mask = [](int shift) {
        places m{};
        for (int l = 0; l < lanes; l++) m[l] = l & distance ? l + (shift ? 0 : lanes - distance) : l;
        if (shift)
            for (int l = 0; l < lanes; l++) m[l] = l & distance ? lanes + l : l + distance;
        return m;
    };
    const places low = mask(0), high = mask(1);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; i++)
        if (!(i & distance)) {
            const vec a = v[i], b = v[i + distance];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + distance] = __builtin_shuffle(a, b, high);
        }
    if constexpr (distance * 2 < lanes) exchange<distance * 2>(v);
}

// to[c][r] = from[r][c] for `high` rows and `width` lanes, both rounded up to whole vectors.
inline void transpose(const float* from, int64_t from_row, int64_t high, int64_t width, float* to, int64_t to_row) {
    for (int64_t r = 0; r < high; r += lanes)
        for (int64_t c = 0; c < width; c += lanes) {
            vec v[lanes];
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) v[i] = load(from + (r + i) * from_row + c);
            exchange<1>(v);
#pragma GCC unroll 16
            for (int i = 0; i < lanes; i++) store(to + (c + i) * to_row + r, v[i]);
        }
}

}  // namespace whimbrel::WHIMBREL_ISA
