// y = act(norm(x) W^T + bias) + residual for many rows of x: prompts, and sequences that decode together. Rows of x are
// prepared once (normed, quantised, laid out in tiles of a few rows); then a strip of outputs at a time is unpacked into the
// first-level cache and meets every tile. Sums run over the inputs in one order, whatever the number of rows and threads.
//
// W of float32 or float16 is widened and multiplied in float32. W of 8 or 4 bits meets whole numbers on AVX2 and with VNNI
// (below), and is widened elsewhere.

#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "codes.h"
#include "half.h"
#include "scratch.h"
#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t most_rows = 504;  // prepared at once: a multiple of every tile
constexpr int64_t ahead = 1024;     // bytes between the rows in use and those asked for from the second-level cache

#if defined(__AVX2__)
// Keeps a value in its register, and the order of the instructions around it: gcc would spread them until registers spill.
#define PIN(v) asm volatile("" : "+x"(v))
#else
#define PIN(v) (void)(v)
#endif

enum Act : int64_t { plain, squared_relu, silu_times_y };

inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// ---- the rows of x

void rms_norm(const float* x, const float* weight, float* y, int64_t width, float eps) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

void layer_norm_1p(const float* x, const float* weight, const float* bias, float* y, int64_t width, float eps) {
    float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; i++) total += x[i];
    const float mean = total / static_cast<float>(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; i++) y[i] = (x[i] - mean) * scale * (1.0f + weight[i]) + bias[i];
}

// Row `row` of x after its norm: in place, or in `line`.
const float* prepared(const Gemm& g, int64_t row, float* line) {
    const int64_t inputs = g.weight.matrix.inputs;
    const float* x = g.x + row * g.x_stride;
    if (!g.norm) return x;
    if (g.gate) {
        const int64_t width = inputs / g.groups;
        const float* gate = g.gate + row * g.gate_stride;
        for (int64_t i = 0; i < inputs; i++) line[i] = x[i] * gate[i] * sigmoid(gate[i]);
        for (int64_t i = 0; i < inputs; i += width) rms_norm(line + i, g.norm + i, line + i, width, g.eps);
    } else if (g.norm_bias) {
        layer_norm_1p(x, g.norm, g.norm_bias, line, inputs, g.eps);
    } else {
        rms_norm(x, g.norm, line, inputs, g.eps);
    }
    return line;
}

// ---- float32 arithmetic

// x: [block of inputs][tile][input][row]; a strip: [input][2 vectors].
struct Floats {
    static constexpr int64_t rows = lanes == 16 ? 12 : 6, width = 2 * lanes, depth = 256;

    const Matrix& m;
    int64_t all;  // rows of x in hand
    float* x;
    alignas(64) float strip[depth * width];

    static size_t bytes(const Matrix& m, int64_t rows) { return rows * m.inputs * 4; }
    Floats(const Matrix& m, char* memory, int64_t rows) : m(m), all(rows), x(reinterpret_cast<float*>(memory)) {}

    // `count` rows from the row `first`, of all inputs.
    void pack(const float* const* row, int64_t first, int64_t count) const {
        for (int64_t from = 0; from < m.inputs; from += depth) {
            const int64_t to = std::min(m.inputs, from + depth);
            float* at = x + from * all + first * (to - from);
            for (int64_t i = from; i < to; i++)
                for (int64_t r = 0; r < count; r++) *at++ = row[r][i];
        }
    }

    template <typename T>
    void widen_rows(int64_t output, int64_t from, int64_t to) {
        const int64_t there = std::min(width, m.outputs - output);
        for (int64_t o = 0; o < width; o += lanes)
            for (int64_t i = from; i < to; i += lanes) {
                vec v[lanes] = {};
                const T* w = static_cast<const T*>(m.codes) + (output + o) * m.inputs + i;
                const int64_t high = std::min<int64_t>(lanes, there - o), wide = std::min<int64_t>(lanes, to - i);
                if (wide == lanes) {
                    for (int64_t r = 0; r < high; r++) v[r] = load(w + r * m.inputs);
                } else {
                    for (int64_t r = 0; r < high; r++)
                        for (int64_t c = 0; c < wide; c++) v[r][c] = widen(w[r * m.inputs + c]);
                }
                transpose(v);
                for (int64_t c = 0; c < wide; c++) store(strip + (i - from + c) * width + o, v[c]);
            }
    }

