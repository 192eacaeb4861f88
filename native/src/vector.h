// The widest float vector of the instruction set this file is compiled for, as a compiler type: no intrinsics.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define WHIMBREL_LANES 16
#if defined(__AVX512BF16__)
#define WHIMBREL_ISA bf16
#elif defined(__AVX512VNNI__)
#define WHIMBREL_ISA vnni
#else
#define WHIMBREL_ISA avx512
#endif
#elif defined(__AVX2__)
#define WHIMBREL_LANES 8
#define WHIMBREL_ISA avx2
#else
#define WHIMBREL_LANES 4
#define WHIMBREL_ISA baseline
#endif

// Before a loop of a few rounds over values in registers: unless gcc unrolls all of them it keeps them in memory.
#define UNROLL _Pragma("GCC unroll 16")

namespace whimbrel::WHIMBREL_ISA {

constexpr int lanes = WHIMBREL_LANES;
typedef float vec __attribute__((vector_size(4 * WHIMBREL_LANES)));

inline vec load(const float* from) {
    vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, vec v) { std::memcpy(to, &v, sizeof v); }

inline vec broadcast(float x) { return vec{} + x; }
inline vec above_zero(vec x) { return x > 0.0f ? x : vec{}; }

typedef int32_t places __attribute__((vector_size(4 * WHIMBREL_LANES)));

// Halves the vectors and adds: of each stretch of 2 `span` lanes of a, then of b, the halves are added.
template <int span>
[[gnu::always_inline]] inline vec fold(vec a, vec b) {
    constexpr auto mask = [](int half) {
        places m{};
        for (int l = 0; l < lanes; l++) m[l] = l / span * 2 * span + l % span + half * span;  // of a and b side by side
        return m;
    };
    const places low = mask(0), high = mask(1);
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The totals of `count` vectors, a power of two up to `lanes`, to neighbouring floats.
template <int count, int span = WHIMBREL_LANES / 2>
[[gnu::always_inline]] inline void sums(vec (&v)[count], float* to) {
    constexpr int left = count > 1 ? count / 2 : 1;
    vec half[left];
    UNROLL for (int i = 0; i < left; i++) half[i] = fold<span>(v[2 * i], v[count > 1 ? 2 * i + 1 : 0]);
    if constexpr (span > 1)
        sums<left, span / 2>(half, to);
    else
        store(to, half[0]);
}

inline float sum(vec v) {
    vec one[1] = {v};
    float total[lanes];
    sums(one, total);
    return total[0];
}

inline vec larger(vec a, vec b) { return a > b ? a : b; }

template <int span = WHIMBREL_LANES / 2>
inline float largest(vec v) {
    places turned{};
    for (int l = 0; l < lanes; l++) turned[l] = l ^ span;
    const vec both = larger(v, __builtin_shuffle(v, turned));
    if constexpr (span > 1)
        return largest<span / 2>(both);
    else
        return both[0];
}

// The first n floats, zeros beside them; and back.
inline vec load(const float* from, int64_t n) {
    if (n >= lanes) return load(from);
    vec v{};
    std::memcpy(&v, from, n * sizeof(float));
    return v;
}

inline void store(float* to, vec v, int64_t n) {
    if (n >= lanes) return store(to, v);  // a size that the compiler does not know would be a call
    std::memcpy(to, &v, n * sizeof(float));
}

// e^x within 2 units in the last place, without branches or calls. gcc does not make vector code of loops over the first one.
inline float fast_exp(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = static_cast<float>(static_cast<int32_t>(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f)));
    const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
    return (p * f * f + f + 1.0f) * power;
}

inline vec fast_exp(vec x) {
    const vec zero{}, half = zero + 0.5f;
    x = x < zero - 87.0f ? zero - 87.0f : x;  // in this order NaN stays
    x = x > zero + 88.0f ? zero + 88.0f : x;
    const places whole = __builtin_convertvector(x * 1.44269504f + (x < zero ? -half : half), places);
    const vec n = __builtin_convertvector(whole, vec), f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return (p * f * f + f + 1.0f) * std::bit_cast<vec>((whole + 127) << 23);
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + fast_exp(-x)); }

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

inline int64_t round_up(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

}  // namespace whimbrel::WHIMBREL_ISA
