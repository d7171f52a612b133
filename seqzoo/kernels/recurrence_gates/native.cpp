// Gates of a recurrence: each token is read once and leaves as decays and what enters, or as gradients.
//
// With r, i the open parts of both gates, a = e^{-rate r}, m = sqrt(1 - a^2) (1 where a document begins), e = m i u:
//     gradient of u = de m i,    gradient of log a = da a - de i u a^2 / m (its second part 0 where m is 1),
//     of r that times -rate, of rate that times -r, of i de m u; and of a gate's input that times r (1 - r).
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens of one task of the forward; tasks of the backward, each of which sums gradients of what is learned by itself.
constexpr int64_t TOKENS = 16, TASKS = 64;
// recurrence_bias, input_bias, rate.
constexpr int LEARNED = 3;

template <class T>
struct Gates {
    const T *u, *gates;  // [token][block][channel] and [block][token][of r, of i][channel]
    const Wide<T>*recurrence_bias, *input_bias, *rate;
    const bool* begins;  // null where no document does
    int64_t tokens, blocks, size;
    Wide<T> tiny;
};

// r, i, a and m of one vector of channels.
template <class V>
struct Open {
    V r, i, a, m;
};

// Where a vector stands: among channels, in what is [token][channel], and in `gates`, where i's is `size` further on.
struct Place {
    int64_t c, n, gate;
};

// Call body(begin, place, load, store) for all vectors of the tokens from `first` to `end`.
template <class T, class Body>
SEQZOO_INLINE void for_each_place(const Gates<T>& in, int64_t first, int64_t end, Body body) {
    for (int64_t token = first; token < end; token++) {
        const bool begin = in.begins && in.begins[token];
        for (int64_t block = 0; block < in.blocks; block++) {
            const int64_t c = block * in.size, n = token * in.blocks * in.size + c;
            const int64_t gate = (block * in.tokens + token) * 2 * in.size;
            for_each_vector<T>(in.size, [&](int64_t j, auto load, auto store) __attribute__((always_inline)) {
                body(begin, Place{c + j, n + j, gate + j}, load, store);
            });
        }
    }
}

template <class T, class Load>
SEQZOO_INLINE Open<Vec<Wide<T>>> open(const Gates<T>& in, bool begin, const Place& at, Load load) {
    using V = Vec<Wide<T>>;
    const int64_t c = at.c;
    V r = sigmoid(load(in.gates + at.gate) + load(in.recurrence_bias + c));
    V i = sigmoid(load(in.gates + at.gate + in.size) + load(in.input_bias + c));
    // With d = a - 1, exact where a is close to 1: 1 - a^2 = -d (2 + d).
    auto [a, d] = exponentials_below_zero(-load(in.rate + c) * r);
    V m = begin ? broadcast<V>(1) : sqrt(in.tiny - d * (d + 2));
    return {r, i, a, m};
}

template <class T>
void forward(const Gates<T>& in, Wide<T>* decay, T* entering, int64_t threads) {
    parallel_for(int(threads), (in.tokens + TOKENS - 1) / TOKENS, [&](int64_t task) {
        auto body = [&](bool begin, Place at, auto load, auto store) __attribute__((always_inline)) {
            auto gates = open(in, begin, at, load);
            store(decay + at.n, gates.a);
            store(entering + at.n, load(in.u + at.n) * gates.i * gates.m);
        };
        for_each_place(in, task * TOKENS, std::min(in.tokens, (task + 1) * TOKENS), body);
    });
}

template <class T>
struct Gradients {
    T *u, *gates;
    Wide<T>* learned[LEARNED];
};

template <class T>
void backward(const Gates<T>& in, const Wide<T>* ddecay, const T* dentering, const Gradients<T>& grad,
              int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t width = in.blocks * in.size, tasks = std::min(TASKS, (in.tokens + TOKENS - 1) / TOKENS);
    W* all_sums = workspace<0, W>(tasks * LEARNED * width);
    parallel_for(int(threads), tasks, [&](int64_t task) {
        W* sums = all_sums + task * LEARNED * width;
        std::fill_n(sums, LEARNED * width, W(0));
        const V one = broadcast<V>(1);
        auto body = [&](bool begin, Place at, auto load, auto store) __attribute__((always_inline)) {
            auto [r, i, a, m] = open(in, begin, at, load);
            V u = load(in.u + at.n), de = load(dentering + at.n), rate = load(in.rate + at.c);
            V dlog_decay = load(ddecay + at.n) * a;
            if (!begin) dlog_decay -= de * i * u * a * a / m;
            V drecurrence = -dlog_decay * rate * r * (one - r), dinput = de * m * u * i * (one - i);
            store(grad.u + at.n, de * m * i);
            store(grad.gates + at.gate, drecurrence);
            store(grad.gates + at.gate + in.size, dinput);
            auto add = [&](int which, V x) __attribute__((always_inline)) {
                W* to = sums + which * width + at.c;
                store(to, load(to) + x);
            };
            add(0, drecurrence);
            add(1, dinput);
            add(2, -dlog_decay * r);
        };
        for_each_place(in, task * in.tokens / tasks, (task + 1) * in.tokens / tasks, body);
    });
    for (int which = 0; which < LEARNED; which++) {
        sum_rows(tasks, LEARNED * width, width, all_sums + which * width, grad.learned[which]);
    }
}

template <class T>
Gates<T> make(int64_t tokens, int64_t blocks, int64_t size, double tiny, const void* u, const void* gates,
              const void* recurrence_bias, const void* input_bias, const void* rate, const void* begins) {
    auto data = [](const void* z) { return static_cast<const T*>(z); };
    auto wide = [](const void* z) { return static_cast<const Wide<T>*>(z); };
    return {data(u), data(gates), wide(recurrence_bias), wide(input_bias), wide(rate),
            static_cast<const bool*>(begins), tokens, blocks, size, Wide<T>(tiny)};
}

}  // namespace

SEQZOO_EXPORT void recurrence_gates_forward(int64_t threads, int64_t dtype, int64_t tokens, int64_t blocks,
                                            int64_t size, double tiny, const void* u, const void* gates,
                                            const void* recurrence_bias, const void* input_bias, const void* rate,
                                            const void* begins, void* decay, void* entering) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto in = make<T>(tokens, blocks, size, tiny, u, gates, recurrence_bias, input_bias, rate, begins);
        forward(in, static_cast<Wide<T>*>(decay), static_cast<T*>(entering), threads);
    });
}

SEQZOO_EXPORT void recurrence_gates_backward(int64_t threads, int64_t dtype, int64_t tokens, int64_t blocks,
                                             int64_t size, double tiny, const void* ddecay, const void* dentering,
                                             const void* u, const void* gates, const void* recurrence_bias,
                                             const void* input_bias, const void* rate, const void* begins, void* du,
                                             void* dgates, void* drecurrence_bias, void* dinput_bias, void* drate) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto in = make<T>(tokens, blocks, size, tiny, u, gates, recurrence_bias, input_bias, rate, begins);
        auto wide = [](void* z) { return static_cast<W*>(z); };
        Gradients<T> grad{
            static_cast<T*>(du), static_cast<T*>(dgates), {wide(drecurrence_bias), wide(dinput_bias), wide(drate)}};
        backward(in, static_cast<const W*>(ddecay), static_cast<const T*>(dentering), grad, threads);
    });
}
