// A weighted skip and its gate: each token and head is read once and leaves as outputs or gradients.
//
// With z = x + weight skip and f = act(gate): gradient of x = dy f, of skip that times weight, of weight its product
// with skip summed over the channels, of gate dy z act'(gate). Where there is no skip, z is x.
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens and heads of one task.
constexpr int64_t ROWS = 64;

// The first ones as native.py has them.
enum Gate { PLAIN, SILU, SIGMOID, GELU, NONE };

template <class T>
struct Inputs {
    const T *x, *gate, *skip;  // [token][head][channel], tokens that many numbers apart; gate or skip may be null
    int64_t x_stride, gate_stride, skip_stride;
    const Wide<T>* weight;  // [token][head]
    int64_t rows, heads, channels;
};

// act(gate), and its derivative.
template <class V>
struct Opened {
    V value, slope;
};

template <int GATE, class V>
SEQZOO_INLINE Opened<V> open(V gate) {
    const V one = broadcast<V>(1);
    if constexpr (GATE == PLAIN) return {gate, one};
    if constexpr (GATE == GELU) {
        // (1 + tanh(u)) / 2 = sigmoid(2 u) with 2 u = sqrt(8 / pi) (g + 0.044715 g^3)
        const V scale = broadcast<V>(Lane<V>(1.5957691216057308)), cubic = broadcast<V>(Lane<V>(0.044715));
        V square = cubic * gate * gate, s = sigmoid(scale * fma(square, gate, gate));
        return {gate * s, s * fma(gate * (one - s), scale * fma(broadcast<V>(3), square, one), one)};
    }
    V s = sigmoid(gate);
    if constexpr (GATE == SIGMOID) return {s, s * (one - s)};
    return {gate * s, s * fma(gate, one - s, one)};
}

// Call body(row, x, gate, skip) for the numbers of each token and head.
template <class T, class Body>
void for_each_row(const Inputs<T>& in, int64_t threads, Body body) {
    parallel_for(int(threads), (in.rows + ROWS - 1) / ROWS, [&](int64_t task) {
        for (int64_t row = task * ROWS; row < std::min(in.rows, (task + 1) * ROWS); row++) {
            const int64_t token = row / in.heads, at = row % in.heads * in.channels;
            body(row, in.x + token * in.x_stride + at, in.gate ? in.gate + token * in.gate_stride + at : nullptr,
                 in.skip ? in.skip + token * in.skip_stride + at : nullptr);
        }
    });
}

template <int GATE, bool SKIP, class T>
void forward(const Inputs<T>& in, T* y, int64_t threads) {
    using V = Vec<Wide<T>>;
    for_each_row(in, threads, [&](int64_t row, const T* x, const T* gate, const T* skip) {
        V weight = broadcast<V>(SKIP ? in.weight[row] : 0);
        T* to = y + row * in.channels;
        for_each_vector<T>(in.channels, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            V z = load(x + i);
            if constexpr (SKIP) z = fma(weight, load(skip + i), z);
            if constexpr (GATE != NONE) z *= open<GATE>(load(gate + i)).value;
            store(to + i, z);
        });
    });
}

template <class T>
struct Gradients {
    const T* y;
    T *x, *gate, *skip;  // these and that of weight: null where that is
    Wide<T>* weight;
};

template <int GATE, bool SKIP, class T>
void backward(const Inputs<T>& in, const Gradients<T>& grad, int64_t threads) {
    using V = Vec<Wide<T>>;
    for_each_row(in, threads, [&](int64_t row, const T* x, const T* gate, const T* skip) {
        V weight = broadcast<V>(SKIP ? in.weight[row] : 0), total{};
        const int64_t at = row * in.channels;
        for_each_vector<T>(in.channels, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            V dz = load(grad.y + at + i), added{};
            if constexpr (SKIP) added = load(skip + i);
            if constexpr (GATE != NONE) {
                V z = load(x + i);
                if constexpr (SKIP) z = fma(weight, added, z);
                auto opened = open<GATE>(load(gate + i));
                store(grad.gate + at + i, dz * z * opened.slope);
                dz *= opened.value;
            }
            store(grad.x + at + i, dz);
            if constexpr (SKIP) {
                store(grad.skip + at + i, dz * weight);
                total = fma(dz, added, total);
            }
        });
        if constexpr (SKIP) grad.weight[row] = sum(total);
    });
}

// Call body with the kind of gate and whether there is a skip, as compile-time constants.
template <class Body>
void with_parts(int64_t activation, bool gate, bool skip, Body body) {
    auto with = [&](auto chosen) {
        if (skip) return body(chosen, std::true_type());
        // A gate or a skip is always given.
        if constexpr (chosen.value != NONE) body(chosen, std::false_type());
    };
    if (!gate) return with(std::integral_constant<int, NONE>());
    if (activation == SILU) return with(std::integral_constant<int, SILU>());
    if (activation == SIGMOID) return with(std::integral_constant<int, SIGMOID>());
    if (activation == GELU) return with(std::integral_constant<int, GELU>());
    with(std::integral_constant<int, PLAIN>());
}

template <class T>
Inputs<T> make(int64_t rows, int64_t heads, int64_t channels, int64_t x_stride, int64_t gate_stride,
               int64_t skip_stride, const void* x, const void* gate, const void* skip, const void* weight) {
    auto data = [](const void* z) { return static_cast<const T*>(z); };
    return {data(x), data(gate), data(skip), x_stride, gate_stride, skip_stride, static_cast<const Wide<T>*>(weight),
            rows,    heads,      channels};
}

}  // namespace

SEQZOO_EXPORT void gated_output_forward(int64_t threads, int64_t dtype, int64_t rows, int64_t heads, int64_t channels,
                                        int64_t activation, int64_t x_stride, int64_t gate_stride, int64_t skip_stride,
                                        const void* x, const void* gate, const void* skip, const void* weight,
                                        void* y) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto in = make<T>(rows, heads, channels, x_stride, gate_stride, skip_stride, x, gate, skip, weight);
        with_parts(activation, gate, skip, [&](auto chosen, auto skips) {
            forward<chosen.value, skips.value>(in, static_cast<T*>(y), threads);
        });
    });
}

SEQZOO_EXPORT void gated_output_backward(int64_t threads, int64_t dtype, int64_t rows, int64_t heads, int64_t channels,
                                         int64_t activation, int64_t x_stride, int64_t gate_stride,
                                         int64_t skip_stride, const void* x, const void* gate, const void* skip,
                                         const void* weight, const void* y_grad, void* x_grad, void* gate_grad,
                                         void* skip_grad, void* weight_grad) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto in = make<T>(rows, heads, channels, x_stride, gate_stride, skip_stride, x, gate, skip, weight);
        Gradients<T> grad{static_cast<const T*>(y_grad), static_cast<T*>(x_grad), static_cast<T*>(gate_grad),
                          static_cast<T*>(skip_grad), static_cast<Wide<T>*>(weight_grad)};
        with_parts(activation, gate, skip,
                   [&](auto chosen, auto skips) { backward<chosen.value, skips.value>(in, grad, threads); });
    });
}
