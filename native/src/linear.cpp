// The matrix product of linear.h by itself.

#include "linear.h"

namespace whimbrel::WHIMBREL_ISA {

void linear(const Linear& l, int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const Part part(l.outputs, thread, threads);
        product(l, part.from, part.to);
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