    // One level: columns 0, 2, 1, 3 … of pairs of rows; three or four levels turn the square.
    static void transpose(vec (&v)[lanes]) {
        typedef int32_t index __attribute__((vector_size(4 * WHIMBREL_LANES)));
        index low, high;
        for (int i = 0; i < lanes; i++) {
            low[i] = i / 2 + (i % 2) * lanes;
            high[i] = low[i] + lanes / 2;
        }
        for (int level = 1; level < lanes; level *= 2) {
            vec next[lanes];
            UNROLL for (int r = 0; r < lanes / 2; r++) {
                next[2 * r] = __builtin_shuffle(v[r], v[r + lanes / 2], low);
                next[2 * r + 1] = __builtin_shuffle(v[r], v[r + lanes / 2], high);
            }
            std::memcpy(v, next, sizeof next);
        }
    }

    __attribute__((noinline)) void unpack(int64_t output, int64_t from, int64_t to) {
        if (m.kind == 0) widen_rows<float>(output, from, to);
        if (m.kind == 1) widen_rows<uint16_t>(output, from, to);
        if (m.kind >= 2) widen_codes(output, from, to);
    }

    void widen_codes(int64_t output, int64_t from, int64_t to) {
        const int64_t bits = m.kind == 2 ? 8 : 4;
        for (int64_t o = 0; o < width; o += 8)
            for (int64_t i = from; i < to; i++)
                for (int64_t r = 0; r < 8; r++) {
                    float& w = strip[(i - from) * width + o + r];
                    if (output + o >= m.outputs) {
                        w = 0;
                        continue;
                    }
                    const uint8_t* panel = static_cast<const uint8_t*>(m.codes) + (output + o) * m.inputs * bits / 8;
                    const int64_t place = r * 4 + i % 4, both = panel[i / 8 * 32 + place];
                    const int64_t code = bits == 8 ? static_cast<int8_t>(panel[i / 4 * 32 + place])
                                                   : (i % 8 < 4 ? both & 15 : both >> 4) - 8;
                    const uint16_t scale = m.scales[((output + o) / 8 * (m.inputs / m.group) + i / m.group) * 8 + r];
                    w = static_cast<float>(code) * widen(scale);
                }
    }

    template <int count>
    __attribute__((noinline)) void tile(int64_t first, int64_t from, int64_t to, float* sums) const {
        const float *a = x + from * all + first * (to - from), *w = strip;
        vec total[count][2];
        UNROLL for (int r = 0; r < count; r++) {
            total[r][0] = load(sums + r * width);
            total[r][1] = load(sums + r * width + lanes);
        }
        for (int64_t i = from; i < to; i++, a += count, w += width) {
            __builtin_prefetch(a + ahead / 4);
            const vec low = load(w), high = load(w + lanes);
            UNROLL for (int r = 0; r < count; r++) {
                const vec one = broadcast(a[r]);
                total[r][0] += one * low;
                total[r][1] += one * high;
            }
        }
        UNROLL for (int r = 0; r < count; r++) {
            store(sums + r * width, total[r][0]);
            store(sums + r * width + lanes, total[r][1]);
        }
    }
};

// ---- whole numbers

#if defined(__AVX512VNNI__)

// x = scale * code, a scale for each row and 32 inputs; the weight w = scale * (code - offset) with code >= 0, since vpdpbusd
// takes one factor without sign: the sums begin at - offset * sum of the codes of x.
template <int bits>
struct Codes {
    static constexpr int64_t rows = 12, width = 16, depth = 512;

    const Matrix& m;
    int64_t all;      // rows of x in hand
    int8_t* codes;    // [block of inputs][tile][input / 4][row][4]
    float* scales;    // [block of inputs][tile][input / 32][row]
    int32_t* begins;  // the same: where the sums begin
    alignas(64) uint8_t strip[depth * width];
    alignas(64) float of_outputs[depth / block * width];

