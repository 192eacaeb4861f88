// Activations as whole numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace whimbrel::WHIMBREL_ISA {

constexpr int64_t block = 32;  // inputs that share a scale

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

}  // namespace whimbrel::WHIMBREL_ISA
