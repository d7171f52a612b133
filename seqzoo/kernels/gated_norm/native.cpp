// Norms of groups of channels, gated: each group is read once into the cache and leaves it as outputs or gradients.
//
// With u the input (times act(gate) where that comes first), c its mean or 0, r = 1 / sqrt(mean((u - c)^2) + eps),
// n = (u - c) r, z = scale w n + b, and dn = scale w dz,
//     gradient of u = r (dn - mean(dn) [of a centered norm] - n mean(n dn)),
//     gradient of w = sum scale n dz,    gradient of b = sum dz.
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens of one task of the forward; tasks of the backward, each of which sums gradients of w and b by itself.
constexpr int64_t TOKENS = 16, TASKS = 64;

enum Activation { NONE, SILU, SIGMOID };

template <class T>
struct Norm {
    const T *x, *gate;  // [token][group][size], tokens x_stride and gate_stride numbers apart
    const Wide<T>*weight, *bias;
    int64_t tokens, groups, size, x_stride, gate_stride, weight_groups;  // all groups may share one's weight
    Wide<T> eps, scale;
    bool centered;
};

template <int ACTIVATION, class V>
SEQZOO_INLINE V activate(V x) {
    if constexpr (ACTIVATION == SILU) return silu(x);
    if constexpr (ACTIVATION == SIGMOID) return sigmoid(x);
    return x;
}

template <int ACTIVATION, class V>
SEQZOO_INLINE V differentiate(V x) {
    V one = broadcast<V>(1), s = sigmoid(x);
    if constexpr (ACTIVATION == SILU) return s * fma(x, one - s, one);
    if constexpr (ACTIVATION == SIGMOID) return s * (one - s);
    return one;
}

// Fill u with u - c of one group; return r.
template <int ACTIVATION, bool GATE_FIRST, class T>
SEQZOO_INLINE Wide<T> normalize(const Norm<T>& norm, const T* x, const T* gate, Wide<T>* u) {
    using V = Vec<Wide<T>>;
    V total{}, squares{};
    for_each_vector<T>(norm.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        V value = load(x + i);
        if constexpr (GATE_FIRST) value *= activate<ACTIVATION>(load(gate + i));
        store(u + i, value);
        total += value;
        squares = fma(value, value, squares);
    });
    if (norm.centered) {
        V mean = broadcast<V>(sum(total) / norm.size);
        squares = V{};
        for_each_vector<T>(norm.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            store(u + i, load(u + i) - mean);
            V value = load(u + i);  // zeros past the last channel
            squares = fma(value, value, squares);
        });
    }
    return 1 / std::sqrt(sum(squares) / norm.size + norm.eps);
}

template <int ACTIVATION, bool GATE_FIRST, class T>
void forward(const Norm<T>& norm, T* y, int64_t threads) {
    using V = Vec<Wide<T>>;
    const int64_t width = norm.groups * norm.size;
    parallel_for(int(threads), (norm.tokens + TOKENS - 1) / TOKENS, [&](int64_t task) {
        Wide<T>* u = workspace<0, Wide<T>>(norm.size + LANES<T>);
        const int64_t end = std::min(norm.tokens, (task + 1) * TOKENS) * norm.groups;
        for (int64_t row = task * TOKENS * norm.groups; row < end; row++) {
            const int64_t token = row / norm.groups, group = row % norm.groups;
            const int64_t place = group % norm.weight_groups * norm.size;
            const T* gate = norm.gate + token * norm.gate_stride + group * norm.size;
            const T* x = norm.x + token * norm.x_stride + group * norm.size;
            T* to = y + token * width + group * norm.size;
            V factor = broadcast<V>(normalize<ACTIVATION, GATE_FIRST>(norm, x, gate, u) * norm.scale);
            for_each_vector<T>(norm.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                V z = load(u + i) * factor;
                if (norm.weight) z *= load(norm.weight + place + i);
                if (norm.bias) z += load(norm.bias + place + i);
                if constexpr (ACTIVATION != NONE && !GATE_FIRST) z *= activate<ACTIVATION>(load(gate + i));
                store(to + i, z);
            });
        }
    });
}

template <class T>
struct Gradients {
    const T* y;
    T *x, *gate;
    Wide<T>*weight, *bias;  // null where these are
};