    static size_t bytes(const Matrix& m, int64_t rows) { return rows * m.inputs * 5 / 4; }
    Codes(const Matrix& m, char* memory, int64_t count)
        : m(m), all(count), codes(reinterpret_cast<int8_t*>(memory)),
          scales(reinterpret_cast<float*>(memory + count * m.inputs)), begins(reinterpret_cast<int32_t*>(scales + count * m.inputs / block)) {}

    void pack(const float* const* row, int64_t first, int64_t count) const {
        for (int64_t from = 0; from < m.inputs; from += depth) {
            const int64_t to = std::min(m.inputs, from + depth), tile = from * all + first * (to - from);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = from; i < to; i += block) {
                    const int64_t at = tile + (i - from) * count;
                    int32_t& begin = begins[at / block + r];
                    quantise_block(row[r] + i, codes + at + r * 4, count * 4, scales[at / block + r], begin);
                    begin *= bits == 8 ? -128 : -8;
                }
        }
    }

    __attribute__((noinline)) void unpack(int64_t output, int64_t from, int64_t to) {
        for (int p = 0; p < 2; p++) {
            const int64_t panel = output / 8 + p;
            if (8 * panel >= m.outputs) {  // no such panel: sums of no matter
                for (int64_t i = 0; i < (to - from) / block; i++) std::fill_n(of_outputs + i * width + 8 * p, 8, 0.0f);
                continue;
            }
            const uint8_t* from_codes = static_cast<const uint8_t*>(m.codes) + (panel * m.inputs + from) * bits;
            for (int64_t i = 0; i < (to - from) / 4; i += 8 / bits) {
                const __m256i read = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from_codes + i * 4 * bits));
                __m256i* at = reinterpret_cast<__m256i*>(strip + i * 64 + 32 * p);
                if (bits == 8) {
                    at[0] = _mm256_xor_si256(read, _mm256_set1_epi8(-128));
                } else {
                    at[0] = _mm256_and_si256(read, _mm256_set1_epi8(15));
                    at[2] = _mm256_and_si256(_mm256_srli_epi16(read, 4), _mm256_set1_epi8(15));
                }
            }
            for (int64_t i = from; i < to; i += block) {
                const uint16_t* scale = m.scales + (panel * (m.inputs / m.group) + i / m.group) * 8;
                const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
                _mm256_store_ps(of_outputs + (i - from) / block * width + 8 * p, wide);
            }
        }
    }

    template <int count>
    __attribute__((noinline)) void tile(int64_t first, int64_t from, int64_t to, float* sums) const {
        const int64_t at = from * all + first * (to - from);
        const int8_t* x = codes + at;
        const uint8_t* w = strip;
        const float *of_x = scales + at / block, *of_w = of_outputs;
        const int32_t* begin = begins + at / block;
        vec total[count];
        UNROLL for (int r = 0; r < count; r++) total[r] = load(sums + r * width);
        for (int64_t i = from; i < to; i += block, of_x += count, begin += count, of_w += width) {
            for (int64_t line = 0; line < block * count; line += 64) __builtin_prefetch(x + ahead + line);
            __m512i acc[count];
            UNROLL for (int r = 0; r < count; r++) acc[r] = _mm512_set1_epi32(begin[r]);
            UNROLL for (int k = 0; k < 8; k++, x += 4 * count, w += 64) {
                const __m512i weight = _mm512_load_si512(w);
                UNROLL for (int r = 0; r < count; r++) {
                    int32_t four;
                    std::memcpy(&four, x + 4 * r, 4);
                    acc[r] = _mm512_dpbusd_epi32(acc[r], weight, _mm512_set1_epi32(four));
                }
            }
            const vec scale = load(of_w);
            UNROLL for (int r = 0; r < count; r++)
                total[r] += __builtin_convertvector((places)acc[r], vec) * (scale * of_x[r]);
        }
        UNROLL for (int r = 0; r < count; r++) store(sums + r * width, total[r]);
    }
};

#elif defined(__AVX2__)

