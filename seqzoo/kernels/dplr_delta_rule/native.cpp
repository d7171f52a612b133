// The general delta rule, token by token, forward and backward, for the CPU:
//
//     z_t = S_{t-1}^T a_t,   S_t = e^{g_t} S_{t-1} + b_t z_t^T + k_t v_t^T,   o_t = S_t^T q_t
//
// One task is one head of one sequence, whose memory stays in the caches; a few vectors of its columns are walked
// through at a time. Nothing is a product of decays, so nothing overflows or cancels however strong they are.
//
// The forward keeps every z_t, and the state that enters each segment. The backward goes through segments from the last
// to the first: it walks a segment once more to find the states that enter its blocks, and each block to find all of
// its states, and so needs memory for one segment's blocks and one block's tokens, however long the sequence.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "heads.h"

namespace seqzoo {
namespace {

// Tokens between the states that the forward keeps, and between those that the backward finds in a segment.
constexpr int64_t SEGMENT = 256, BLOCK = 16;
// How many vectors of columns are walked through at a time: their sums stay in registers.
constexpr int COLUMNS = VECTOR_REGISTERS == 32 ? 4 : 2;

struct Sizes {
    int64_t batch, time, heads, key, value;
};

template <class T>
struct Inputs : Sizes {
    using W = Wide<T>;
    const T *q, *k, *v, *a, *b;
    const W *log_decay, *state;
    const uint8_t* starts;

    Inputs(Sizes sizes, const void* q, const void* k, const void* v, const void* a, const void* b,
           const void* log_decay, const void* state, const void* starts)
        : Sizes(sizes),
          q(static_cast<const T*>(q)),
          k(static_cast<const T*>(k)),
          v(static_cast<const T*>(v)),
          a(static_cast<const T*>(a)),
          b(static_cast<const T*>(b)),
          log_decay(static_cast<const W*>(log_decay)),
          state(static_cast<const W*>(state)),
          starts(static_cast<const uint8_t*>(starts)) {}
};

template <class T>
struct Head : HeadPlace {
    using W = Wide<T>;
    const Inputs<T>& x;

    Head(const Inputs<T>& x, int64_t index) : HeadPlace(x.time, x.heads, index), x(x) {}
    bool begins(int64_t t) const { return x.starts && x.starts[token(t)]; }
    // Columns in a row of a state, values in whole vectors.
    int64_t width() const { return padded<W>(x.value); }
    int64_t numbers() const { return x.key * width(); }
    int64_t kept_states() const { return (x.time - 1) / SEGMENT; }
    W* kept(W* states, int64_t segment) const {
        return states + (index() * kept_states() + segment - 1) * x.key * x.value;
    }
};

// Between a state as tensors hold it and one whose rows are whole vectors.
template <class W>
void load_state(const W* from, int64_t key, int64_t value, int64_t width, W* to) {
    if (!from) return void(std::fill_n(to, key * width, W(0)));
    for (int64_t i = 0; i < key; i++) copy_padded(value, from + i * value, width, to + i * width);
}

template <class W>
void save_state(const W* from, int64_t key, int64_t value, int64_t width, W* to) {
    for (int64_t i = 0; i < key; i++) std::copy_n(from + i * width, value, to + i * value);
}

// The operands of one token, widened.
template <class T>
struct Token {
    using W = Wide<T>;
    W *decay, *q, *k, *a, *b, *v;

    static int64_t size(const Head<T>& head) { return 5 * (head.x.key + LANES<W>) + head.width(); }

    Token(const Head<T>& head, W* memory) {
        for (W** each : {&decay, &q, &k, &a, &b}) {
            *each = memory;
            memory += head.x.key + LANES<W>;
        }
        v = memory;
    }

