// The matrix product of rows.h by itself.

#include "rows.h"
#include "scratch.h"

namespace whimbrel::WHIMBREL_ISA {

void linear(const Linear& l, int threads) {
    const Matrix& m = l.weight.matrix;
    char* memory = scratch(Activations::bytes(l.rows, m.inputs));
    Activations a(memory, l.rows, m.inputs);
    a.x = const_cast<float*>(l.x);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const Part part(m.inputs, thread, threads, block);
        if (whole_numbers(m)) quantise(a, part.from, part.to);
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++) {
        const Part part(m.outputs, thread, threads);
        product(l.weight, a, l.y, m.outputs, part.from, part.to);
    }
}

}  // namespace whimbrel::WHIMBREL_ISA
