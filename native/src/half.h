// float16 in memory, float32 in registers.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace whimbrel::WHIMBREL_ISA {

inline float widen(float x) { return x; }

inline float widen(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
    float x = std::bit_cast<float>(rest) * 0x1p112f;  // subnormal numbers come right by this product
    if (rest >= 0x0f800000u) x = std::bit_cast<float>(rest | 0x7f800000u);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x) | sign);
}

// To the nearest, ties to even; what float16 cannot hold becomes its largest number.
inline uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
    uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest > 0x477fe000u) return static_cast<uint16_t>(sign | 0x7bffu);
    if (rest < 0x38800000u)
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u));
    rest += 0xc8000fffu + ((rest >> 13) & 1u);
    return static_cast<uint16_t>(sign | (rest >> 13));
}

inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = narrow(x); }

inline vec load(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    vec v{};
    for (int i = 0; i < lanes; i++) v[i] = widen(from[i]);
    return v;
#endif
}

}  // namespace whimbrel::WHIMBREL_ISA