    void load(const Head<T>& head, int64_t t) {
        int64_t key = head.x.key, at = head.at(t) * key;
        copy_padded(key, head.x.log_decay + at, key + LANES<W>, decay);
        for (int64_t i = 0; i < key; i += LANES<W>) store(decay + i, exp(seqzoo::load(decay + i)));
        copy_row(key, head.x.q + at, q);
        copy_row(key, head.x.k + at, k);
        copy_row(key, head.x.a + at, a);
        copy_row(key, head.x.b + at, b);
        copy_padded(head.x.value, head.x.v + head.at(t) * head.x.value, head.width(), v);
    }
};

// Call body(column, count) for groups of at most COLUMNS vectors, `count` a compile-time number.
template <class W, class Body>
void for_columns(int64_t width, Body body) {
    int64_t column = 0;
    for (; column + COLUMNS * LANES<W> <= width; column += COLUMNS * LANES<W>) {
        body(column, std::integral_constant<int, COLUMNS>());
    }
    for (; column < width; column += LANES<W>) body(column, std::integral_constant<int, 1>());
}

// z = S^T a
template <class W>
void read_state(const W* state, int64_t key, int64_t width, const W* a, W* z) {
    for_columns<W>(width, [&](int64_t column, auto count) {
        constexpr int N = count.value;
        Vec<W> total[N] = {};
        for (int64_t i = 0; i < key; i++) {
            Vec<W> factor = broadcast<Vec<W>>(a[i]);
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) total[n] = fma(factor, load(state + i * width + column + n * LANES<W>), total[n]);
        }
        SEQZOO_UNROLL
        for (int n = 0; n < N; n++) store(z + column + n * LANES<W>, total[n]);
    });
}

// to = S_t of `from` = S_{t-1}, null for zeros; with `o`, also o_t.
template <bool READS, class T, class W = Wide<T>>
void step(const Token<T>& token, int64_t key, int64_t width, const W* from, const W* z, W* to, W* o) {
    for_columns<W>(width, [&](int64_t column, auto count) {
        constexpr int N = count.value;
        Vec<W> read[N], value[N], total[N] = {};
        SEQZOO_UNROLL
        for (int n = 0; n < N; n++) {
            read[n] = load(z + column + n * LANES<W>);
            value[n] = load(token.v + column + n * LANES<W>);
        }
        for (int64_t i = 0; i < key; i++) {
            Vec<W> decay = broadcast<Vec<W>>(token.decay[i]), k = broadcast<Vec<W>>(token.k[i]);
            Vec<W> b = broadcast<Vec<W>>(token.b[i]), q = broadcast<Vec<W>>(token.q[i]);
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) {
                int64_t place = i * width + column + n * LANES<W>;
                Vec<W> row = k * value[n];
                if (from) row = fma(decay, load(from + place), fma(b, read[n], row));
                store(to + place, row);
                if constexpr (READS) total[n] = fma(q, row, total[n]);
            }
        }
        if constexpr (READS) {
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) store(o + column + n * LANES<W>, total[n]);
        }
    });
}

template <class T>
void forward(const Head<T>& head, T* o, Wide<T>* last, Wide<T>* z, Wide<T>* kept) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    int64_t key = x.key, value = x.value, width = head.width(), numbers = head.numbers();
    W* state = workspace<0, W>(numbers + Token<T>::size(head) + 2 * width);
    W *read = state + numbers, *out = read + width;
    Token<T> token(head, out + width);
    load_state(x.state ? x.state + head.index() * key * value : nullptr, key, value, width, state);
    for (int64_t t = 0; t < x.time; t++) {
        if (t && t % SEGMENT == 0) save_state(state, key, value, width, head.kept(kept, t / SEGMENT));
        token.load(head, t);
        bool fresh = head.begins(t);
        if (fresh) {
            std::fill_n(read, width, W(0));
        } else {
            read_state(state, key, width, token.a, read);
        }
        step<true>(token, key, width, fresh ? nullptr : state, read, state, out);
        copy_row(value, read, z + head.at(t) * value);
        copy_row(value, out, o + head.at(t) * value);
    }
    save_state(state, key, value, width, last + head.index() * key * value);
}

template <class T>
struct Gradients {
    using W = Wide<T>;
    const T* o;
    const W *last, *z;
    W* kept;
    T *q, *k, *v, *a, *b;
    W *log_decay, *state;
};

// Sums over columns that one token gives each row of the state, kept as vectors until all columns are in.
template <class W>
struct RowSums {
    enum Which { q, k, b, decay, a, COUNT };
    Vec<W>* memory;
    int64_t key;

    Vec<W>* operator[](Which which) const { return memory + which * key; }
    void write(Which which, W* to) const {
        for (int64_t i = 0; i < key; i++) to[i] = sum((*this)[which][i]);
    }
};

