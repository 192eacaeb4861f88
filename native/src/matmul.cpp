// c = a b in float32 for matrices that do not fit a cache, each by rows or turned: the products of training, and of prompts.
//
// As in Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): a is laid out once in tiles of a few
// rows that all threads share, unless it lies by rows and would be used for few columns; each thread lays out a slice of b, as many
// columns as a tile's sums fill registers, that stays in its second-level cache, and takes it times every tile. The sum over the depth
// is cut by the depth alone and goes from front to back, so that neither the number of threads nor the number of rows changes a bit.
//
// With levels, both are cut into quarters (and these again) and seven products of sums of quarters stand for eight: Strassen,
// "Gaussian elimination is not optimal" (1969). Sums are made while laying out; a product goes to its quarters of c from the
// registers. Rounding errors are then relative to the largest rows and columns, and depend on the other rows.
//
// With rounded, a and b are rounded to bfloat16 while they are laid out, and summed up in float32. Where the processor multiplies
// pairs of such numbers (fold 2), a float of what is laid out holds two neighbours in depth and a step of a tile takes both: twice
// the speed. Elsewhere it holds the rounded number, for the same result but for the order of sums.

#include <array>
#include <utility>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "product.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int tall = lanes == 16 ? 8 : lanes == 8 ? 6 : 4, broad = lanes == 16 ? 3 : 2;  // rows and vectors of a tile
constexpr int64_t panel = broad * lanes;                                                  // columns of a slice
constexpr int64_t most_rows = 1024;                   // of what is laid out at once
constexpr int64_t most_laid = 2 << 20;                // floats of a laid out at once: they stay in the third-level cache
constexpr int64_t late = 96;                          // steps before the end at which a tile asks for its place in c
constexpr int64_t ahead = 1024;                       // floats between those of tiles in use and those asked for from the third-level cache
constexpr int64_t early = 16;                         // rows of a turned matrix that are asked for before they are needed
constexpr int64_t close = 12;                         // ... of b, which are in the second-level cache by then
constexpr int64_t few = 1152;                         // columns up to which rows of a are read where they are
constexpr int64_t stride = 16;                        // steps between two looks at what will be needed soon