template <int ACTIVATION, bool GATE_FIRST, class T>
void backward(const Norm<T>& norm, const Gradients<T>& grad, int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t width = norm.groups * norm.size, learned = norm.weight_groups * norm.size;
    const int64_t tasks = std::min(TASKS, (norm.tokens + TOKENS - 1) / TOKENS);
    W* all_sums = workspace<2, W>(tasks * 2 * learned);
    parallel_for(int(threads), tasks, [&](int64_t task) {
        W* u = workspace<0, W>(norm.size + LANES<T>);
        W* dn = workspace<1, W>(norm.size + LANES<T>);
        W *weight_sums = all_sums + task * 2 * learned, *bias_sums = weight_sums + learned;
        std::fill_n(weight_sums, 2 * learned, W(0));
        const int64_t end = (task + 1) * norm.tokens / tasks * norm.groups;
        for (int64_t row = task * norm.tokens / tasks * norm.groups; row < end; row++) {
            const int64_t token = row / norm.groups, group = row % norm.groups;
            const int64_t place = group % norm.weight_groups * norm.size, at = token * width + group * norm.size;
            const T* gate = norm.gate + token * norm.gate_stride + group * norm.size;
            const T* x = norm.x + token * norm.x_stride + group * norm.size;
            const W root = normalize<ACTIVATION, GATE_FIRST>(norm, x, gate, u);
            V r = broadcast<V>(root), scale = broadcast<V>(norm.scale), total{}, along{};
            for_each_vector<T>(norm.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                V n = load(u + i) * r, dz = load(grad.y + at + i);
                V weight = norm.weight ? scale * load(norm.weight + place + i) : scale;
                if constexpr (ACTIVATION != NONE && !GATE_FIRST) {
                    V z = n * weight, g = load(gate + i);
                    if (norm.bias) z += load(norm.bias + place + i);
                    store(grad.gate + at + i, dz * z * differentiate<ACTIVATION>(g));
                    dz *= activate<ACTIVATION>(g);
                }
                if (norm.weight) store(weight_sums + place + i, fma(dz * scale, n, load(weight_sums + place + i)));
                if (norm.bias) store(bias_sums + place + i, load(bias_sums + place + i) + dz);
                dz *= weight;
                store(dn + i, dz);
                total += dz;
                along = fma(dz, n, along);
            });
            V mean = broadcast<V>(norm.centered ? sum(total) / norm.size : W(0));
            V slope = broadcast<V>(sum(along) / norm.size * root);
            for_each_vector<T>(norm.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                V du = r * (load(dn + i) - mean - load(u + i) * slope);
                if constexpr (GATE_FIRST) {
                    V g = load(gate + i);
                    store(grad.gate + at + i, du * load(x + i) * differentiate<ACTIVATION>(g));
                    du *= activate<ACTIVATION>(g);
                }
                store(grad.x + at + i, du);
            });
        }
    });
    if (grad.weight) sum_rows(tasks, 2 * learned, learned, all_sums, grad.weight);
    if (grad.bias) sum_rows(tasks, 2 * learned, learned, all_sums + learned, grad.bias);
}

// Call body with the activation and whether the gate comes first, as compile-time constants.
template <class Body>
void with_gate(int64_t activation, bool gate_first, Body body) {
    using First = std::true_type;
    using Last = std::false_type;
    if (activation == SILU && gate_first) return body(std::integral_constant<int, SILU>(), First());
    if (activation == SILU) return body(std::integral_constant<int, SILU>(), Last());
    if (activation == SIGMOID && gate_first) return body(std::integral_constant<int, SIGMOID>(), First());
    if (activation == SIGMOID) return body(std::integral_constant<int, SIGMOID>(), Last());
    body(std::integral_constant<int, NONE>(), Last());
}

template <class T>
Norm<T> make(const void* x, const void* gate, const void* weight, const void* bias, int64_t tokens, int64_t groups,
             int64_t size, int64_t x_stride, int64_t gate_stride, int64_t weight_groups, double eps, double scale,
             int64_t centered) {
    return {static_cast<const T*>(x),
            static_cast<const T*>(gate),
            static_cast<const Wide<T>*>(weight),
            static_cast<const Wide<T>*>(bias),
            tokens,
            groups,
            size,
            x_stride,
            gate_stride,
            weight_groups,
            Wide<T>(eps),
            Wide<T>(scale),
            centered != 0};
}

}  // namespace

SEQZOO_EXPORT void gated_norm_forward(int64_t threads, int64_t dtype, const void* x, const void* gate,
                                      const void* weight, const void* bias, void* y, int64_t tokens, int64_t groups,
                                      int64_t size, int64_t x_stride, int64_t gate_stride, int64_t weight_groups,
                                      double eps, double scale, int64_t centered, int64_t activation,
                                      int64_t gate_first) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto norm = make<T>(x, gate, weight, bias, tokens, groups, size, x_stride, gate_stride, weight_groups, eps,
                            scale, centered);
        with_gate(activation, gate_first, [&](auto chosen, auto first) {
            forward<chosen.value, first.value>(norm, static_cast<T*>(y), threads);
        });
    });
}

// The gradients of gate, weight and bias may be null where these are.
SEQZOO_EXPORT void gated_norm_backward(int64_t threads, int64_t dtype, const void* y_grad, const void* x,
                                       const void* gate, const void* weight, const void* bias, void* x_grad,
                                       void* gate_grad, void* weight_grad, void* bias_grad, int64_t tokens,
                                       int64_t groups, int64_t size, int64_t x_stride, int64_t gate_stride,
                                       int64_t weight_groups, double eps, double scale, int64_t centered,
                                       int64_t activation, int64_t gate_first) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto norm = make<T>(x, gate, weight, bias, tokens, groups, size, x_stride, gate_stride, weight_groups, eps,
                            scale, centered);
        Gradients<T> grad{static_cast<const T*>(y_grad), static_cast<T*>(x_grad), static_cast<T*>(gate_grad),
                          static_cast<Wide<T>*>(weight_grad), static_cast<Wide<T>*>(bias_grad)};
        with_gate(activation, gate_first, [&](auto chosen, auto first) {
            backward<chosen.value, first.value>(norm, grad, threads);
        });
    });
}