// x = scale * code, a scale for each row and 32 inputs; the weight w = scale * (code - offset) with code >= 0, since
// vpmaddubsw takes one factor without sign. It adds two products in 16 bits, and more of them are added there before they are
// widened: with 4 bits all 16 of a lane, 15 * 127 * 16 at most. With 8 bits it is four, and the scale of x is such that the
// sizes of the four codes of x that fall into a lane sum to 128 at most: 255 * 128. (For normal values that costs one bit.)
template <int bits>
struct Codes {
    static constexpr int64_t rows = 4, width = 16, depth = 1024;
    static constexpr float offset = bits == 8 ? 128 : 8;

    const Matrix& m;
    int64_t all;     // rows of x in hand
    uint8_t* codes;  // [block of inputs][tile][input / 4][row][4]
    float* affine;   // [block of inputs][tile][input / 32][scale, - scale * offset * sum of the codes][row]
    alignas(64) uint8_t strip[2][depth * 8];
    alignas(64) float scales[2][depth / block * 8];

    static size_t bytes(const Matrix& m, int64_t rows) { return rows * m.inputs * 5 / 4; }
    Codes(const Matrix& m, char* memory, int64_t count)
        : m(m), all(count), codes(reinterpret_cast<uint8_t*>(memory)), affine(reinterpret_cast<float*>(memory + count * m.inputs)) {}

