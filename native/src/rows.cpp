// The products of rows.h, one kernel for rows of floats and one each for panels of 8 and of 4 bits.

#include "rows.h"

#include "codes.h"
#include "half.h"
#include "product.h"

namespace whimbrel::WHIMBREL_ISA {
namespace {

constexpr int64_t ahead = 4096;  // bytes between the weights in use and those asked for from memory

// Zen 4 streams faster alone (33 against 29 GB/s of float16, 35.3 against 34.6 of int8), Zen 3 does not.
[[gnu::always_inline]] inline void ask(const void* from) {
    if (lanes < 16) __builtin_prefetch(static_cast<const char*>(from) + ahead);
}

using Kernel = void (*)(const Projection&, const Activations&, int64_t band, float* y, int64_t stride, int64_t from, int64_t to);

// Few rows wait for memory, and one stream of it per core does not fill the bus (Zen 4: 42 GB/s of float16, two far apart 58).
// So outputs go in pairs, one of each half of [from, to), while their sums fit into the registers.
template <int sums>
constexpr int streams = sums <= (lanes == 16 ? 8 : 4) ? 2 : 1;

// Calls `work` for outputs [from, to) in steps: as many at a time as there are streams, what is left alone.
template <int many>
[[gnu::always_inline]] inline void in_streams(int64_t from, int64_t to, int64_t step, auto work) {
    const int64_t each = (to - from) / (many * step) * step;
    for (int64_t o = from; o < from + each; o += step) {
        int64_t at[many];
        UNROLL for (int i = 0; i < many; i++) at[i] = o + i * each;
        work.template operator()<many>(at);
    }
    for (int64_t o = from + many * each; o < to; o += step) work.template operator()<1>({o});
}

// ---- float32 and float16, row by row: `unrolled` vectors of a row have their own running sums.
template <typename T, int count, int unrolled, int many>
inline void outputs(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, const int64_t (&o)[many]) {
    const int64_t inputs = a.inputs;
    const float* x = a.x + band * inputs;
    const T* w[many];
    UNROLL for (int m = 0; m < many; m++) w[m] = static_cast<const T*>(p.matrix.codes) + o[m] * inputs;
    vec total[many][count][unrolled] = {};
    int64_t i = 0;
    for (; i + unrolled * lanes <= inputs; i += unrolled * lanes)
        UNROLL for (int u = 0; u < unrolled; u++) {
            const int64_t at = i + u * lanes;
            UNROLL for (int m = 0; m < many; m++) {
                ask(w[m] + at);
                const vec weight = load(w[m] + at);
                UNROLL for (int s = 0; s < count; s++) total[m][s][u] += load(x + s * inputs + at) * weight;
            }
        }
    UNROLL for (int m = 0; m < many; m++)
        UNROLL for (int s = 0; s < count; s++) {
            vec all = total[m][s][0];
            UNROLL for (int u = 1; u < unrolled; u++) all += total[m][s][u];
            float value = sum(all) + (p.bias ? p.bias[o[m]] : 0.0f);
            for (int64_t k = i; k < inputs; k++) value += x[s * inputs + k] * widen(w[m][k]);
            y[s * stride + o[m]] = value;
        }
}

template <typename T, int count>
void floats(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, int64_t from, int64_t to) {
    constexpr int unrolled = count <= 2 ? 4 : count <= 4 ? 2 : 1;
    in_streams<streams<count * unrolled>>(from, to, 1, [&]<int many>(const int64_t (&o)[many]) {
        outputs<T, count, unrolled, many>(p, a, band, y, stride, o);
    });
}

// ---- the same for many rows: outputs are the lanes. A strip of weights is turned in the first cache and meets all rows.

constexpr int64_t strip_wide = 2 * lanes, strip_deep = 128;
constexpr int strip_rows = lanes == 16 ? 10 : 6;

// y [count, 2 vectors] of `depth` inputs, on top of what is there.
template <int count>
void strip_tile(const float* strip, const float* x, int64_t inputs, int64_t depth, float* y, int64_t stride) {
    vec total[count][2];
    UNROLL for (int s = 0; s < count; s++) total[s][0] = load(y + s * stride), total[s][1] = load(y + s * stride + lanes);
    for (int64_t i = 0; i < depth; i++, strip += strip_wide) {
        const vec low = load(strip), high = load(strip + lanes);
        UNROLL for (int s = 0; s < count; s++) {
            const vec one = broadcast(x[s * inputs + i]);
            total[s][0] += one * low;
            total[s][1] += one * high;
        }
    }
    UNROLL for (int s = 0; s < count; s++) store(y + s * stride, total[s][0]), store(y + s * stride + lanes, total[s][1]);
}

template <typename T>
void turn(const T* w, int64_t inputs, int64_t there, int64_t depth, float* strip) {
    for (int64_t o = 0; o < strip_wide; o += lanes)
        for (int64_t i = 0; i < depth; i += lanes) {
            vec v[lanes] = {};
            const int64_t high = std::clamp<int64_t>(there - o, 0, lanes), wide = std::min<int64_t>(lanes, depth - i);
            for (int64_t r = 0; r < high; r++) {
                const T* from = w + (o + r) * inputs + i;
                if (wide == lanes)
                    v[r] = load(from);
                else
                    for (int64_t c = 0; c < wide; c++) v[r][c] = widen(from[c]);
            }
            exchange<1>(v);
            for (int64_t c = 0; c < wide; c++) store(strip + (i + c) * strip_wide + o, v[c]);
        }
}

template <typename T>
void strips(const Projection& p, const Activations& a, float* y, int64_t stride, int64_t from, int64_t to) {
    using Tile = void (*)(const float*, const float*, int64_t, int64_t, float*, int64_t);
    constexpr Tile tiles[] = {nullptr, strip_tile<1>, strip_tile<2>, strip_tile<3>, strip_tile<4>, strip_tile<5>, strip_tile<6>, strip_tile<7>, strip_tile<8>, strip_tile<9>, strip_tile<10>};
    alignas(64) float strip[strip_deep * strip_wide], edge[strip_rows * strip_wide];
    for (int64_t o = from; o < to; o += strip_wide) {
        const int64_t there = std::min(strip_wide, to - o);
        for (int64_t i = 0; i < a.inputs; i += strip_deep) {
            const int64_t depth = std::min(strip_deep, a.inputs - i);
            turn(static_cast<const T*>(p.matrix.codes) + o * a.inputs + i, a.inputs, there, depth, strip);
            for (int64_t r = 0; r < a.rows; r += strip_rows) {
                const int64_t count = std::min<int64_t>(strip_rows, a.rows - r);
                float *at = y + r * stride + o, *sums = there == strip_wide ? at : edge;
                const int64_t apart = there == strip_wide ? stride : strip_wide;
                for (int64_t s = 0; s < count; s++)
                    if (i == 0)
                        for (int64_t k = 0; k < there; k++) sums[s * apart + k] = p.bias ? p.bias[o + k] : 0.0f;
                    else if (sums == edge)
                        std::copy_n(at + s * stride, there, edge + s * strip_wide);
                tiles[count](strip, a.x + r * a.inputs + i, a.inputs, depth, sums, apart);
                if (sums == edge)
                    for (int64_t s = 0; s < count; s++) std::copy_n(edge + s * strip_wide, there, at + s * stride);
            }
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

#if defined(__AVX512VNNI__)

template <int count>
constexpr int panel_streams = 2;

// Two panels in one register; one alone fills it twice. One factor of vpdpbusd has no sign: 128 is added to codes of 8 bits (those
// of 4 bits have their 8), and its sum taken off.
inline __m512i fetch(const void* first, const void* second) {
    return __builtin_shufflevector(fetch(first), fetch(second), 0, 1, 2, 3, 4, 5, 6, 7);
}

inline vec widen(const uint16_t* first, const uint16_t* second) {
    const auto eight = [](const uint16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
    return _mm512_maskz_cvtph_ps(0xffff, __builtin_shufflevector(eight(first), eight(second), 0, 1, 2, 3));
}

// Four inputs of each row of a panel with those of `count` rows of activations.
template <int count>
inline void dot(__m512i weight, const int8_t* codes, __m512i (&acc)[count]) {
    UNROLL for (int s = 0; s < count; s++) {
        int32_t of_row;
        std::memcpy(&of_row, codes + 4 * s, 4);
        acc[s] = _mm512_dpbusd_epi32(acc[s], weight, _mm512_set1_epi32(of_row));
    }
}

template <typename T, int bits, int count, int many>
inline void eight(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, const int64_t (&o)[many], int64_t to) {
    const Matrix& m = p.matrix;
    const T *first = static_cast<const T*>(m.codes) + o[0] * m.inputs * bits / 8, *second = static_cast<const T*>(m.codes) + o[many - 1] * m.inputs * bits / 8;
    const uint16_t *scale = m.scales + o[0] * (m.inputs / m.group), *other = m.scales + o[many - 1] * (m.inputs / m.group);
    const int8_t* codes = a.codes + band * m.inputs;
    const float* scales = a.scales + band * (m.inputs / block);
    const int32_t* sums = a.sums + band * (m.inputs / block);
    typedef uint16_t shorts __attribute__((vector_size(64)));
    vec total[count] = {};
    for (int64_t g = 0; g < m.inputs; g += m.group, scale += 8, other += 8) {
        const vec of_rows = widen(scale, other);
        for (int64_t b = 0; b < m.group; b += block) {
            __m512i acc[count];
            UNROLL for (int s = 0; s < count; s++) acc[s] = _mm512_set1_epi32(bits == 8 ? 16 * sums[s] : sums[s]);
            UNROLL for (int k = 0; k < bits; k++, first += 32, second += 32) {
                const __m512i read = fetch(first, second), low = _mm512_set1_epi8(15);
                if (bits == 8) dot(_mm512_xor_si512(read, _mm512_set1_epi8(-128)), codes, acc);
                else dot(read & low, codes, acc), dot((__m512i)((shorts)read >> 4) & low, codes + 4 * count, acc);
                codes += 32 / bits * count;
            }
            UNROLL for (int s = 0; s < count; s++)
                total[s] += __builtin_convertvector((places)acc[s], vec) * (of_rows * scales[s]);
            scales += count, sums += count;
        }
    }
    UNROLL for (int s = 0; s < count; s++) {
        float of_row[16];
        store(of_row, total[s]);
        for (int i = 0; i < many; i++) finish(p, of_row + 8 * i, y + s * stride, o[i], to);
    }
}

#else

template <int count>
constexpr int panel_streams = streams<2 * count>;

inline __m256i four(const int8_t* codes) {  // of one row of activations, to all lanes
    int32_t bits;
    std::memcpy(&bits, codes, 4);
    return _mm256_set1_epi32(bits);
}

// Sums over 32 inputs: acc[s] of the rows of a panel with each of `count` rows of activations.
template <int many, int count>
inline void dot(const int8_t* const (&w)[many], const int8_t* codes, const int32_t*, __m256i (&acc)[many][count]) {
    const __m256i ones = _mm256_set1_epi16(1);
    UNROLL for (int m = 0; m < many; m++)
        UNROLL for (int s = 0; s < count; s++) acc[m][s] = _mm256_setzero_si256();
    UNROLL for (int k = 0; k < 8; k++)
        UNROLL for (int m = 0; m < many; m++) {
            if (k % 2 == 0) ask(w[m] + 32 * k);
            const __m256i weight = fetch(w[m] + 32 * k), size = _mm256_abs_epi8(weight);
            UNROLL for (int s = 0; s < count; s++) {
                const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(codes + (k * count + s) * 4), weight));
                acc[m][s] = _mm256_add_epi32(acc[m][s], _mm256_madd_epi16(pairs, ones));
            }
        }
}

// Four bits: eight products of 15 * 127 * 2 at most fit into 16 bits, so that they are widened once.
template <int many, int count>
inline void dot(const uint8_t* const (&w)[many], const int8_t* codes, const int32_t* sums, __m256i (&acc)[many][count]) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    UNROLL for (int m = 0; m < many; m++)
        UNROLL for (int s = 0; s < count; s++) acc[m][s] = _mm256_setzero_si256();
    UNROLL for (int k = 0; k < 4; k++)
        UNROLL for (int m = 0; m < many; m++) {
            if (k % 2 == 0) ask(w[m] + 32 * k);
            const __m256i both = fetch(w[m] + 32 * k);
            const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            UNROLL for (int s = 0; s < count; s++) {
                acc[m][s] = _mm256_add_epi16(acc[m][s], _mm256_maddubs_epi16(first, four(codes + (2 * k * count + s) * 4)));
                acc[m][s] = _mm256_add_epi16(acc[m][s], _mm256_maddubs_epi16(second, four(codes + ((2 * k + 1) * count + s) * 4)));
            }
        }
    UNROLL for (int m = 0; m < many; m++)
        UNROLL for (int s = 0; s < count; s++) acc[m][s] = _mm256_add_epi32(_mm256_madd_epi16(acc[m][s], ones), _mm256_set1_epi32(sums[s]));
}

template <typename T, int bits, int count, int many>
inline void eight(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, const int64_t (&o)[many], int64_t to) {
    const Matrix& m = p.matrix;
    const int64_t blocks = m.group / block;
    const T* w[many];
    const uint16_t* scale[many];
    UNROLL for (int i = 0; i < many; i++) {
        w[i] = static_cast<const T*>(m.codes) + o[i] * m.inputs * bits / 8;
        scale[i] = m.scales + o[i] * (m.inputs / m.group);
    }
    const int8_t* codes = a.codes + band * m.inputs;
    const float* scales = a.scales + band * (m.inputs / block);
    const int32_t* sums = a.sums + band * (m.inputs / block);
    __m256 total[many][count] = {};
    for (int64_t g = 0; g < m.inputs; g += m.group) {
        __m256 of_rows[many];
        UNROLL for (int i = 0; i < many; i++) {
            of_rows[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale[i])));
            scale[i] += 8;
        }
        for (int64_t b = 0; b < blocks; b++) {
            __m256i acc[many][count];
            dot(w, codes, sums, acc);
            UNROLL for (int i = 0; i < many; i++) {
                UNROLL for (int s = 0; s < count; s++)
                    total[i][s] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][s]), _mm256_mul_ps(of_rows[i], _mm256_set1_ps(scales[s])), total[i][s]);
                w[i] += block * bits;
            }
            codes += block * count, scales += count, sums += count;
        }
    }
    UNROLL for (int i = 0; i < many; i++)
        UNROLL for (int s = 0; s < count; s++) {
            float of_row[8];
            _mm256_storeu_ps(of_row, total[i][s]);
            finish(p, of_row, y + s * stride, o[i], to);
        }
}

