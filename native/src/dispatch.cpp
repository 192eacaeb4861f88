// Chooses, once, the widest instruction set that both this build and this processor have.

#include <cstring>

#include "whimbrel.h"

#define DECLARE_PRODUCTS(isa)          \
    namespace whimbrel::isa {          \
    void gemm(const Gemm&, int);       \
    void linear(const Linear&, int);   \
    void decode(const Decode&, int);   \
    }

#define DECLARE(isa)                                                              \
    namespace whimbrel::isa {                                                     \
    void scan_forward(const Scan&, int);                                          \
    void scan_backward(const Scan&, const ScanGradients&, int);                   \
    void conv_forward(const Conv&, int);                                          \
    void conv_backward(const Conv&, const ConvGradients&, int);                   \
    void gated_norm_forward(const GatedNorm&, int);                               \
    void gated_norm_backward(const GatedNorm&, const GatedNormGradients&, int);   \
    void relu2(const Relu2&, int);                                                \
    void matmul(const Matmul&, int);                                              \
    void cross_entropy(const Entropy&, int);                                      \
    void divergence(const Divergence&, int);                                      \
    void attention_forward(const Attention&, int);                                \
    void attention_backward(const Attention&, const AttentionGradients&, int);    \
    }                                                                             \
    DECLARE_PRODUCTS(isa)

DECLARE(baseline)
#ifdef WHIMBREL_AVX2
DECLARE(avx2)
#endif
#ifdef WHIMBREL_AVX512
DECLARE(avx512)
DECLARE_PRODUCTS(vnni)
namespace whimbrel::bf16 {
void matmul(const Matmul&, int);
}
#endif

namespace {

struct Form {
    const char* isa;
    bool (*here)();
    void (*scan_forward)(const Scan&, int);
    void (*scan_backward)(const Scan&, const ScanGradients&, int);
    void (*conv_forward)(const Conv&, int);
    void (*conv_backward)(const Conv&, const ConvGradients&, int);
    void (*gated_norm_forward)(const GatedNorm&, int);
    void (*gated_norm_backward)(const GatedNorm&, const GatedNormGradients&, int);
    void (*relu2)(const Relu2&, int);
    void (*matmul)(const Matmul&, int);
    void (*cross_entropy)(const Entropy&, int);
    void (*divergence)(const Divergence&, int);
    void (*attention_forward)(const Attention&, int);
    void (*attention_backward)(const Attention&, const AttentionGradients&, int);
    void (*gemm)(const Gemm&, int);
    void (*linear)(const Linear&, int);
    void (*decode)(const Decode&, int);
};

// Products of training (large) and of decoding (products) may be of another form than all else (isa).
#define FORM(name, isa, large, products, here)                                                                \
    Form{name, here, whimbrel::isa::scan_forward, whimbrel::isa::scan_backward, whimbrel::isa::conv_forward,  \
         whimbrel::isa::conv_backward, whimbrel::isa::gated_norm_forward, whimbrel::isa::gated_norm_backward, \
         whimbrel::isa::relu2, whimbrel::large::matmul, whimbrel::isa::cross_entropy,                         \
         whimbrel::isa::divergence, whimbrel::isa::attention_forward, whimbrel::isa::attention_backward,      \
         whimbrel::products::gemm, whimbrel::products::linear, whimbrel::products::decode}

#ifdef WHIMBREL_AVX512
bool wide() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

const Form forms[] = {
#ifdef WHIMBREL_AVX512
    FORM("bf16", avx512, bf16, vnni, [] { return wide() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"); }),
    FORM("vnni", avx512, avx512, vnni, [] { return wide() && __builtin_cpu_supports("avx512vnni"); }),
    FORM("avx512", avx512, avx512, avx512, wide),
#endif
#ifdef WHIMBREL_AVX2
    FORM("avx2", avx2, avx2, avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }),
#endif
    FORM("baseline", baseline, baseline, baseline, [] { return true; }),
};

const Form* best() {
    for (const Form& form : forms)
        if (form.here()) return &form;
    return nullptr;
}

const Form* now = best();

}  // namespace

extern "C" {

const char* whimbrel_isa() { return now->isa; }

int whimbrel_use(const char* isa) {
    for (const Form& form : forms)
        if (std::strcmp(form.isa, isa) == 0 && form.here()) return now = &form, 1;
    return 0;
}

void whimbrel_scan_forward(const Scan* scan, int threads) { now->scan_forward(*scan, threads); }

void whimbrel_scan_backward(const Scan* scan, const ScanGradients* gradients, int threads) {
    now->scan_backward(*scan, *gradients, threads);
}

void whimbrel_conv_forward(const Conv* conv, int threads) { now->conv_forward(*conv, threads); }

void whimbrel_conv_backward(const Conv* conv, const ConvGradients* gradients, int threads) {
    now->conv_backward(*conv, *gradients, threads);
}

void whimbrel_gated_norm_forward(const GatedNorm* norm, int threads) { now->gated_norm_forward(*norm, threads); }

void whimbrel_gated_norm_backward(const GatedNorm* norm, const GatedNormGradients* gradients, int threads) {
    now->gated_norm_backward(*norm, *gradients, threads);
}

void whimbrel_relu2(const Relu2* relu2, int threads) { now->relu2(*relu2, threads); }

void whimbrel_matmul(const Matmul* matmul, int threads) { now->matmul(*matmul, threads); }

void whimbrel_cross_entropy(const Entropy* entropy, int threads) { now->cross_entropy(*entropy, threads); }

void whimbrel_divergence(const Divergence* divergence, int threads) { now->divergence(*divergence, threads); }

void whimbrel_attention_forward(const Attention* attention, int threads) { now->attention_forward(*attention, threads); }

void whimbrel_attention_backward(const Attention* attention, const AttentionGradients* gradients, int threads) {
    now->attention_backward(*attention, *gradients, threads);
}

void whimbrel_gemm(const Gemm* gemm, int threads) { now->gemm(*gemm, threads); }

void whimbrel_linear(const Linear* linear, int threads) { now->linear(*linear, threads); }

void whimbrel_decode(const Decode* decode, int threads) { now->decode(*decode, threads); }
}
