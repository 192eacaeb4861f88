// The widest float vector of the instruction set this file is compiled for, as a compiler type: no intrinsics.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define WHIMBREL_LANES 16
#define WHIMBREL_ISA avx512
#elif defined(__AVX2__)
#define WHIMBREL_LANES 8
#define WHIMBREL_ISA avx2
#else
#define WHIMBREL_LANES 4
#define WHIMBREL_ISA baseline
#endif

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

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < lanes; i++) total += v[i];
    return total;
}

// The first n floats, zeros beside them; and back.
inline vec load(const float* from, int64_t n) {
    if (n >= lanes) return load(from);
    vec v{};
    std::memcpy(&v, from, n * sizeof(float));
    return v;
}

inline void store(float* to, vec v, int64_t n) { std::memcpy(to, &v, n >= lanes ? sizeof v : n * sizeof(float)); }

// e^x within 2 units in the last place, without branches or calls, so that loops over it become vector code.
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

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// The same of every lane.
inline vec fast_exp(vec x) {
    typedef int32_t whole __attribute__((vector_size(4 * WHIMBREL_LANES)));
    x = x > -87.0f ? x : vec{} - 87.0f;
    x = x < 88.0f ? x : vec{} + 88.0f;
    const whole n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? vec{} - 0.5f : vec{} + 0.5f), whole);
    const vec m = __builtin_convertvector(n, vec), f = (x - m * 0.693359375f) + m * 2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return (p * f * f + f + 1.0f) * reinterpret_cast<vec>((n + 127) << 23);
}

inline vec sigmoid(vec x) { return 1.0f / (1.0f + fast_exp(-x)); }

inline int64_t round_up(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

}  // namespace whimbrel::WHIMBREL_ISA
