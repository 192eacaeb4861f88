// c = a b in float32 for matrices that do not fit a cache, each by rows or turned: the products of training.
//
// As in Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008): a block of b is laid out in panels of
// two vectors that all threads share, and each thread lays out blocks of a in tiles of a few rows that stay in its second-level
// cache; a tile times a panel is summed in registers. The sum over the depth is cut by the depth alone and goes from front to
// back, so that neither the number of threads nor the number of rows changes a bit.

#include <utility>

#include "product.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int tall = lanes == 16 ? 12 : lanes == 8 ? 6 : 4;  // rows of a tile, at most: its sums fill the registers
constexpr int64_t panel = 2 * lanes;                         // columns of a panel
constexpr int64_t most_deep = 384, most_columns = 2048;      // of a block of b
constexpr int64_t most_tiles = 12;                           // of a block of a

// to[k * row + i] = from[i * lane + k] for i < count <= lanes and k < depth, zeros up to `lanes`: what the next k may overwrite.
void lay(const float* from, int64_t lane, int64_t count, int64_t depth, float* to, int64_t row) {
    for (int64_t k = 0; k < depth; k += lanes) {
        vec v[lanes];
        UNROLL for (int i = 0; i < lanes; i++) v[i] = i < count ? load(from + i * lane + k, depth - k) : vec{};
        exchange<1>(v);
        if (depth - k >= lanes) {
            UNROLL for (int i = 0; i < lanes; i++) store(to + (k + i) * row, v[i]);
        } else {
            for (int i = 0; i < depth - k; i++) store(to + (k + i) * row, v[i]);
        }
    }
}

template <int high, int broad>
void tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_row, bool add) {
    vec sum[high][broad] = {};
    UNROLL for (int r = 0; r < high; r++) __builtin_prefetch(c + r * c_row, 1), __builtin_prefetch(c + r * c_row + panel - 1, 1);
    for (int64_t k = 0; k < depth; k++, a += high, b += panel) {
        vec right[broad];
        UNROLL for (int i = 0; i < broad; i++) right[i] = load(b + i * lanes);
        UNROLL for (int r = 0; r < high; r++) {
            const vec left = broadcast(a[r]);
            UNROLL for (int i = 0; i < broad; i++) sum[r][i] += left * right[i];
        }
    }
    UNROLL for (int r = 0; r < high; r++, c += c_row)
        UNROLL for (int i = 0; i < broad; i++) {
            if (add) sum[r][i] += load(c + i * lanes);
            store(c + i * lanes, sum[r][i]);
        }
}

struct Tiles {
    void (*of[tall])(const float*, const float*, int64_t, float*, int64_t, bool);
};
template <int broad, int... high>
constexpr Tiles every(std::integer_sequence<int, high...>) {
    return {{tile<high + 1, broad>...}};
}
constexpr Tiles narrow = every<1>(std::make_integer_sequence<int, tall>()), wide = every<2>(std::make_integer_sequence<int, tall>());

}  // namespace

void matmul(const Matmul& p, int threads) {
    if (!p.rows || !p.columns) return;
    const int64_t cuts = std::max<int64_t>(1, (p.depth + most_deep - 1) / most_deep), strips = (p.columns + most_columns - 1) / most_columns;
    const int64_t strip = round_up((p.columns + strips - 1) / strips), deep = (p.depth + cuts - 1) / cuts;
    int64_t tiles = (p.rows + tall - 1) / tall;
    if (tiles < 16 * threads) tiles = std::min(p.rows, (tiles + threads - 1) / threads * threads);  // or a thread waits for the other
    const int64_t share = (tiles + most_tiles - 1) / most_tiles;
    const int64_t blocks = std::min(tiles, (share + threads - 1) / threads * threads);
    const int64_t panels = (strip + panel - 1) / panel, b_floats = panels * panel * deep;
    const auto first = [&](int64_t t) { return p.rows * t / tiles; };
    float* shared = nullptr;
#pragma omp parallel num_threads(threads)
    {
        bool chief = false;
#pragma omp master
        chief = true;
        const int64_t a_floats = (tiles + blocks - 1) / blocks * (tall * deep + lanes);
        char* memory = scratch((a_floats + chief * b_floats) * sizeof(float) + 2 * (fence + 64));
        float* const a = take<float>(memory, a_floats);
        if (chief) shared = take<float>(memory, b_floats);
#pragma omp barrier
        for (int64_t column = 0; column < p.columns; column += strip)
            for (int64_t cut = 0; cut < cuts; cut++) {
                const int64_t from = p.depth * cut / cuts, depth = p.depth * (cut + 1) / cuts - from;
                const int64_t columns = std::min(strip, p.columns - column), halves = (columns + lanes - 1) / lanes;
                const float* b = p.b + column * p.b_column + from * p.b_step;
                const int64_t piece = p.b_column == 1 ? (depth + 4 * threads - 1) / (4 * threads) : depth, pieces = (depth + piece - 1) / std::max<int64_t>(1, piece);
                const int64_t tasks = p.b_column == 1 ? pieces : halves;
#pragma omp for schedule(static)
                for (int64_t task = 0; task < tasks; task++) {
                    if (p.b_column == 1) {  // by rows: whole rows, so that memory is read as it lies
                        const int64_t begin = task * piece, end = std::min(depth, begin + piece);
                        for (int64_t k = begin; k < end; k++)
                            for (int64_t half = 0; half < halves; half++)
                                store(shared + half / 2 * panel * depth + k * panel + half % 2 * lanes,
                                      load(b + k * p.b_step + half * lanes, columns - half * lanes));
                    } else {
                        const int64_t at = task * lanes;
                        lay(b + at * p.b_column, p.b_column, std::min<int64_t>(lanes, columns - at), depth,
                            shared + task / 2 * panel * depth + task % 2 * lanes, panel);
                    }
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t block = 0; block < blocks; block++) {
                    const int64_t begin = tiles * block / blocks, end = tiles * (block + 1) / blocks, top = first(begin);
                    const float* source = p.a + top * p.a_row + from * p.a_step;
                    const auto place = [&](int64_t t) { return a + (first(t) - top) * depth + (t - begin) * lanes; };
                    if (p.a_row == 1) {
                        for (int64_t k = 0; k < depth; k++)
                            for (int64_t t = begin; t < end; t++) {
                                const int64_t at = first(t) - top, high = first(t + 1) - top - at;
                                store(place(t) + k * high, load(source + k * p.a_step + at, p.rows - top - at));
                            }
                    } else {
                        for (int64_t t = begin; t < end; t++) {
                            const int64_t at = first(t) - top;
                            lay(source + at * p.a_row, p.a_row, first(t + 1) - first(t), depth, place(t), first(t + 1) - first(t));
                        }
                    }
                    for (int64_t at = 0; at < columns; at += panel)
                        for (int64_t t = begin; t < end; t++) {
                            const int64_t high = first(t + 1) - first(t), left = std::min(panel, columns - at);
                            const auto& of = (left > lanes ? wide : narrow).of[high - 1];
                            float* c = p.c + first(t) * p.c_row + column + at;
                            if (left % lanes == 0) {
                                of(place(t), shared + at * depth, depth, c, p.c_row, p.add || cut);
                                continue;
                            }
                            float edge[tall * panel];  // a vector that is not full
                            of(place(t), shared + at * depth, depth, edge, panel, false);
                            for (int64_t r = 0; r < high; r++)
                                for (int64_t i = 0; i < left; i++)
                                    c[r * p.c_row + i] = (p.add || cut ? c[r * p.c_row + i] : 0.0f) + edge[r * panel + i];
                        }
                }
            }
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