// From the gradient of S_t, less what o_t gives, to that of S_{t-1}; `before` null for zeros.
template <class T, class W = Wide<T>>
void step_back(const Token<T>& token, int64_t key, int64_t width, const W* before, const W* after, const W* z,
               const W* o_grad, W* state_grad, W* v_grad, const RowSums<W>& sums) {
    bool first = true;
    for_columns<W>(width, [&](int64_t column, auto count) {
        constexpr int N = count.value;
        Vec<W> of_output[N], value[N], read[N], of_value[N] = {}, of_read[N] = {};
        SEQZOO_UNROLL
        for (int n = 0; n < N; n++) {
            of_output[n] = load(o_grad + column + n * LANES<W>);
            value[n] = load(token.v + column + n * LANES<W>);
            read[n] = load(z + column + n * LANES<W>);
        }
        auto add = [&](typename RowSums<W>::Which which, int64_t i, Vec<W> x) __attribute__((always_inline)) {
            sums[which][i] = first ? x : sums[which][i] + x;
        };
        for (int64_t i = 0; i < key; i++) {
            Vec<W> q = broadcast<Vec<W>>(token.q[i]), k = broadcast<Vec<W>>(token.k[i]);
            Vec<W> b = broadcast<Vec<W>>(token.b[i]);
            Vec<W> of_q{}, of_k{}, of_b{}, of_decay{};
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) {
                int64_t place = i * width + column + n * LANES<W>;
                Vec<W> gradient = fma(q, of_output[n], load(state_grad + place));
                store(state_grad + place, gradient);
                of_value[n] = fma(k, gradient, of_value[n]);
                of_read[n] = fma(b, gradient, of_read[n]);
                of_q = fma(load(after + place), of_output[n], of_q);
                of_k = fma(gradient, value[n], of_k);
                of_b = fma(gradient, read[n], of_b);
                if (before) of_decay = fma(load(before + place), gradient, of_decay);
            }
            add(RowSums<W>::q, i, of_q);
            add(RowSums<W>::k, i, of_k);
            add(RowSums<W>::b, i, of_b);
            add(RowSums<W>::decay, i, of_decay * broadcast<Vec<W>>(token.decay[i]));
        }
        SEQZOO_UNROLL
        for (int n = 0; n < N; n++) store(v_grad + column + n * LANES<W>, of_value[n]);
        for (int64_t i = 0; i < key; i++) {
            Vec<W> decay = broadcast<Vec<W>>(token.decay[i]), a = broadcast<Vec<W>>(token.a[i]), of_a{};
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) {
                int64_t place = i * width + column + n * LANES<W>;
                if (before) {
                    of_a = fma(load(before + place), of_read[n], of_a);
                    store(state_grad + place, fma(a, of_read[n], decay * load(state_grad + place)));
                } else {
                    store(state_grad + place, Vec<W>{});
                }
            }
            add(RowSums<W>::a, i, of_a);
        }
        first = false;
    });
}

