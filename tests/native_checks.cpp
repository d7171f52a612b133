// What tests/test_native.py calls to see the headers at work; no part of the package.
#include <chrono>
#include <thread>

#include "gemm.h"

using namespace seqzoo;

// operands: 0 double, 1 float, 2 float rounded to bfloat16, 3 bfloat16.
SEQZOO_EXPORT void check_gemm(int64_t operands, int64_t rows, int64_t columns, int64_t depth, const void* a,
                              int64_t a_stride, int64_t a_flipped, const void* b, int64_t b_stride, int64_t b_flipped,
                              void* c, int64_t c_stride, double alpha, int64_t accumulate) {
    auto run = [&](auto precision, auto kind, auto result) {
        using T = decltype(kind);
        Matrix left{static_cast<const T*>(a), a_stride, a_flipped != 0};
        Matrix right{static_cast<const T*>(b), b_stride, b_flipped != 0};
        Matrix to{static_cast<decltype(result)*>(c), c_stride};
        gemm<precision.value>({rows, columns, depth}, left, right, to, alpha, accumulate != 0);
    };
    std::integral_constant<Precision, Precision::full> full;
    std::integral_constant<Precision, Precision::bf16> bf16;
    if (operands == 0) run(full, double(), double());
    if (operands == 1) run(full, float(), float());
    if (operands == 2) run(bf16, float(), float());
    if (operands == 3) run(bf16, bfloat16(), float());
}

SEQZOO_EXPORT void check_inverse(int64_t dtype, int64_t size, const void* m, int64_t m_stride, void* x,
                                 int64_t x_stride) {
    auto run = [&](auto kind) {
        using T = decltype(kind);
        unit_lower_inverse(size, Matrix{static_cast<const T*>(m), m_stride}, Matrix{static_cast<T*>(x), x_stride});
    };
    dtype == 0 ? run(double()) : run(float());
}

SEQZOO_EXPORT void check_function(int64_t dtype, int64_t which, int64_t count, const void* x, void* y) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto map = [&](auto function) {
            for_each_vector<T>(count, [&](int64_t i, auto load, auto store) {
                store(static_cast<T*>(y) + i, function(load(static_cast<const T*>(x) + i)));
            });
        };
        if (which == 0) map([](auto v) { return v; });
        if (which == 1) map([](auto v) { return exp(v); });
        if (which == 2) map([](auto v) { return expm1(v); });
        if (which == 3) map([](auto v) { return log1p(v); });
        if (which == 4) map([](auto v) { return softplus(v); });
        if (which == 5) map([](auto v) { return sigmoid(v); });
        if (which == 6) map([](auto v) { return silu(v); });
        if (which == 7) map([](auto v) { return tanh(v); });
        if (which == 8) map([](auto v) { return exponentials_below_zero(v).whole; });
        if (which == 9) map([](auto v) { return exponentials_below_zero(v).less_one; });
    });
}

// The sum and the largest lane of each vector of x.
SEQZOO_EXPORT void check_reductions(int64_t dtype, int64_t count, const void* x, double* sums, double* maxima) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        for_each_vector<T>(count, [&](int64_t i, auto load, auto) {
            auto v = load(static_cast<const T*>(x) + i);
            sums[i / LANES<T>] = sum(v);
            maxima[i / LANES<T>] = largest(v);
        });
    });
}

// How many threads worked at once, and how often each of `count` indices was visited.
SEQZOO_EXPORT void check_threads(int64_t threads, int64_t count, int64_t* together, int64_t* visits) {
    std::atomic<int> arrived{0};
    parallel(int(threads), [&](int) {
        arrived++;
        for (int wait = 0; wait < 2000 && arrived < threads; wait++) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    });
    *together = arrived;
    parallel_for(int(threads), count, [&](int64_t index) { visits[index]++; });
}
