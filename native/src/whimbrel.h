// The plain C interface of Whimbrel's native operations. All arrays are float32, row by row; every function is thread-safe.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define WHIMBREL_EXPORT __declspec(dllexport)
#else
#define WHIMBREL_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// A scan over T tokens cut into S sequences, each cut into pieces: piece i is tokens pieces[i] … pieces[i + 1], and sequence s has
// pieces first[s] … first[s + 1]. x [T, H, P], dt [T, H], b and c [T, G, N] may be slices of wider rows: *_stride is the distance
// between tokens in floats (dt, ddt and y are dense). initial may be null. final [S, H, P, N]; kept [K, H, P, N] takes the
// state after piece i as its row slots[i] (-1: not asked for); saved [pieces, H, P, N] that before each piece but the first of a
// sequence, for the backward pass; null without one.
struct Scan {
    const float *x, *dt, *a, *b, *c, *d, *initial;
    float *y, *final, *kept, *saved;
    const int64_t *pieces, *first, *slots;
    int64_t sequences, heads, width, groups, size;
    int64_t x_stride, b_stride, c_stride;
};

// Gradients of a scan, which need no y, final or kept; da, dd are [S, H], one row a sequence. dfinal and dkept may be null (zeros),
// dinitial too (not wanted). dx, db and dc may be slices of wider rows.
struct ScanGradients {
    const float *dy, *dfinal, *dkept;
    float *dx, *ddt, *da, *db, *dc, *dd, *dinitial;
    int64_t dx_stride, db_stride, dc_stride;
};

// A causal depth-wise convolution with SiLU over T rows of I channels (row distance x_stride), cut into sequences.
// weight [W, I], W at most 64; bias may be null; initial and tail [S, W-1, I].
struct Conv {
    const float *x, *weight, *bias, *initial;
    float *y, *tail;
    const int64_t* offsets;  // [S + 1]
    int64_t sequences, channels, width, x_stride;
};

// Gradients of a convolution; dtail may be null (zeros), dx a slice of wider rows; dweight [W, I], dbias [I], dinitial [S, W-1, I].
struct ConvGradients {
    const float *dy, *dtail;
    float *dx, *dweight, *dbias, *dinitial;
    int64_t dx_stride;
};

// RMSNorm(y * silu(gate)) in groups of `width` channels, times weight; scale [T, groups] keeps 1 / rms. gate has its own row
// distance; null: RMSNorm(y) without a gate.
struct GatedNorm {
    const float *y, *gate, *weight;
    float *out, *scale;
    int64_t tokens, groups, width, gate_stride;
    float eps;
};

struct GatedNormGradients {
    const float* dout;
    float *dy, *dgate, *dweight;  // dweight [threads, groups * width], as zeros
    int64_t dgate_stride;
};

// out [count] = max(x, 0)^2, or with dy not null its gradient, for which x may be max(x, 0)^2 (squared).
struct Relu2 {
    const float *x, *dy;
    float* out;
    int64_t count, squared;
};

// c [rows, columns] = a b, plus what stands there with `add`: a(r, k) = a[r * a_row + k * a_step], of which one is 1, b(k, n) =
// b[k * b_step + n * b_column] alike. levels: how often seven products stand for eight; squares, without add: c = max(a b, 0)^2;
// rounded, without levels: of a and b rounded to bfloat16, summed up in float32.
struct Matmul {
    const float *a, *b;
    float* c;
    int64_t rows, columns, depth, a_row, a_step, b_step, b_column, c_row, add, levels, squares, rounded;
};

// loss [rows] = cross-entropy of logits [rows, columns]; a target below 0 is none. With `learn` the logits turn into their gradient
// times up [rows] (null: 1).
struct Entropy {
    float* logits;
    const int64_t* targets;
    const float* up;
    float* loss;
    int64_t rows, columns, learn;
};

// KL(teacher || student) of rows of logits. learn: in place of the student's logits its gradient, times `up` (null: 1), and
// the teacher's are spent.
struct Divergence {
    float *logits, *teacher;
    const float* up;
    float* loss;
    int64_t rows, columns, learn;
};

// Causal attention of S sequences: q and y [T, heads, width], k and v [U, kv_heads, width], tokens *_stride floats apart (y is
// dense). Sequence s has queries queries[s] … queries[s + 1], its last tokens, and at least as many keys keys[s] … keys[s + 1].
// logs [T, heads]: the logarithm of the sum of each row's exponentials, which the gradients want.
struct Attention {
    const float *q, *k, *v;
    float *y, *logs;
    const int64_t *queries, *keys;  // [S + 1]
    int64_t sequences, heads, kv_heads, width, q_stride, k_stride, v_stride;
};

// Gradients of the same, all dense.
struct AttentionGradients {
    const float* dy;
    float *dq, *dk, *dv;
};

