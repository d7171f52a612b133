// Glances at the token before: a token and its neighbour are read once, and leave as all glances or gradients.
//
// With m the whole mix of glance z at token t, and g the gradient of that glance,
//     gradient of x_t = sum_z g (1 - m) + sum_z g m of the next token of the document,
//     gradient of mix_z = sum_t g (x_{t-1} - x_t), whose terms are the gradients of more_z.
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens of one task of the forward; tasks of the backward, each of which sums gradients of the mixes by itself.
constexpr int64_t TOKENS = 16, TASKS = 64;

template <class T, class O>
struct Shift {
    const T *x, *last;
    const Wide<T>* mix;  // [glance][dim]
    const O* more;       // [glance][batch][time][dim], or null
    const bool* starts;
    int64_t glances, batch, time, dim;

    // The token before the one of that row of x; null is zero.
    const T* before(int64_t row) const {
        if (starts && starts[row]) return nullptr;
        if (row % time) return x + (row - 1) * dim;
        return last ? last + row / time * dim : nullptr;
    }

    template <class Load>
    SEQZOO_INLINE Vec<Wide<T>> whole_mix(int64_t glance, int64_t row, int64_t i, Load load) const {
        Vec<Wide<T>> m = load(mix + glance * dim + i);
        return more ? m + load(more + (glance * batch * time + row) * dim + i) : m;
    }
};

template <class T, class O>
void forward(const Shift<T, O>& shift, O* const* to, int64_t threads) {
    using V = Vec<Wide<T>>;
    const int64_t rows = shift.batch * shift.time, dim = shift.dim;
    parallel_for(int(threads), (rows + TOKENS - 1) / TOKENS, [&](int64_t task) {
        for (int64_t row = task * TOKENS; row < std::min(rows, (task + 1) * TOKENS); row++) {
            const T *x = shift.x + row * dim, *before = shift.before(row);
            for (int64_t z = 0; z < shift.glances; z++) {
                for_each_vector<T>(dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    V now = load(x + i), back = before ? load(before + i) - now : -now;
                    store(to[z] + row * dim + i, fma(back, shift.whole_mix(z, row, i, load), now));
                });
            }
        }
    });
}

template <class T, class O>
struct Gradients {
    const O* const* glances;
    T *x, *last;
    Wide<T>* mix;
    O* more;  // null where that is, as last is
};

template <class T, class O>
void backward(const Shift<T, O>& shift, const Gradients<T, O>& grad, int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t time = shift.time, dim = shift.dim, learned = shift.glances * dim;
    const int64_t pieces = std::min<int64_t>((time + TOKENS - 1) / TOKENS, std::max<int64_t>(1, TASKS / shift.batch));
    const int64_t tasks = shift.batch * pieces;
    W* all_sums = workspace<0, W>(tasks * learned);
    parallel_for(int(threads), tasks, [&](int64_t task) {
        W* sums = all_sums + task * learned;
        W* passed = workspace<1, W>(dim);  // what the token after sends back
        W *back = workspace<2, W>(dim), *kept = workspace<3, W>(dim), *returned = workspace<4, W>(dim);
        std::fill_n(sums, learned, W(0));
        std::fill_n(passed, dim, W(0));
        const int64_t b = task / pieces, piece = task % pieces;
        const int64_t begin = b * time + piece * time / pieces, end = b * time + (piece + 1) * time / pieces;
        if (end < (b + 1) * time && shift.before(end)) {
            for (int64_t z = 0; z < shift.glances; z++) {
                for_each_vector<T>(dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    V g = load(grad.glances[z] + end * dim + i);
                    store(passed + i, fma(g, shift.whole_mix(z, end, i, load), load(passed + i)));
                });
            }
        }
        for (int64_t row = end - 1; row >= begin; row--) {
            const T *x = shift.x + row * dim, *before = shift.before(row);
            for_each_vector<T>(dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                V now = load(x + i);
                store(back + i, before ? load(before + i) - now : -now);
                store(kept + i, load(passed + i));
                store(returned + i, V{});
            });
            // Glance by glance: all rows of one token at once lie in the same few lines of the cache.
            for (int64_t z = 0; z < shift.glances; z++) {
                for_each_vector<T>(dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    V g = load(grad.glances[z] + row * dim + i), along = g * load(back + i);
                    V sent = g * shift.whole_mix(z, row, i, load);
                    store(kept + i, load(kept + i) + g - sent);
                    store(returned + i, load(returned + i) + sent);
                    store(sums + z * dim + i, load(sums + z * dim + i) + along);
                    if (grad.more) store(grad.more + (z * shift.batch * time + row) * dim + i, along);
                });
            }
            for_each_vector<T>(dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                store(grad.x + row * dim + i, load(kept + i));
                store(passed + i, before ? load(returned + i) : V{});
            });
        }
        if (piece == 0 && grad.last) {
            for_each_vector<T>(dim, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                store(grad.last + b * dim + i, load(passed + i));
            });
        }
    });
    sum_rows(tasks, learned, learned, all_sums, grad.mix);
}

// Call body with the types of x and of the glances, which are as wide, or in bfloat16 beside float.
template <class Body>
void with_dtypes(int64_t dtype, int64_t glance_dtype, Body body) {
    if (dtype == 0) return body(double(), double());
    if (dtype == 2) return body(bfloat16(), bfloat16());
    if (glance_dtype == 2) return body(float(), bfloat16());
    body(float(), float());
}

template <class T, class O>
Shift<T, O> make(const void* x, const void* mix, const void* last, const void* starts, const void* more,
                 int64_t glances, int64_t batch, int64_t time, int64_t dim) {
    return {static_cast<const T*>(x),
            static_cast<const T*>(last),
            static_cast<const Wide<T>*>(mix),
            static_cast<const O*>(more),
            static_cast<const bool*>(starts),
            glances,
            batch,
            time,
            dim};
}

}  // namespace

SEQZOO_EXPORT void token_shift_forward(int64_t threads, int64_t dtype, int64_t glance_dtype, const void* x,
                                       const void* mix, const void* last, const void* starts, const void* more,
                                       void* const* to, int64_t glances, int64_t batch, int64_t time, int64_t dim) {
    with_dtypes(dtype, glance_dtype, [&](auto kind, auto glance_kind) {
        using T = decltype(kind);
        using O = decltype(glance_kind);
        auto shift = make<T, O>(x, mix, last, starts, more, glances, batch, time, dim);
        forward(shift, reinterpret_cast<O* const*>(to), threads);
    });
}

// The gradients of last and more may be null where these are.
SEQZOO_EXPORT void token_shift_backward(int64_t threads, int64_t dtype, int64_t glance_dtype,
                                        const void* const* grads, const void* x, const void* mix, const void* last,
                                        const void* starts, const void* more, void* x_grad, void* mix_grad,
                                        void* last_grad, void* more_grad, int64_t glances, int64_t batch,
                                        int64_t time, int64_t dim) {
    with_dtypes(dtype, glance_dtype, [&](auto kind, auto glance_kind) {
        using T = decltype(kind);
        using O = decltype(glance_kind);
        auto shift = make<T, O>(x, mix, last, starts, more, glances, batch, time, dim);
        Gradients<T, O> grad{reinterpret_cast<const O* const*>(grads), static_cast<T*>(x_grad),
                             static_cast<T*>(last_grad), static_cast<Wide<T>*>(mix_grad), static_cast<O*>(more_grad)};
        backward(shift, grad, threads);
    });
}
