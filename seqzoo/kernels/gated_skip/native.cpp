// A weighted skip and its gate: each token and head is read once and leaves as outputs or gradients.
//
// With z = x + weight skip and f = act(gate): gradient of x = dy f, of skip that times weight, of weight its product
// with skip summed over the channels, of gate dy z act'(gate).
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens and heads of one task.
constexpr int64_t ROWS = 64;

enum Gate { NONE, PLAIN, SILU };

template <class T>
struct Skip {
    const T *x, *skip, *gate;  // [token][head][channel], tokens that many numbers apart
    int64_t x_stride, skip_stride, gate_stride;
    const Wide<T>* weight;  // [token][head]
    int64_t rows, heads, channels;
};

// Call body(row, x, skip, gate) for the numbers of each token and head.
template <class T, class Body>
void for_each_row(const Skip<T>& in, int64_t threads, Body body) {
    parallel_for(int(threads), (in.rows + ROWS - 1) / ROWS, [&](int64_t task) {
        for (int64_t row = task * ROWS; row < std::min(in.rows, (task + 1) * ROWS); row++) {
            const int64_t token = row / in.heads, at = row % in.heads * in.channels;
            body(row, in.x + token * in.x_stride + at, in.skip + token * in.skip_stride + at,
                 in.gate ? in.gate + token * in.gate_stride + at : nullptr);
        }
    });
}

template <int GATE, class T>
void forward(const Skip<T>& in, T* y, int64_t threads) {
    using V = Vec<Wide<T>>;
    for_each_row(in, threads, [&](int64_t row, const T* x, const T* skip, const T* gate) {
        V weight = broadcast<V>(in.weight[row]);
        T* to = y + row * in.channels;
        for_each_vector<T>(in.channels, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            V z = fma(weight, load(skip + i), load(x + i));
            if constexpr (GATE == PLAIN) z *= load(gate + i);
            if constexpr (GATE == SILU) z *= silu(load(gate + i));
            store(to + i, z);
        });
    });
}

template <class T>
struct Gradients {
    const T* y;
    T *x, *skip;
    Wide<T>* weight;
    T* gate;  // null where that is
};

template <int GATE, class T>
void backward(const Skip<T>& in, const Gradients<T>& grad, int64_t threads) {
    using V = Vec<Wide<T>>;
    for_each_row(in, threads, [&](int64_t row, const T* x, const T* skip, const T* gate) {
        V weight = broadcast<V>(in.weight[row]), total{}, one = broadcast<V>(1);
        const int64_t at = row * in.channels;
        for_each_vector<T>(in.channels, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            V dz = load(grad.y + at + i), added = load(skip + i);
            if constexpr (GATE != NONE) {
                V g = load(gate + i), z = fma(weight, added, load(x + i));
                if constexpr (GATE == SILU) {
                    V s = sigmoid(g);
                    store(grad.gate + at + i, dz * z * s * fma(g, one - s, one));
                    dz *= g * s;
                } else {
                    store(grad.gate + at + i, dz * z);
                    dz *= g;
                }
            }
            store(grad.x + at + i, dz);
            store(grad.skip + at + i, dz * weight);
            total = fma(dz, added, total);
        });
        grad.weight[row] = sum(total);
    });
}

// Call body with the kind of gate as a compile-time constant.
template <class Body>
void with_gate(bool given, bool silu, Body body) {
    if (!given) return body(std::integral_constant<int, NONE>());
    if (silu) return body(std::integral_constant<int, SILU>());
    body(std::integral_constant<int, PLAIN>());
}

template <class T>
Skip<T> make(int64_t rows, int64_t heads, int64_t channels, int64_t x_stride, int64_t skip_stride, int64_t gate_stride,
             const void* x, const void* skip, const void* gate, const void* weight) {
    auto data = [](const void* z) { return static_cast<const T*>(z); };
    return {data(x), data(skip), data(gate), x_stride, skip_stride, gate_stride, static_cast<const Wide<T>*>(weight),
            rows,    heads,      channels};
}

}  // namespace

SEQZOO_EXPORT void gated_skip_forward(int64_t threads, int64_t dtype, int64_t rows, int64_t heads, int64_t channels,
                                      int64_t silu, int64_t x_stride, int64_t skip_stride, int64_t gate_stride,
                                      const void* x, const void* skip, const void* gate, const void* weight, void* y) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto in = make<T>(rows, heads, channels, x_stride, skip_stride, gate_stride, x, skip, gate, weight);
        with_gate(gate, silu, [&](auto chosen) { forward<chosen.value>(in, static_cast<T*>(y), threads); });
    });
}

// The gradient of gate may be null where that is.
SEQZOO_EXPORT void gated_skip_backward(int64_t threads, int64_t dtype, int64_t rows, int64_t heads, int64_t channels,
                                       int64_t silu, int64_t x_stride, int64_t skip_stride, int64_t gate_stride,
                                       const void* x, const void* skip, const void* gate, const void* weight,
                                       const void* y_grad, void* x_grad, void* skip_grad, void* weight_grad,
                                       void* gate_grad) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto in = make<T>(rows, heads, channels, x_stride, skip_stride, gate_stride, x, skip, gate, weight);
        Gradients<T> grad{static_cast<const T*>(y_grad), static_cast<T*>(x_grad), static_cast<T*>(skip_grad),
                          static_cast<Wide<T>*>(weight_grad), static_cast<T*>(gate_grad)};
        with_gate(gate, silu, [&](auto chosen) { backward<chosen.value>(in, grad, threads); });
    });
}