    void pack(const float* const* row, int64_t first, int64_t count) const {
        for (int64_t from = 0; from < m.inputs; from += depth) {
            const int64_t to = std::min(m.inputs, from + depth), tile = from * all + first * (to - from);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = from; i < to; i += block) {
                    const int64_t at = tile + (i - from) * count;
                    quantise(row[r] + i, codes + at + r * 4, affine + at / 16 + r, count);
                }
        }
    }

    static void quantise(const float* x, uint8_t* codes, float* affine, int64_t count) {
        __m256 v[4], most = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v[i]);
            if (bits == 8) {  // inputs 0, 1, 4, 5 share a lane, and 2, 3, 6, 7
                size = _mm256_add_ps(size, _mm256_permute2f128_ps(size, size, 1));
                size = _mm256_hadd_ps(size, size);
            }
            most = _mm256_max_ps(most, size);
        }
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        const float largest = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
        constexpr float limit = bits == 8 ? 126 : 127;  // rounding adds a half to each of four
        const __m256 inverse = _mm256_set1_ps(largest > 0 ? limit / largest : 0.0f);
        __m256i n[4];
        for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        int32_t fours[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(fours),
                            _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        for (int k = 0; k < 8; k++) std::memcpy(codes + k * count * 4, fours + k, 4);
        const __m256i total = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
        __m128i t = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
        t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
        const int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
        affine[0] = largest / limit;
        affine[count] = -affine[0] * offset * static_cast<float>(sum);
    }

    __attribute__((noinline)) void unpack(int64_t output, int64_t from, int64_t to) {
        for (int p = 0; p < 2; p++) {
            if (output + 8 * p >= m.outputs) {  // no such panel: sums of no matter
                std::memset(scales[p], 0, sizeof scales[p]);
                continue;
            }
            const int64_t panel = output / 8 + p;
            const uint8_t* from_codes = static_cast<const uint8_t*>(m.codes) + (panel * m.inputs + from) * bits;
            for (int64_t i = 0; i < (to - from) / 4; i += 8 / bits) {
                const __m256i read = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from_codes + i * 4 * bits));
                __m256i* at = reinterpret_cast<__m256i*>(strip[p] + i * 32);
                if (bits == 8) {
                    at[0] = _mm256_xor_si256(read, _mm256_set1_epi8(-128));
                } else {
                    at[0] = _mm256_and_si256(read, _mm256_set1_epi8(15));
                    at[1] = _mm256_and_si256(_mm256_srli_epi16(read, 4), _mm256_set1_epi8(15));
                }
            }
            for (int64_t i = from; i < to; i += block) {
                const uint16_t* scale = m.scales + (panel * (m.inputs / m.group) + i / m.group) * 8;
                const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
                _mm256_store_ps(scales[p] + (i - from) / 4, wide);
            }
        }
    }

    // Sums in whole numbers over 32 inputs of `count` rows of x with two panels.
    template <int count>
    static void dot(const uint8_t* w, const uint8_t* x, __m256i (&total)[count][2]) {
        __m256i ones = _mm256_set1_epi16(1);
        PIN(ones);
        UNROLL for (int r = 0; r < count; r++)
            for (int p = 0; p < 2; p++) {
                total[r][p] = _mm256_setzero_si256();
                PIN(total[r][p]);
            }
        constexpr int step = bits == 8 ? 2 : 1;
        UNROLL for (int k = 0; k < 8; k += step) {
            __m256i weight[2][step];
            for (int p = 0; p < 2; p++)
                for (int u = 0; u < step; u++) {
                    weight[p][u] = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + p * depth * 8 + (k + u) * 32));
                    PIN(weight[p][u]);
                }
            UNROLL for (int r = 0; r < count; r++) {
                __m256i four[step], sum[2];
                for (int u = 0; u < step; u++) {
                    float bytes;
                    std::memcpy(&bytes, x + ((k + u) * count + r) * 4, 4);
                    four[u] = _mm256_castps_si256(_mm256_set1_ps(bytes));
                    PIN(four[u]);
                }
                UNROLL for (int p = 0; p < 2; p++) {
                    sum[p] = _mm256_maddubs_epi16(weight[p][0], four[0]);
                    PIN(sum[p]);
                    if constexpr (bits == 8) {
                        __m256i second = _mm256_maddubs_epi16(weight[p][1], four[1]);
                        PIN(second);
                        sum[p] = _mm256_madd_epi16(_mm256_add_epi16(sum[p], second), ones);
                    }
                }
                UNROLL for (int p = 0; p < 2; p++) {
                    total[r][p] = bits == 8 ? _mm256_add_epi32(total[r][p], sum[p]) : _mm256_add_epi16(total[r][p], sum[p]);
                    PIN(total[r][p]);
                }
            }
        }
        if constexpr (bits == 4)
            UNROLL for (int r = 0; r < count; r++)
                for (int p = 0; p < 2; p++) {
                    total[r][p] = _mm256_madd_epi16(total[r][p], ones);
                    PIN(total[r][p]);
                }
    }

    template <int count>
    __attribute__((noinline)) void tile(int64_t first, int64_t from, int64_t to, float* sums) const {
        const int64_t at = from * all + first * (to - from);
        const uint8_t *x = codes + at, *w = strip[0];
        const float *of_x = affine + at / 16, *of_w = scales[0];
        for (int64_t i = from; i < to; i += block) {
            for (int64_t line = 0; line < block * count; line += 64) __builtin_prefetch(x + ahead + line);
            __builtin_prefetch(of_x + ahead / 16);
            __m256i total[count][2];
            dot<count>(w, x, total);
            asm volatile("" ::: "memory");  // leave the sums where they are: gcc would keep copies
            UNROLL for (int r = 0; r < count; r++) {
                const __m256 scale = _mm256_set1_ps(of_x[r]), less = _mm256_set1_ps(of_x[count + r]);
                UNROLL for (int p = 0; p < 2; p++) {
                    float* to_sum = sums + r * width + 8 * p;
                    __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[r][p]), scale, less);
                    value = _mm256_fmadd_ps(value, _mm256_load_ps(of_w + p * (depth / block * 8)), _mm256_load_ps(to_sum));
                    PIN(value);
                    _mm256_store_ps(to_sum, value);
                }
            }
            x += block * count, w += block * 8, of_x += 2 * count, of_w += 8;
        }
    }
};

#endif

// ---- the whole

// Bias, activation and residual on the sums of one row, to `count` outputs of y.
template <int act>
inline void finish(const float* sums, const float* bias, const float* residual, float* y, int64_t count) {
    for (int64_t o = 0; o < count; o++) {
        float value = sums[o] + bias[o];
        if (act == squared_relu) value = std::max(value, 0.0f) * std::max(value, 0.0f);
        if (act == silu_times_y) value = value * sigmoid(value) * y[o];
        y[o] = value + residual[o];
    }
}

