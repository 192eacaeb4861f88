// The products of rows.h, one kernel for rows of floats and one each for panels of 8 and of 4 bits.

#include "rows.h"

#include <cmath>

#include "half.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t ahead = 4096;  // bytes between the weights in use and those asked for from memory

using Kernel = void (*)(const Projection&, const Activations&, int64_t band, float* y, int64_t stride, int64_t from, int64_t to);

// ---- float32 and float16, row by row: `unrolled` vectors of a row have their own running sums.
template <typename T, int count, int unrolled>
void floats(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, int64_t from, int64_t to) {
    constexpr int64_t step = unrolled * lanes;
    const int64_t inputs = a.inputs;
    const float* x = a.x + band * inputs;
    for (int64_t o = from; o < to; o++) {
        const T* w = static_cast<const T*>(p.matrix.codes) + o * inputs;
        vec total[count][unrolled] = {};
        int64_t i = 0;
        for (; i + step <= inputs; i += step)
            for (int u = 0; u < unrolled; u++) {
                const int64_t at = i + u * lanes;
                __builtin_prefetch(reinterpret_cast<const char*>(w + at) + ahead);
                const vec weight = load(w + at);
                for (int s = 0; s < count; s++) total[s][u] += load(x + s * inputs + at) * weight;
            }
        for (int s = 0; s < count; s++) {
            vec all = total[s][0];
            for (int u = 1; u < unrolled; u++) all += total[s][u];
            float value = sum(all) + (p.bias ? p.bias[o] : 0.0f);
            for (int64_t k = i; k < inputs; k++) value += x[s * inputs + k] * widen(w[k]);
            y[s * stride + o] = value;
        }
    }
}

// ---- whole numbers: the 8 rows of a panel are the lanes.

inline int32_t code(const int8_t* w, int64_t i, int64_t row) { return w[i / 4 * 32 + row * 4 + i % 4]; }

inline int32_t code(const uint8_t* w, int64_t i, int64_t row) {
    const int32_t both = w[i / 8 * 32 + row * 4 + i % 4];
    return (i % 8 < 4 ? both & 15 : both >> 4) - 8;
}

// Bias and sums of 8 outputs of one row, as many as there are.
inline void finish(const Projection& p, const float* total, float* y, int64_t o, int64_t to) {
    for (int64_t i = 0; i < std::min<int64_t>(8, to - o); i++) y[o + i] = total[i] + (p.bias ? p.bias[o + i] : 0.0f);
}

#if defined(__AVX2__)

inline __m256i fetch(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i four(const int8_t* codes) {  // of one row of activations, to all lanes
    int32_t bits;
    std::memcpy(&bits, codes, 4);
    return _mm256_set1_epi32(bits);
}

// Sums over 32 inputs: acc[s] of the rows of a panel with each of `count` rows of activations.
template <int count>
inline void dot(const int8_t* w, const int8_t* codes, const int32_t*, __m256i (&acc)[count]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int s = 0; s < count; s++) acc[s] = _mm256_setzero_si256();
    for (int k = 0; k < 8; k++) {
        if (k % 2 == 0) __builtin_prefetch(w + 32 * k + ahead);
        const __m256i weight = fetch(w + 32 * k), size = _mm256_abs_epi8(weight);
        for (int s = 0; s < count; s++) {
            const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(codes + (k * count + s) * 4), weight));
            acc[s] = _mm256_add_epi32(acc[s], _mm256_madd_epi16(pairs, ones));
        }
    }
}

// Four bits: eight products of 15 * 127 * 2 at most fit into 16 bits, so that they are widened once.
template <int count>
inline void dot(const uint8_t* w, const int8_t* codes, const int32_t* sums, __m256i (&acc)[count]) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    for (int s = 0; s < count; s++) acc[s] = _mm256_setzero_si256();
    for (int k = 0; k < 4; k++) {
        if (k % 2 == 0) __builtin_prefetch(w + 32 * k + ahead);
        const __m256i both = fetch(w + 32 * k);
        const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int s = 0; s < count; s++) {
            acc[s] = _mm256_add_epi16(acc[s], _mm256_maddubs_epi16(first, four(codes + (2 * k * count + s) * 4)));
            acc[s] = _mm256_add_epi16(acc[s], _mm256_maddubs_epi16(second, four(codes + ((2 * k + 1) * count + s) * 4)));
        }
    }
    for (int s = 0; s < count; s++) acc[s] = _mm256_sub_epi32(_mm256_madd_epi16(acc[s], ones), _mm256_set1_epi32(sums[s]));
}

template <typename T, int bits, int count>
void panels(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, int64_t from, int64_t to) {
    const Matrix& m = p.matrix;
    const int64_t blocks = m.group / block;
    for (int64_t o = from; o < to; o += 8) {
        const T* w = static_cast<const T*>(m.codes) + o * m.inputs * bits / 8;
        const uint16_t* scale = m.scales + o * (m.inputs / m.group);
        const int8_t* codes = a.codes + band * m.inputs;
        const float* scales = a.scales + band * (m.inputs / block);
        const int32_t* sums = a.sums + band * (m.inputs / block);
        __m256 total[count] = {};
        for (int64_t g = 0; g < m.inputs; g += m.group, scale += 8) {
            const __m256 of_rows = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale)));
            for (int64_t b = 0; b < blocks; b++) {
                __m256i acc[count];
                dot(w, codes, sums, acc);
                for (int s = 0; s < count; s++)
                    total[s] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[s]), _mm256_mul_ps(of_rows, _mm256_set1_ps(scales[s])), total[s]);
                w += block * bits, codes += block * count, scales += count, sums += count;
            }
        }
        for (int s = 0; s < count; s++) {
            float of_row[8];
            _mm256_storeu_ps(of_row, total[s]);
            finish(p, of_row, y + s * stride, o, to);
        }
    }
}

