// y = x W^T + bias for a few rows of x, with W in any form of `Matrix`: what decoding does. Each weight is read once, from
// memory, in one forward stream a thread, so that the work is to keep that stream running ahead of the arithmetic.
#pragma once

#include <algorithm>
#include <cstddef>

#include "codes.h"
#include "scratch.h"
#include "vector.h"
#include "whimbrel.h"

namespace whimbrel::WHIMBREL_ISA {

constexpr int64_t most_rows = 8;  // of x in one pass over a weight in registers

enum Kind : int64_t { float32, float16, int8, int4 };

// Rows of activations: in float32, and as whole numbers where a matrix of whole numbers asks for them:
// x = scale * code, scale = max |x| / 127 of a row and 32 inputs. Rows lie in bands of 8 (the last may have fewer).
struct Activations {
    float* x;        // [rows, inputs]
    int8_t* codes;   // [band][inputs / 4][row of the band][4]
    float* scales;   // [band][inputs / 32][row of the band]
    int32_t* sums;   // the same: -8 times the sum of 32 codes
    int64_t rows, inputs;

    static size_t bytes(int64_t rows, int64_t inputs) {
        return static_cast<size_t>(rows) * (inputs * 5 + (inputs / block + 1) * 8) + 4 * (64 + fence);
    }
    // Cut from `memory` (of at least `bytes`, on a cache line), which is moved on.
    Activations(char*& memory, int64_t rows, int64_t inputs) : rows(rows), inputs(inputs) {
        x = take<float>(memory, rows * inputs);
        codes = take<int8_t>(memory, rows * inputs);
        scales = take<float>(memory, rows * (inputs / block + 1));
        sums = take<int32_t>(memory, rows * (inputs / block + 1));
    }
};

// Codes, scales and sums of inputs [from, to) of all rows, from x; both multiples of 32.
void quantise(const Activations& a, int64_t from, int64_t to);

// Outputs [from, to) of all rows to y [rows, stride]. `from` is a multiple of 8, and `to` too unless it is the last.
void product(const Projection& p, const Activations& a, float* y, int64_t stride, int64_t from, int64_t to);

// Row `id` of a matrix in float32: [inputs].
void look_up(const Matrix& m, int64_t id, float* y);

inline bool whole_numbers(const Matrix& m) { return m.kind >= int8; }

// The part of `count` things that falls to one thread, in whole grains.
struct Part {
    int64_t from, to;
    Part(int64_t count, int thread, int threads, int64_t grain = 8) {
        const int64_t units = (count + grain - 1) / grain;
        from = std::min(count, units * thread / threads * grain);
        to = std::min(count, units * (thread + 1) / threads * grain);
    }
};

}  // namespace whimbrel::WHIMBREL_ISA
