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
    const T *u, *recurrence, *input;  // [token][channel]
    const Wide<T>*recurrence_bias, *input_bias, *rate;
    const bool* begins;  // null where no document does
    int64_t tokens, channels;
    Wide<T> tiny;

    SEQZOO_INLINE bool begin(int64_t token) const { return begins && begins[token]; }
};

// r, i, a and m of one vector of channels.
template <class V>
struct Open {
    V r, i, a, m;
};

template <class T, class Load>
SEQZOO_INLINE Open<Vec<Wide<T>>> open(const Gates<T>& in, bool begin, int64_t n, int64_t c, Load load) {
    using V = Vec<Wide<T>>;
    V r = sigmoid(load(in.recurrence + n) + load(in.recurrence_bias + c));
    V i = sigmoid(load(in.input + n) + load(in.input_bias + c));
    V log_decay = -load(in.rate + c) * r;
    V m = begin ? broadcast<V>(1) : sqrt(in.tiny - expm1(2 * log_decay));
    return {r, i, exp(log_decay), m};
}

template <class T>
void forward(const Gates<T>& in, Wide<T>* decay, T* entering, int64_t threads) {
    parallel_for(int(threads), (in.tokens + TOKENS - 1) / TOKENS, [&](int64_t task) {
        for (int64_t token = task * TOKENS; token < std::min(in.tokens, (task + 1) * TOKENS); token++) {
            const bool begin = in.begin(token);
            for_each_vector<T>(in.channels, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
                const int64_t n = token * in.channels + c;
                auto gates = open(in, begin, n, c, load);
                store(decay + n, gates.a);
                store(entering + n, load(in.u + n) * gates.i * gates.m);
            });
        }
    });
}

template <class T>
struct Gradients {
    T *u, *recurrence, *input;
    Wide<T>* learned[LEARNED];
};

template <class T>
void backward(const Gates<T>& in, const Wide<T>* ddecay, const T* dentering, const Gradients<T>& grad,
              int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t width = in.channels, tasks = std::min(TASKS, (in.tokens + TOKENS - 1) / TOKENS);
    W* all_sums = workspace<0, W>(tasks * LEARNED * width);
    parallel_for(int(threads), tasks, [&](int64_t task) {
        W* sums = all_sums + task * LEARNED * width;
        std::fill_n(sums, LEARNED * width, W(0));
        const V one = broadcast<V>(1);
        for (int64_t token = task * in.tokens / tasks; token < (task + 1) * in.tokens / tasks; token++) {
            const bool begin = in.begin(token);
            for_each_vector<T>(width, [&](int64_t c, auto load, auto store) __attribute__((always_inline)) {
                const int64_t n = token * width + c;
                auto [r, i, a, m] = open(in, begin, n, c, load);
                V u = load(in.u + n), de = load(dentering + n), rate = load(in.rate + c);
                V dlog_decay = load(ddecay + n) * a;
                if (!begin) dlog_decay -= de * i * u * a * a / m;
                V drecurrence = -dlog_decay * rate * r * (one - r), dinput = de * m * u * i * (one - i);
                store(grad.u + n, de * m * i);
                store(grad.recurrence + n, drecurrence);
                store(grad.input + n, dinput);
                auto add = [&](int which, V x) __attribute__((always_inline)) {
                    W* to = sums + which * width + c;
                    store(to, load(to) + x);
                };
                add(0, drecurrence);
                add(1, dinput);
                add(2, -dlog_decay * r);
            });
        }
    });
    for (int which = 0; which < LEARNED; which++) {
        sum_rows(tasks, LEARNED * width, width, all_sums + which * width, grad.learned[which]);
    }
}

template <class T>
Gates<T> make(int64_t tokens, int64_t channels, double tiny, const void* u, const void* recurrence, const void* input,
              const void* recurrence_bias, const void* input_bias, const void* rate, const void* begins) {
    auto data = [](const void* z) { return static_cast<const T*>(z); };
    auto wide = [](const void* z) { return static_cast<const Wide<T>*>(z); };
    return {data(u),    data(recurrence), data(input), wide(recurrence_bias), wide(input_bias),
            wide(rate), static_cast<const bool*>(begins), tokens, channels,   Wide<T>(tiny)};
}

}  // namespace

SEQZOO_EXPORT void recurrence_gates_forward(int64_t threads, int64_t dtype, int64_t tokens, int64_t channels,
                                            double tiny, const void* u, const void* recurrence, const void* input,
                                            const void* recurrence_bias, const void* input_bias, const void* rate,
                                            const void* begins, void* decay, void* entering) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto in = make<T>(tokens, channels, tiny, u, recurrence, input, recurrence_bias, input_bias, rate, begins);
        forward(in, static_cast<Wide<T>*>(decay), static_cast<T*>(entering), threads);
    });
}

SEQZOO_EXPORT void recurrence_gates_backward(int64_t threads, int64_t dtype, int64_t tokens, int64_t channels,
                                             double tiny, const void* ddecay, const void* dentering, const void* u,
                                             const void* recurrence, const void* input, const void* recurrence_bias,
                                             const void* input_bias, const void* rate, const void* begins, void* du,
                                             void* drecurrence, void* dinput, void* drecurrence_bias,
                                             void* dinput_bias, void* drate) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto in = make<T>(tokens, channels, tiny, u, recurrence, input, recurrence_bias, input_bias, rate, begins);
        auto wide = [](void* z) { return static_cast<W*>(z); };
        Gradients<T> grad{static_cast<T*>(du),
                          static_cast<T*>(drecurrence),
                          static_cast<T*>(dinput),
                          {wide(drecurrence_bias), wide(dinput_bias), wide(drate)}};
        backward(in, static_cast<const W*>(ddecay), static_cast<const T*>(dentering), grad, threads);
    });
}