#else

template <typename T, int bits, int count>
void panels(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, int64_t from, int64_t to) {
    const Matrix& m = p.matrix;
    for (int64_t o = from; o < to; o += 8) {
        const uint16_t* scale = m.scales + o * (m.inputs / m.group);
        float total[count][8] = {};
        for (int64_t at = 0; at < m.inputs; at += block) {
            const T* w = static_cast<const T*>(m.codes) + (o * m.inputs + at * 8) * bits / 8;
            const int8_t* codes = a.codes + band * m.inputs + at * count;
            int32_t acc[count][8] = {};
            for (int64_t i = 0; i < block; i++)
                for (int s = 0; s < count; s++)
                    for (int64_t row = 0; row < 8; row++) acc[s][row] += code(w, i, row) * codes[(i / 4 * count + s) * 4 + i % 4];
            for (int s = 0; s < count; s++) {
                const float of_row = a.scales[band * (m.inputs / block) + at / block * count + s];
                for (int64_t row = 0; row < 8; row++)
                    total[s][row] += static_cast<float>(acc[s][row]) * (widen(scale[at / m.group * 8 + row]) * of_row);
            }
        }
        for (int s = 0; s < count; s++) finish(p, total[s], y + s * stride, o, to);
    }
}

#endif

#define COUNTS(kernel, ...)                                                                                           \
    {kernel<__VA_ARGS__, 1>, kernel<__VA_ARGS__, 2>, kernel<__VA_ARGS__, 3>, kernel<__VA_ARGS__, 4>,                  \
     kernel<__VA_ARGS__, 5>, kernel<__VA_ARGS__, 6>, kernel<__VA_ARGS__, 7>, kernel<__VA_ARGS__, 8>}

template <typename T, int count>
constexpr Kernel floats_of = floats<T, count, count <= 2 ? 4 : count <= 4 ? 2 : 1>;

#define ROWS(T) {floats_of<T, 1>, floats_of<T, 2>, floats_of<T, 3>, floats_of<T, 4>, floats_of<T, 5>, floats_of<T, 6>, floats_of<T, 7>, floats_of<T, 8>}

constexpr Kernel kernels[4][most_rows] = {ROWS(float), ROWS(uint16_t), COUNTS(panels, int8_t, 8), COUNTS(panels, uint8_t, 4)};

// Codes of 32 numbers, to 8 places `step` bytes apart; their scale and sum.
inline void quantise_block(const float* x, int8_t* codes, int64_t step, float& scale, int32_t& sum) {
#if defined(__AVX2__)
    __m256 v[4], most = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v[i]));
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float largest = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    __m256i n[4];
    for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    int32_t fours[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(fours), _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    for (int k = 0; k < 8; k++) std::memcpy(codes + k * step, fours + k, 4);
    const __m256i total = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    sum = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
#else
    float largest = 0;
    for (int i = 0; i < block; i++) largest = std::max(largest, std::abs(x[i]));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    sum = 0;
    for (int i = 0; i < block; i++) {
        const long n = std::lrint(x[i] * inverse);
        codes[i / 4 * step + i % 4] = static_cast<int8_t>(n);
        sum += static_cast<int32_t>(n);
    }
#endif
    scale = largest / 127.0f;
}

}  // namespace

void quantise(const Activations& a, int64_t from, int64_t to) {
    for (int64_t band = 0; band < a.rows; band += most_rows) {
        const int64_t count = std::min(most_rows, a.rows - band);
        for (int64_t s = 0; s < count; s++)
            for (int64_t at = from; at < to; at += block) {
                const int64_t place = band * (a.inputs / block) + at / block * count + s;
                quantise_block(a.x + (band + s) * a.inputs + at, a.codes + band * a.inputs + at * count + s * 4, count * 4,
                               a.scales[place], a.sums[place]);
                a.sums[place] *= 8;
            }
    }
}

void look_up(const Matrix& m, int64_t id, float* y) {
    const int64_t panel = id / 8, row = id % 8;
    const uint16_t* scale = m.scales + panel * (m.inputs / std::max<int64_t>(m.group, 1)) * 8 + row;
    for (int64_t i = 0; i < m.inputs; i++) {
        if (m.kind == float32) y[i] = static_cast<const float*>(m.codes)[id * m.inputs + i];
        if (m.kind == float16) y[i] = widen(static_cast<const uint16_t*>(m.codes)[id * m.inputs + i]);
        if (m.kind == int8) y[i] = code(static_cast<const int8_t*>(m.codes) + panel * m.inputs * 8, i, row) * widen(scale[i / m.group * 8]);
        if (m.kind == int4) y[i] = code(static_cast<const uint8_t*>(m.codes) + panel * m.inputs * 4, i, row) * widen(scale[i / m.group * 8]);
    }
}

void product(const Projection& p, const Activations& a, float* y, int64_t stride, int64_t from, int64_t to) {
    // Many rows: a few weights at a time serve all of them, out of the first cache.
    const int64_t step = a.rows <= most_rows ? to - from : 8;
    for (int64_t o = from; o < to; o += step)
        for (int64_t band = 0; band < a.rows; band += most_rows) {
            const int64_t count = std::min(most_rows, a.rows - band);
            kernels[p.matrix.kind][count - 1](p, a, band, y + band * stride, stride, o, std::min(o + step, to));
        }
}

}  // namespace whimbrel::WHIMBREL_ISA