// A weight matrix [outputs, inputs] in one of four forms. Few bits: panels of 8 rows, so that 32 bytes meet 4 activations
// and the sums of 8 rows fall into 8 lanes; w = scale * code, one float16 scale for each row and `group` inputs (32, 64 or
// 128, a divisor of inputs), scales [outputs / 8, inputs / group, 8]. A last panel that is not full has rows of scale 0.
//   kind 0  float32 [outputs, inputs]
//   kind 1  float16 [outputs, inputs]
//   kind 2  int8 [outputs / 8, inputs / 4, 32]: byte 4r + i is row r, input 4k + i
//   kind 3  4 bits [outputs / 8, inputs / 8, 32]: code + 8 of row b / 4, input 8k + b % 4 in the low half of byte b, and of
//           4 inputs further in the high half
struct Matrix {
    const void* codes;
    const uint16_t* scales;  // float16 bits; null for kinds 0 and 1
    int64_t outputs, inputs, kind, group;
};

// y = x W^T + bias, which may be null.
struct Projection {
    Matrix matrix;
    const float* bias;
};

// y [rows, outputs] = act(norm(x) W^T + bias) + residual, for many rows.
struct Gemm {
    Projection weight;
    const float *x, *norm, *norm_bias, *gate, *residual;
    float* y;
    int64_t rows, x_stride, gate_stride, groups, act;
    float eps;
};

// The projection of x [rows, inputs] to y [rows, outputs], for a few rows.
struct Linear {
    Projection weight;
    const float* x;
    float* y;
    int64_t rows;
};

// One layer of decoding, x + mixer(norm(x)): its weights, and the state of all sequences in it.
struct Layer {
    const float *norm, *norm_bias;  // no bias: RMSNorm; else LayerNorm with weight + 1
    Projection first, second, third, last;  // Mamba-2: in, -, -, out; attention: q, k, v, o; feed-forward: up, gate, -, down
    const float *conv_weight, *conv_bias, *a_log, *d, *dt_bias, *gated_norm;  // conv_weight [I, W]; conv_bias may be null
    const float *q_norm, *k_norm;  // [head_width], or null
    float *conv, *ssm;             // [slots, W-1, I], oldest first, and [slots, mamba_heads, mamba_width, state_size]
    void *keys, *values;           // [blocks, block_size, kv_heads, head_width]
    int64_t kind;                  // 0 Mamba-2, 1 attention, 2 feed-forward (gate without codes: squared ReLU, else SwiGLU)
};

// One token of each of `rows` sequences through a whole network. hidden [rows, width] is what the final norm gives.
struct Decode {
    const Layer* layers;
    Matrix embeddings;
    const float *norm, *norm_bias;
    const int64_t *tokens, *slots, *lengths;  // [rows]; lengths counts the keys with the present one
    const int64_t* table;                     // [rows, table_stride]: the blocks of keys and values of each row
    const double* frequencies;                // [half], of the rotation, or half 0
    float* hidden;
    int64_t count, rows, width;
    int64_t heads, kv_heads, head_width, half, block_size, table_stride, kv_half;  // kv_half 1: float16
    int64_t mamba_heads, mamba_width, groups, state_size, conv_width;
    float eps, least_step, most_step;
};

WHIMBREL_EXPORT const char* whimbrel_isa();             // vnni (AVX-512 with it), avx512, avx2 or baseline
WHIMBREL_EXPORT int whimbrel_use(const char* isa);      // 0 if that instruction set is not here
WHIMBREL_EXPORT void whimbrel_scan_forward(const Scan* scan, int threads);
WHIMBREL_EXPORT void whimbrel_scan_backward(const Scan* scan, const ScanGradients* gradients, int threads);
WHIMBREL_EXPORT void whimbrel_conv_forward(const Conv* conv, int threads);
WHIMBREL_EXPORT void whimbrel_conv_backward(const Conv* conv, const ConvGradients* gradients, int threads);
WHIMBREL_EXPORT void whimbrel_gated_norm_forward(const GatedNorm* norm, int threads);
WHIMBREL_EXPORT void whimbrel_gated_norm_backward(const GatedNorm* norm, const GatedNormGradients* gradients, int threads);
WHIMBREL_EXPORT void whimbrel_relu2(const Relu2* relu2, int threads);
WHIMBREL_EXPORT void whimbrel_matmul(const Matmul* matmul, int threads);
WHIMBREL_EXPORT void whimbrel_cross_entropy(const Entropy* entropy, int threads);
WHIMBREL_EXPORT void whimbrel_divergence(const Divergence* divergence, int threads);
WHIMBREL_EXPORT void whimbrel_attention_forward(const Attention* attention, int threads);
WHIMBREL_EXPORT void whimbrel_attention_backward(const Attention* attention, const AttentionGradients* gradients, int threads);
WHIMBREL_EXPORT void whimbrel_gemm(const Gemm* gemm, int threads);
WHIMBREL_EXPORT void whimbrel_linear(const Linear* linear, int threads);
WHIMBREL_EXPORT void whimbrel_decode(const Decode* decode, int threads);
}