// Signs of the quarters (upper left, upper right, lower left, lower right) of a and of b in each product, and with which it counts
// in those of c.
constexpr int8_t strassen[3][7][4] = {
    {{1, 0, 0, 1}, {0, 0, 1, 1}, {1, 0, 0, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {-1, 0, 1, 0}, {0, 1, 0, -1}},
    {{1, 0, 0, 1}, {1, 0, 0, 0}, {0, 1, 0, -1}, {-1, 0, 1, 0}, {0, 0, 0, 1}, {1, 1, 0, 0}, {0, 0, 1, 1}},
    {{1, 0, 0, 1}, {0, 0, 1, -1}, {0, 1, 0, 1}, {1, 0, 1, 0}, {-1, 1, 0, 0}, {0, 0, 0, 1}, {1, 0, 0, 0}},
};

struct Terms {
    int count = 0;
    int part[4]{}, sign[4]{};
};

// The terms of each product with a, b and c cut into quarters, these again if levels is 2; parts are counted row by row.
template <int levels>
struct Scheme {
    static constexpr int grid = 1 << levels, products = levels == 0 ? 1 : levels == 1 ? 7 : 49;
    Terms of[3][products];

    constexpr Scheme() : of{} {
        for (int matrix = 0; matrix < 3; matrix++)
            for (int product = 0; product < products; product++) {
                Terms terms{1, {0}, {1}};
                for (int level = 0; level < levels; level++) {
                    Terms finer{};
                    for (int i = 0; i < terms.count; i++)
                        for (int quarter = 0; quarter < 4; quarter++)
                            if (const int sign = strassen[matrix][level + 1 < levels ? product / 7 : product % 7][quarter]) {
                                const int size = 1 << level, row = terms.part[i] / size * 2 + quarter / 2, column = terms.part[i] % size * 2 + quarter % 2;
                                finer.part[finer.count] = row * size * 2 + column;
                                finer.sign[finer.count++] = terms.sign[i] * sign;
                            }
                    terms = finer;
                }
                of[matrix][product] = terms;
            }
    }
};

int64_t limit(int64_t count, int64_t most) { return std::max<int64_t>(0, std::min(count, most)); }

// Numbers of what is multiplied in a float of what is laid out. Of two vectors, rounded: all of one behind all of the other
// (`beside`), or each number of one behind its neighbour in the other (`between`).
#ifdef __AVX512BF16__
template <bool rounded> constexpr int64_t fold = rounded ? 2 : 1;
inline vec beside(vec first, vec second) { return (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
alignas(64) constexpr auto turns = [] {
    std::array<int16_t, 2 * lanes> places{};
    for (int l = 0; l < 2 * lanes; l++) places[l] = static_cast<int16_t>(l % 2 * lanes + l / 2);
    return places;
}();
inline vec between(vec first, vec second) {
    return (vec)_mm512_permutexvar_epi16(_mm512_load_si512(turns.data()), (__m512i)beside(first, second));
}
template <bool rounded>
vec multiply_add(vec sum, vec a, vec b) {
    if constexpr (rounded) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    else return sum + a * b;
}
#else
template <bool rounded> constexpr int64_t fold = 1;
inline vec beside(vec first, vec) { return first; }
inline vec between(vec first, vec) { return first; }
template <bool rounded> vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }
#endif

// To the nearest number of 8 binary digits, of two the even one.
inline vec to_bfloat16(vec x) {
    typedef uint32_t bits __attribute__((vector_size(sizeof(vec))));
    const bits b = std::bit_cast<bits>(x), near = (b + 0x7fff + (b >> 16 & 1)) & 0xffff0000;
    return x == x ? std::bit_cast<vec>(near) : x;
}

// A vector of what is laid out, from neighbours in depth of which `left` are there.
template <bool rounded>
vec along(const float* from, int64_t left) {
    if constexpr (fold<rounded> == 2) return beside(load(from, limit(left, lanes)), load(from + lanes, limit(left - lanes, lanes)));
    const vec v = load(from, left);
    return rounded ? to_bfloat16(v) : v;
}

// The same from n neighbouring lanes of one row or, if it has another behind it in depth, of two.
template <bool rounded>
vec across(const float* from, int64_t step, bool another, int64_t n) {
    const vec v = load(from, n);
    if constexpr (fold<rounded> == 2) return between(v, another ? load(from + step, n) : vec{});
    return rounded ? to_bfloat16(v) : v;
}

// to[k * row + i] = from[i * lane + k] for i < count <= lanes and as many k as `numbers` fill (of fold 2: each k two of these), zeros
// up to `lanes`: what the next k may overwrite. ahead: asks for the rows below, which come next.
template <bool rounded, bool ahead = false>
void lay(const float* from, int64_t lane, int64_t count, int64_t numbers, float* to, int64_t row) {
    constexpr int64_t f = fold<rounded>;
    const int64_t depth = (numbers + f - 1) / f;
    for (int64_t k = 0; k < depth; k += lanes) {
        vec v[lanes];
        for (int64_t i = count; ahead && i < 2 * count; i++)
            for (int64_t j = 0; j < f; j++) __builtin_prefetch(from + i * lane + k * f + j * lanes);
        UNROLL for (int i = 0; i < lanes; i++) v[i] = i < count ? along<rounded>(from + i * lane + k * f, numbers - k * f) : vec{};
        exchange<1>(v);
        if (depth - k >= lanes) {
            UNROLL for (int i = 0; i < lanes; i++) store(to + (k + i) * row, v[i]);
        } else {
            for (int i = 0; i < depth - k; i++) store(to + (k + i) * row, v[i]);
        }
    }
}

// out = the sum of two parts that lie `distance` floats apart, n floats each and rounded up to vectors.
void add_up(const Terms& terms, const float* parts, int64_t distance, int64_t n, float* out) {
    const float *one = parts + terms.part[0] * distance, *other = parts + terms.part[1] * distance;
    const float sign = static_cast<float>(terms.sign[0]), too = static_cast<float>(terms.sign[1]);
    for (int64_t k = 0; k < n; k += lanes) store(out + k, sign * load(one + k) + too * load(other + k));
}

// All seven sums of quarters of a matrix (0: a, 1: b), each sum `step` floats behind the last. A quarter is itself a sum of the
// quarters `coarse` of a grid of parts, so that every part is read once for seven products.
template <int matrix, int levels>
void spread(const Terms& coarse, const float* parts, int64_t distance, int64_t n, float* out, int64_t step) {
    const float* from[2][4];
    float sign[2];
    for (int j = 0; j < 2; j++)
        for (int q = 0; q < 4; q++) {
            const int whole = coarse.part[j % coarse.count], row = whole / 2 * 2 + q / 2, column = whole % 2 * 2 + q % 2;
            from[j][q] = parts + (levels == 2 ? row * 4 + column : q) * distance, sign[j] = static_cast<float>(coarse.sign[j % coarse.count]);
        }
    const auto sweep = [&](auto two) __attribute__((always_inline)) {
        for (int64_t k = 0; k < n; k += lanes) {
            vec v[4];
            UNROLL for (int q = 0; q < 4; q++) {
                v[q] = load(from[0][q] + k);
                if constexpr (two) v[q] = sign[0] * v[q] + sign[1] * load(from[1][q] + k);
            }
            UNROLL for (int r = 0; r < 7; r++) {
                vec total{};
                UNROLL for (int q = 0; q < 4; q++)
                    if (strassen[matrix][r][q]) total = strassen[matrix][r][q] > 0 ? total + v[q] : total - v[q];
                store(out + r * step + k, total);
            }
        }
    };
    if (coarse.count == 2) sweep(std::true_type{});
    else sweep(std::false_type{});  // with sign 1
}

// Lines that will be needed soon, of rows of the caller's matrices: asked for one by one, between the steps of a tile, because each
// that is on its way takes one of the few places for such, and a tile would wait for more.
struct Soon {
    struct Rows {
        const char* first;
        int64_t stride, count, bytes;
        bool write;
    };
    static constexpr int most = 32;
    Rows rows[most];
    int count = 0, next = 0;
    int64_t lines = 0, line = 0;

    void add(const float* first, int64_t stride, int64_t height, int64_t width, bool write = false) {
        if (height <= 0 || width <= 0) return;
        rows[count++] = {reinterpret_cast<const char*>(first), stride * 4, height, width * 4, write};
        lines += height * ((width * 4 + 63) / 64);
    }
    void ask() {
        if (next == count) return;
        Rows& r = rows[next];
        if (r.write) __builtin_prefetch(r.first + line, 1, 2);
        else __builtin_prefetch(r.first + line, 0, 2);
        if ((line += 64) < r.bytes) return;
        line = 0, r.first += r.stride;
        if (!--r.count) next++;
    }
};

vec relu2(vec v) { return above_zero(v) * above_zero(v); }

// Where the sums of a tile go: stored (squares: what is above zero, squared), added or taken away.
struct Places {
    int count;
    bool squares;
    int64_t row;
    float* at[4];
    int sign[4];  // 0: nothing is there yet
};

// laid: a is laid out; else its rows lie a_row apart, and those of the tile below are asked for.
template <int high, int wide, bool laid, bool rounded>
void tile(const float* a, int64_t a_row, const float* b, int64_t depth, const Places& places, Soon& soon, int64_t lines) {
    vec sum[high][wide] = {};
    const auto sweep = [&](int64_t steps) __attribute__((always_inline)) {
        for (int64_t k = 0; k < steps; k++, a += laid ? high : 1, b += panel) {
            if (laid) __builtin_prefetch(a + ahead);
            vec right[wide];
            UNROLL for (int i = 0; i < wide; i++) right[i] = load(b + i * lanes);
            UNROLL for (int r = 0; r < high; r++) {
                const vec left = broadcast(a[laid ? r : r * a_row]);
                UNROLL for (int i = 0; i < wide; i++) sum[r][i] = multiply_add<rounded>(sum[r][i], left, right[i]);
            }
        }
    };
    const int64_t row = places.row, before = depth - std::min(depth, late);
    for (int64_t k = 0, asked = 0; k < before; k += stride) {
        for (; asked * before < lines * (k + stride) && asked < lines; asked++) soon.ask();
        if (!laid)
            for (int r = 0; r < high; r++) __builtin_prefetch(a + (high + r) * a_row, 0, 2);
        sweep(std::min(stride, before - k));
    }
    if (!laid)
        for (int r = 0; r < high; r++)
            for (int64_t k = 0; k < depth - before; k += stride) __builtin_prefetch(a + (high + r) * a_row + k, 0, 2);
    for (int j = 0; j < places.count; j++)
        for (int r = 0; r < high; r++)
            for (int i = 0; i < wide; i++) __builtin_prefetch(places.at[j] + r * row + i * lanes, 1);
    sweep(depth - before);
    for (int j = 0; j < places.count; j++) {
        float* const c = places.at[j];
        if (places.squares) {
            UNROLL for (int r = 0; r < high; r++)
                UNROLL for (int i = 0; i < wide; i++) store(c + r * row + i * lanes, relu2(sum[r][i]));
        } else if (!places.sign[j]) {
            UNROLL for (int r = 0; r < high; r++)
                UNROLL for (int i = 0; i < wide; i++) store(c + r * row + i * lanes, sum[r][i]);
        } else if (places.sign[j] > 0) {
            UNROLL for (int r = 0; r < high; r++)
                UNROLL for (int i = 0; i < wide; i++) store(c + r * row + i * lanes, load(c + r * row + i * lanes) + sum[r][i]);
        } else {
            UNROLL for (int r = 0; r < high; r++)
                UNROLL for (int i = 0; i < wide; i++) store(c + r * row + i * lanes, load(c + r * row + i * lanes) - sum[r][i]);
        }
    }
}

typedef void (*Tile)(const float*, int64_t, const float*, int64_t, const Places&, Soon&, int64_t);
template <bool laid, bool rounded, int wide, int... high>
constexpr std::array<Tile, tall> of_width(std::integer_sequence<int, high...>) {
    return {tile<high + 1, wide, laid, rounded>...};
}
template <bool laid, bool rounded, int... wide>
constexpr std::array<std::array<Tile, tall>, broad> of_all(std::integer_sequence<int, wide...>) {
    return {of_width<laid, rounded, wide + 1>(std::make_integer_sequence<int, tall>())...};
}
template <bool laid, bool rounded>
constexpr std::array tiles_of = of_all<laid, rounded>(std::make_integer_sequence<int, broad>());  // [vectors - 1][rows - 1]

// Parts are of equal size; what is missing from the last counts as zeros.
template <int levels, bool rounded = false>
void multiply(const Matmul& p, int threads) {
    static_assert(!(levels && rounded));
    static constexpr Scheme<levels> scheme;
    constexpr int grid = scheme.grid, parts = grid * grid, products = scheme.products;
    static constexpr Scheme<(levels > 1)> coarse;  // the quarters whose quarters are multiplied
    constexpr int held = levels == 0 ? 0 : levels == 1 ? 1 : 7;  // sums of parts of b at a time
    constexpr int64_t most_deep = levels == 2 ? 256 : levels == 1 ? 512 : 2048;  // one cut: sums go to c from the registers
    constexpr int64_t f = fold<rounded>;  // depths are counted in floats of what is laid out
    const int64_t part_depth = ((p.depth + f - 1) / f + grid - 1) / grid;
    const int64_t part_columns = grid == 1 ? p.columns : round_up((p.columns + grid - 1) / grid), vectors = (part_columns + lanes - 1) / lanes;
    const int64_t cuts = std::max<int64_t>(1, (part_depth + most_deep - 1) / most_deep), deep = (part_depth + cuts - 1) / cuts;
    const bool lays = levels || rounded || p.a_step != 1 || vectors * lanes > few;
    const int64_t high_most = lays && (cuts > 1 || products * part_depth * (2 * most_rows / grid) > most_laid) ? most_rows : 2 * most_rows, chunks = (p.rows + high_most - 1) / high_most;
    const int64_t most_tiles = (((p.rows + chunks - 1) / chunks + grid - 1) / grid + tall - 1) / tall;
    const int64_t tile_floats = tall * deep + lanes, cut_floats = products * most_tiles * tile_floats, slice_floats = deep * panel + lanes;
    const int64_t together = std::max<int64_t>(1, std::min(cuts, lays ? most_laid / cut_floats : cuts));
    int64_t slices = (vectors + broad - 1) / broad;
    if (slices < 8 * threads) slices = std::min(vectors, (slices + threads - 1) / threads * threads);  // or a thread waits for the other
    const int64_t stretches = std::min(most_tiles, (4 * threads + slices - 1) / slices);               // of rows: tasks for every thread
    const auto cut_at = [&](int64_t cut) { return part_depth * cut / cuts; };
    const auto slice_at = [&](int64_t slice) { return vectors * slice / slices * lanes; };
    float* laid = nullptr;
#pragma omp parallel num_threads(threads)
    {
        bool chief = false;
#pragma omp master
        chief = true;
        const int64_t b_floats = (parts + held) * slice_floats, c_floats = parts * most_tiles * tall * panel, a_floats = (parts > 1) * parts * tile_floats;
        char* memory = scratch((a_floats + b_floats + c_floats + chief * lays * together * cut_floats) * sizeof(float) + 4 * (fence + 64));
        float *const a_parts = take<float>(memory, a_floats), *const b_parts = take<float>(memory, b_floats), *const sums = take<float>(memory, c_floats);
        if (chief) laid = take<float>(memory, lays * together * cut_floats);
#pragma omp barrier
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t top = p.rows * chunk / chunks, rows = p.rows * (chunk + 1) / chunks - top, part_rows = (rows + grid - 1) / grid;
            const int64_t tiles = (part_rows + tall - 1) / tall;
            const auto first = [&](int64_t t) { return part_rows * t / tiles; };
            for (int64_t begin = 0; begin < cuts; begin += together) {
                const int64_t end = std::min(cuts, begin + together);
                constexpr int64_t group = parts > 1 ? 1 : 8;  // tiles laid out together: lines of a turned matrix are read once
#pragma omp for collapse(2) schedule(static)
                for (int64_t cut = begin; cut < (lays ? end : begin); cut++)
                    for (int64_t t0 = 0; t0 < tiles; t0 += group) {
                        const int64_t from = cut_at(cut), depth = cut_at(cut + 1) - from, t1 = std::min(tiles, t0 + group);
                        float* const to = laid + (cut - begin) * cut_floats + t0 * tile_floats;
                        for (int part = 0; part < parts; part++) {
                            const int64_t k = part % grid * part_depth + from, numbers = limit(p.depth - k * f, depth * f), there = (numbers + f - 1) / f, above = part / grid * part_rows;
                            const float* const a = p.a + (top + above) * p.a_row + k * f * p.a_step;
                            float* const into = parts > 1 ? a_parts + part * tile_floats : to;
                            if (p.a_row == 1) {
                                int64_t at[group]{}, high[group]{}, count[group]{};
                                for (int64_t t = t0; t < t1; t++)
                                    at[t - t0] = first(t), high[t - t0] = first(t + 1) - first(t), count[t - t0] = limit(rows - above - first(t), lanes);
                                for (int64_t i = 0; i < there; i++) {
                                    const float* const line = a + at[0] + i * f * p.a_step;
                                    if (i + early < there)
                                        for (int64_t j = 0; j < group * tall; j += 16)
                                            for (int64_t l = 0; l < f; l++) __builtin_prefetch(line + (early * f + l) * p.a_step + j);
                                    for (int64_t t = 0; t < t1 - t0; t++) {
                                        float* const one = into + t * tile_floats + i * high[t];
                                        if (!rounded && high[t] == tall && count[t] >= tall) std::memcpy(one, line + at[t] - at[0], tall * sizeof(float));
                                        else store(one, across<rounded>(line + at[t] - at[0], p.a_step, i * f + 1 < numbers, count[t]));
                                    }
                                }
                            }
                            for (int64_t t = t0; t < t1; t++) {
                                const int64_t high = first(t + 1) - first(t);
                                float* const one = into + (t - t0) * tile_floats;
                                if (p.a_row != 1) lay<rounded, true>(a + first(t) * p.a_row, p.a_row, limit(rows - above - first(t), high), numbers, one, high);
                                std::fill_n(one + there * high, (depth - there) * high, 0.0f);
                            }
                        }
                        for (int r = 0; r < products && parts > 1; r += 7)
                            spread<0, levels>(coarse.of[0][r / 7], a_parts, tile_floats, depth * (first(t1) - first(t0)), to + r * most_tiles * tile_floats, most_tiles * tile_floats);
                    }
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < slices * stretches; task++) {
                    const int64_t slice = task / stretches, left = slice_at(slice), wide = (slice_at(slice + 1) - left) / lanes;
                    const int64_t t0 = tiles * (task % stretches) / stretches, t1 = tiles * (task % stretches + 1) / stretches;
                    const auto columns_of = [&](int part, int64_t at) { return limit(p.columns - part % grid * part_columns - at, slice_at(slice + 1) - left); };
                    const auto b_of = [&](int part, int64_t k, int64_t column) { return p.b + (part / grid * part_depth + k) * f * p.b_step + (part % grid * part_columns + column) * p.b_column; };
                    const auto c_of = [&](int part, int64_t row) { return p.c + (top + part / grid * part_rows + row) * p.c_row + part % grid * part_columns + left; };
                    const bool add = p.add || begin, squares = p.squares && end == cuts;
                    const auto move = [&](bool in) {  // sums from c, or to it
                        for (int part = 0; part < parts; part++)
                            for (int64_t t = t0; t < t1; t++) {
                                const int64_t height = limit(rows - part / grid * part_rows - first(t), first(t + 1) - first(t)), width = columns_of(part, left);
                                for (int64_t r = 0; r < height; r++)
                                    for (int64_t i = 0; i < width; i += lanes) {
                                        float *const here = sums + ((part * most_tiles + t) * tall + r) * panel + i, *const there = c_of(part, first(t) + r) + i;
                                        __builtin_prefetch(there + tall * p.c_row, 1);
                                        if (in) store(here, load(there, width - i));
                                        else store(there, squares ? relu2(load(here)) : load(here), width - i);
                                    }
                            }
                    };
                    const bool direct = grid == 1 && end - begin == 1 && left + wide * lanes <= p.columns && !(squares && add);
                    if (add && !direct) move(true);
                    for (int64_t cut = begin; cut < end; cut++) {
                        const int64_t from = cut_at(cut), depth = cut_at(cut + 1) - from;
                        Soon soon;  // the slice after this one and, in the end, c
                        for (int part = 0; part < parts; part++) {
                            const int64_t numbers = limit(p.depth - (part / grid * part_depth + from) * f, depth * f), there = (numbers + f - 1) / f, width = columns_of(part, left);
                            const float* const b = b_of(part, from, left);
                            float* const into = b_parts + part * slice_floats;
                            if (p.b_column == 1) {
                                for (int64_t k = 0; k < there; k++)
                                    for (int64_t i = 0; i < wide * lanes; i += lanes) {
                                        const float* const at = b + k * f * p.b_step + i;
                                        for (int64_t j = 0; j < f; j++) __builtin_prefetch(at + (close * f + j) * p.b_step);
                                        store(into + k * panel + i, across<rounded>(at, p.b_step, k * f + 1 < numbers, limit(width - i, lanes)));
                                    }
                            } else {
                                for (int64_t i = 0; i < wide * lanes; i += lanes)
                                    lay<rounded>(b + i * p.b_column, p.b_column, limit(width - i, lanes), numbers, into + i, panel);
                            }
                            std::fill_n(into + there * panel, (depth - there) * panel, 0.0f);
                            const bool last = cut + 1 == end;
                            const int64_t after = last ? slice_at(std::min(slices, (task + threads) / stretches)) : left;
                            const float* const next = b_of(part, cut_at(last ? begin : cut + 1), after);
                            if (p.b_column == 1) soon.add(next, p.b_step, numbers, columns_of(part, after));
                            else soon.add(next, p.b_column, columns_of(part, after), numbers);
                            if (last && !direct) soon.add(c_of(part, first(t0)), p.c_row, limit(rows - part / grid * part_rows - first(t0), first(t1) - first(t0)), width, true);
                        }
                        const int64_t lines = soon.lines / (products * std::max<int64_t>(1, t1 - t0)) + 1;  // for each tile
                        int seen = 0;
                        for (int r = 0; r < products; r++) {
                            const Terms &right = scheme.of[1][r], &to = scheme.of[2][r];
                            const bool alone = levels < 2 && right.count == 1;  // with sign 1, in every product
                            float* const b = b_parts + (alone ? right.part[0] : parts + r % std::max(1, held)) * slice_floats;
                            if (levels == 2 && r % 7 == 0) spread<1, levels>(coarse.of[1][r / 7], b_parts, slice_floats, depth * panel, b, slice_floats);
                            if (levels == 1 && !alone) add_up(right, b_parts, slice_floats, depth * panel, b);
                            Places places{to.count, squares && direct, panel, {}, {}};
                            for (int j = 0; j < to.count; j++) {
                                const int part = to.part[j];
                                places.at[j] = sums + (part * most_tiles + t0) * tall * panel;
                                places.sign[j] = cut == begin && !add && !(seen >> part & 1) ? 0 : to.sign[j];  // the first sign of each part is 1
                                seen |= 1 << part;
                            }
                            if (direct) places.row = p.c_row, places.at[0] = c_of(0, first(t0));
                            const float* a = laid + (cut - begin) * cut_floats + (r * most_tiles + t0) * tile_floats;
                            for (int64_t t = t0; t < t1; t++, a += tile_floats) {
                                const int64_t high = first(t + 1) - first(t);
                                (lays ? tiles_of<true, rounded> : tiles_of<rounded, rounded>)  // what is rounded is always laid out
                                    [wide - 1][high - 1](lays ? a : p.a + (top + first(t)) * p.a_row + from, p.a_row, b, depth, places, soon, lines);
                                for (int j = 0; j < places.count; j++) places.at[j] += direct ? high * p.c_row : tall * panel;
                            }
                        }
                    }
                    if (!direct) move(false);
                }
            }
        }
    }
}

}  // namespace

void matmul(const Matmul& p, int threads) {
    if (!p.rows || !p.columns) return;
    (p.rounded ? multiply<0, true> : p.levels == 2 ? multiply<2> : p.levels == 1 ? multiply<1> : multiply<0>)(p, threads);
}

}  // namespace whimbrel::WHIMBREL_ISA