template <class T>
void backward(const Head<T>& head, const Gradients<T>& d) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    int64_t key = x.key, value = x.value, width = head.width(), numbers = head.numbers();
    int64_t vectors = RowSums<W>::COUNT * key;
    W* memory = workspace<0, W>((SEGMENT / BLOCK + BLOCK + 1) * numbers + vectors * LANES<W> + Token<T>::size(head) +
                                4 * width + key);
    RowSums<W> sums{reinterpret_cast<Vec<W>*>(memory), key};
    W* entering = memory + vectors * LANES<W>;               // a block's first state, one for each of a segment's blocks
    W* states = entering + SEGMENT / BLOCK * numbers;         // S_t of a block's tokens
    W* gradient = states + BLOCK * numbers;
    W *read = gradient + numbers, *o_grad = read + width, *v_grad = o_grad + width, *row = v_grad + width;
    Token<T> token(head, row + std::max(width, key));

    auto walk = [&](int64_t t, const W* from, W* to) {
        token.load(head, t);
        copy_padded(value, d.z + head.at(t) * value, width, read);
        step<false>(token, key, width, head.begins(t) ? nullptr : from, read, to, static_cast<W*>(nullptr));
    };
    load_state(d.last + head.index() * key * value, key, value, width, gradient);
    for (int64_t segment = (x.time - 1) / SEGMENT; segment >= 0; segment--) {
        int64_t begin = segment * SEGMENT, end = std::min(begin + SEGMENT, x.time);
        const W* from = x.state ? x.state + head.index() * key * value : nullptr;
        load_state(segment ? head.kept(d.kept, segment) : from, key, value, width, entering);
        int64_t last_block = (end - 1 - begin) / BLOCK;
        for (int64_t block = 0; block < last_block; block++) {
            W* next = entering + (block + 1) * numbers;
            for (int64_t i = 0; i < BLOCK; i++) walk(begin + block * BLOCK + i, i ? next : next - numbers, next);
        }
        for (int64_t block = last_block; block >= 0; block--) {
            int64_t first = begin + block * BLOCK, count = std::min(BLOCK, end - first);
            const W* before = entering + block * numbers;
            for (int64_t i = 0; i < count; i++) {
                walk(first + i, i ? states + (i - 1) * numbers : before, states + i * numbers);
            }
            for (int64_t i = count - 1; i >= 0; i--) {
                int64_t t = first + i, at = head.at(t);
                token.load(head, t);
                copy_padded(value, d.z + at * value, width, read);
                copy_padded(value, d.o + at * value, width, o_grad);
                const W* previous = i ? states + (i - 1) * numbers : before;
                step_back(token, key, width, head.begins(t) ? nullptr : previous, states + i * numbers, read, o_grad,
                          gradient, v_grad, sums);
                copy_row(value, v_grad, d.v + at * value);
                sums.write(RowSums<W>::decay, d.log_decay + at * key);
                auto write = [&](typename RowSums<W>::Which which, T* to) {
                    sums.write(which, row);
                    copy_row(key, row, to + at * key);
                };
                write(RowSums<W>::q, d.q);
                write(RowSums<W>::k, d.k);
                write(RowSums<W>::a, d.a);
                write(RowSums<W>::b, d.b);
            }
        }
    }
    save_state(gradient, key, value, width, d.state + head.index() * key * value);
}

}  // namespace
}  // namespace seqzoo

using namespace seqzoo;

// [batch, time, ...] as in __init__.py, dense. z: [batch, time, head, value]; kept: [batch, head, states, key, value],
// the states that enter the tokens SEGMENT, 2 SEGMENT, ...
SEQZOO_EXPORT void dplr_delta_rule_forward(int64_t dtype, int64_t threads, const void* q, const void* k, const void* v,
                                           const void* a, const void* b, const void* log_decay, const void* state,
                                           const void* starts, void* o, void* last, void* z, void* kept, int64_t batch,
                                           int64_t time, int64_t heads, int64_t key, int64_t value) {
    with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        Inputs<T> x({batch, time, heads, key, value}, q, k, v, a, b, log_decay, state, starts);
        parallel_for(busy_threads(threads, time * batch * heads * key * value), batch * heads, [&](int64_t i) {
            forward(Head<T>(x, i), static_cast<T*>(o), static_cast<W*>(last), static_cast<W*>(z),
                    static_cast<W*>(kept));
        });
    });
}

SEQZOO_EXPORT void dplr_delta_rule_backward(int64_t dtype, int64_t threads, const void* q, const void* k, const void* v,
                                            const void* a, const void* b, const void* log_decay, const void* state,
                                            const void* starts, const void* z, void* kept, const void* o_grad,
                                            const void* last_grad, void* q_grad, void* k_grad, void* v_grad,
                                            void* a_grad, void* b_grad, void* log_decay_grad, void* state_grad,
                                            int64_t batch, int64_t time, int64_t heads, int64_t key, int64_t value) {
    with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        Inputs<T> x({batch, time, heads, key, value}, q, k, v, a, b, log_decay, state, starts);
        Gradients<T> d{static_cast<const T*>(o_grad), static_cast<const W*>(last_grad), static_cast<const W*>(z),
                       static_cast<W*>(kept),         static_cast<T*>(q_grad),          static_cast<T*>(k_grad),
                       static_cast<T*>(v_grad),       static_cast<T*>(a_grad),          static_cast<T*>(b_grad),
                       static_cast<W*>(log_decay_grad), static_cast<W*>(state_grad)};
        parallel_for(int(threads), batch * heads, [&](int64_t i) { backward(Head<T>(x, i), d); });
    });
}