// The same for rows [row, row + rows), outputs from `output`.
template <int act, int64_t width>
void finish(const Gemm& g, const float* sums, int64_t row, int64_t rows, int64_t output) {
    const int64_t outputs = g.weight.matrix.outputs, count = std::min(width, outputs - output);
    float bias[width] = {}, nothing[width] = {};
    if (g.weight.bias) std::copy_n(g.weight.bias + output, count, bias);
    for (int64_t r = row; r < row + rows; r++, sums += width) {
        const float* residual = g.residual ? g.residual + r * outputs + output : nothing;
        float* y = g.y + r * outputs + output;
        if (count == width)
            finish<act>(sums, bias, residual, y, width);
        else
            finish<act>(sums, bias, residual, y, count);
    }
}

template <typename Form, int act>
void tiles(const Gemm& g, const Form& form, int64_t begin, int64_t rows, int64_t output, int64_t from, int64_t to, float* sums) {
    using Tile = void (Form::*)(int64_t, int64_t, int64_t, float*) const;
    constexpr auto kernels = []<size_t... count>(std::index_sequence<count...>) {
        return std::array<Tile, sizeof...(count)>{&Form::template tile<static_cast<int>(count) + 1>...};
    }(std::make_index_sequence<Form::rows>());
    for (int64_t row = 0; row < rows; row += Form::rows, sums += Form::rows * Form::width) {
        const int64_t count = std::min(Form::rows, rows - row);
        const bool last = to == g.weight.matrix.inputs;
        if (from == 0) std::fill_n(sums, count * Form::width, 0.0f);
        if (last)  // the lines of y are on their way while the tile is computed
            for (int64_t r = 0; r < count; r++) __builtin_prefetch(g.y + (begin + row + r) * g.weight.matrix.outputs + output, 1);
        (form.*kernels[count - 1])(row, from, to, sums);
        if (last) finish<act, Form::width>(g, sums, begin + row, count, output);
    }
}

template <typename Form, int act>
void run(const Gemm& g, int threads) {
    const Matrix& m = g.weight.matrix;
    const int64_t parts = pieces(g.rows, most_rows), part = pieces(pieces(g.rows, parts), Form::rows) * Form::rows;
    char* memory = scratch(Form::bytes(m, part) + 64);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> lines(Form::rows * m.inputs), sums(part * Form::width + 16);
        float* aligned = sums.data() + (64 - reinterpret_cast<size_t>(sums.data()) % 64) % 64 / 4;
        for (int64_t begin = 0; begin < g.rows; begin += part) {
            const int64_t rows = std::min(part, g.rows - begin);
            Form form(m, memory, rows);
#pragma omp for schedule(dynamic)
            for (int64_t first = 0; first < rows; first += Form::rows) {
                const float* row[Form::rows];
                const int64_t count = std::min(Form::rows, rows - first);
                for (int64_t r = 0; r < count; r++) row[r] = prepared(g, begin + first + r, &lines[r * m.inputs]);
                form.pack(row, first, count);
            }
#pragma omp for schedule(dynamic)
            for (int64_t output = 0; output < m.outputs; output += Form::width)
                for (int64_t i = 0; i < m.inputs; i += Form::depth) {
                    const int64_t to = std::min(m.inputs, i + Form::depth);
                    form.unpack(output, i, to);
                    tiles<Form, act>(g, form, begin, rows, output, i, to, aligned);
                }
        }
    }
}

template <typename Form>
void run(const Gemm& g, int threads) {
    if (g.act == plain) run<Form, plain>(g, threads);
    if (g.act == squared_relu) run<Form, squared_relu>(g, threads);
    if (g.act == silu_times_y) run<Form, silu_times_y>(g, threads);
}

}  // namespace

void gemm(const Gemm& g, int threads) {
#if defined(__AVX2__)
    if (g.weight.matrix.kind == 2) return run<Codes<8>>(g, threads);
    if (g.weight.matrix.kind == 3) return run<Codes<4>>(g, threads);
#endif
    run<Floats>(g, threads);
}

}  // namespace whimbrel::WHIMBREL_ISA