#endif

template <typename T, int bits, int count>
void panels(const Projection& p, const Activations& a, int64_t band, float* y, int64_t stride, int64_t from, int64_t to) {
    in_streams<panel_streams<count>>(from, to, 8, [&]<int many>(const int64_t (&o)[many]) {
        eight<T, bits, count, many>(p, a, band, y, stride, o, to);
    });
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

constexpr Kernel kernels[4][most_rows] = {COUNTS(floats, float), COUNTS(floats, uint16_t), COUNTS(panels, int8_t, 8), COUNTS(panels, uint8_t, 4)};

}  // namespace

void quantise(const Activations& a, int64_t from, int64_t to) {
    for (int64_t band = 0; band < a.rows; band += most_rows) {
        const int64_t count = std::min(most_rows, a.rows - band);
        for (int64_t s = 0; s < count; s++)
            for (int64_t at = from; at < to; at += block) {
                const int64_t place = band * (a.inputs / block) + at / block * count + s;
                quantise_block(a.x + (band + s) * a.inputs + at, a.codes + band * a.inputs + at * count + s * 4, count * 4,
                               a.scales[place], a.sums[place]);
                a.sums[place] *= -8;
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
    if (a.rows > most_rows && p.matrix.kind == float32) return strips<float>(p, a, y, stride, from, to);
    if (a.rows > most_rows && p.matrix.kind == float16) return strips<uint16_t>(p, a, y, stride, from, to);
    // Many rows: a few weights at a time serve all of them, out of the first cache.
    const int64_t step = a.rows <= most_rows ? to - from : std::max(8, lanes);
    for (int64_t o = from; o < to; o += step)
        for (int64_t band = 0; band < a.rows; band += most_rows) {
            const int64_t count = std::min(most_rows, a.rows - band);
            kernels[p.matrix.kind][count - 1](p, a, band, y + band * stride, stride, o, std::min(o + step, to));
        }
}

}  // namespace whimbrel::WHIMBREL_ISA
