// Softmax attention on the CPU: tiles of queries against tiles of keys, weights only ever in the cache.
//
// Queries of all heads that share a key stand under each other as rows of one matrix, token by token. With p_ij the
// weights, L_i the logarithm of their sum and D_i = o_i . do_i, the backward pass computes tiles of p again and
//     dv_j = sum_i p_ij do_i,    dl_ij = p_ij (do_i . v_j - D_i),    gradient of a sink = -sum_i exp(sink - L_i) D_i.
#include <algorithm>
#include <cmath>
#include <limits>

#include "gemm.h"
#include "interface.h"

using namespace seqzoo;

namespace {

// Slots of a tile, and about as many rows of queries.
constexpr int64_t SLOTS = 128, ROWS = 128;
// What may be forgotten within a tile before sums of two floats have lost digits of small differences.
constexpr double FAR = -64;

template <class T>
constexpr Precision PRECISION = std::is_same_v<T, bfloat16> ? Precision::bf16 : Precision::full;

// [batch][token or slot][head or group][size], where only the last two axes need be dense.
template <class T>
struct Rows {
    const T* data;
    int64_t batch, step, size;  // the first two are strides

    const T* at(int64_t b, int64_t t, int64_t head) const { return data + b * batch + t * step + head * size; }
};

template <class T>
struct Problem {
    Rows<T> q, k, v;
    const double* decay;    // [batch][head][slot] or null
    const Wide<T>* sink;    // [head] or null
    const int64_t* first;   // [batch][token] or null
    const double* cutoff;   // [batch][head] or null
    int64_t batch, time, slots, heads, groups, key, value;
    int64_t window, sinks, prefix;
    Wide<T> soft_cap, scale;  // a cap of 0 is none

    int64_t shared() const { return heads / groups; }
    int64_t tokens_of_tile() const { return std::max<int64_t>(1, ROWS / shared()); }
    int64_t own(int64_t t) const { return slots - time + t; }
};

// What of one batch row and group the tiles look at.
template <class T>
struct Group {
    using W = Wide<T>;
    const Problem<T>& p;
    int64_t b, g;

    Matrix<const T> rows_of(const Rows<T>& x, int64_t slot) const { return {x.at(b, slot, g), x.step}; }
    int64_t first(int64_t t) const { return p.first ? p.first[b * p.time + t] : p.prefix; }
    const double* decay(int64_t r) const { return p.decay + (b * p.heads + g * p.shared() + r) * p.slots; }

    // The rows of tokens [t0, t1), heads of one token together.
    void gather(const Rows<T>& x, int64_t t0, int64_t t1, T* to) const {
        const int64_t width = p.shared() * x.size;
        for (int64_t t = t0; t < t1; t++) copy_row(width, x.at(b, t, g * p.shared()), to + (t - t0) * width);
    }

    template <class From>
    void scatter(const From* from, int64_t size, int64_t t0, int64_t t1, T* x) const {
        const int64_t width = p.shared() * size;
        for (int64_t t = t0; t < t1; t++) {
            copy_row(width, from + (t - t0) * width, x + ((b * p.time + t) * p.heads + g * p.shared()) * size);
        }
    }
};

// Which slots of a tile one token sees: [begin, end), the sinks that stand before, and the prefix before these.
struct Seen {
    int64_t prefix_end, sinks_begin, sinks_end, begin, end;
    bool nothing() const { return prefix_end <= 0 && sinks_begin >= sinks_end && begin >= end; }
};

template <class T>
Seen seen(const Group<T>& group, int64_t t, int64_t j0, int64_t j1) {
    const auto& p = group.p;
    const int64_t own = p.own(t), first = group.first(t), near = std::max(first, own - p.window + 1);
    auto inside = [&](int64_t slot) { return std::clamp(slot, j0, j1) - j0; };
    return {inside(p.prefix), inside(first), inside(std::min(first + p.sinks, near)), inside(near), inside(own + 1)};
}

// Whether any token of [t0, t1) sees a slot of [j0, j1).
template <class T>
bool any_seen(const Group<T>& group, int64_t t0, int64_t t1, int64_t j0, int64_t j1) {
    const auto& p = group.p;
    if (p.own(t1 - 1) < j0) return false;
    bool found = false;
    if (p.first) {
        for (int64_t t = t0; t < t1 && !found; t++) found = !seen(group, t, j0, j1).nothing();
    } else {
        found = j1 > p.own(t0) - p.window + 1 || j0 < p.prefix + p.sinks;
    }
    if (!found || !p.cutoff) return found;
    // What is forgotten only grows with the distance: the nearest pair decides.
    for (int64_t r = 0; r < p.shared(); r++) {
        const double* c = group.decay(r);
        if (c[std::max(p.own(t0), j1 - 1)] - c[j1 - 1] >= p.cutoff[group.b * p.heads + group.g * p.shared() + r]) return true;
    }
    return false;
}

// Turn products in `l` (rows of SLOTS numbers) into logits, -inf where nothing is seen; with a cap, `slope` gets what it
// leaves of their gradient.
template <class T>
void finish_logits(const Group<T>& group, int64_t t0, int64_t t1, int64_t j0, int64_t j1, Wide<T>* l, Wide<T>* slope) {
    using W = Wide<T>;
    using V = Vec<W>;
    const auto& p = group.p;
    const int64_t shared = p.shared(), count = j1 - j0;
    const W nothing = -std::numeric_limits<W>::infinity();
    W* forgotten = p.decay ? workspace<10, W>(shared * SLOTS) : nullptr;
    // Differences to the tile's first token, from which those to others follow as long as it is near.
    for (int64_t r = 0; forgotten && r < shared; r++) {
        const double* c = group.decay(r);
        for (int64_t j = 0; j < count; j++) forgotten[r * SLOTS + j] = W(c[p.own(t0)] - c[j0 + j]);
    }
    for (int64_t t = t0; t < t1; t++) {
        const Seen s = seen(group, t, j0, j1);
        for (int64_t r = 0; r < shared; r++) {
            W* row = l + ((t - t0) * shared + r) * SLOTS;
            if (p.soft_cap != 0) {
                W* slopes = slope ? slope + ((t - t0) * shared + r) * SLOTS : nullptr;
                for_each_vector<W>(count, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    V bent = tanh(load(row + i) / p.soft_cap);
                    store(row + i, bent * p.soft_cap);
                    if (slopes) store(slopes + i, 1 - bent * bent);
                });
            }
            if (forgotten) {
                const double* c = group.decay(r);
                const double own = c[p.own(t)], since = own - c[p.own(t0)];
                if (since < FAR) {
                    for (int64_t i = 0; i < count; i++) row[i] += W(own - c[j0 + i]);
                } else {
                    V mine = broadcast<V>(W(since));
                    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                        store(row + i, load(row + i) + (load(forgotten + r * SLOTS + i) + mine));
                    });
                }
            }
            auto hide = [&](int64_t from, int64_t to) { std::fill(row + from, row + std::max(from, to), nothing); };
            hide(s.prefix_end, s.sinks_begin);
            hide(s.sinks_end, s.begin);
            hide(std::max(s.begin, s.end), count);
        }
    }
}

template <class T>
void forward(const Problem<T>& p, T* o, Wide<T>* sums, int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t tokens = p.tokens_of_tile(), tiles = (p.time + tokens - 1) / tokens, shared = p.shared();
    const W nothing = -std::numeric_limits<W>::infinity();
    parallel_for(int(threads), p.batch * p.groups * tiles, [&](int64_t task) {
        // The last tiles see the most: they come first, so that no thread is left with one at the end.
        const int64_t tile = tiles - 1 - task / (p.batch * p.groups), which = task % (p.batch * p.groups);
        const Group<T> group{p, which / p.groups, which % p.groups};
        const int64_t t0 = tile * tokens, t1 = std::min(p.time, t0 + tokens), rows = (t1 - t0) * shared;
        T* q = workspace<0, T>(rows * p.key + LANES<T>);
        group.gather(p.q, t0, t1, q);
        W* l = workspace<1, W>(rows * SLOTS);
        W* out = workspace<2, W>(rows * p.value + LANES<T>);
        W *largest = workspace<3, W>(2 * rows), *total = largest + rows;
        std::fill_n(out, rows * p.value, W(0));
        for (int64_t i = 0; i < rows; i++) {
            largest[i] = p.sink ? p.sink[group.g * shared + i % shared] : nothing;
            total[i] = p.sink ? W(1) : W(0);
        }
        const int64_t end = p.own(t1 - 1) + 1;
        for (int64_t j0 = 0; j0 < end; j0 += SLOTS) {
            const int64_t j1 = std::min(end, j0 + SLOTS), count = j1 - j0;
            if (!any_seen(group, t0, t1, j0, j1)) continue;
            gemm<PRECISION<T>>({rows, count, p.key}, Matrix<const T>{q, p.key},
                               group.rows_of(p.k, j0).transposed(), Matrix<W>{l, SLOTS}, p.scale);
            finish_logits<T>(group, t0, t1, j0, j1, l, nullptr);
            for (int64_t i = 0; i < rows; i++) {
                W *row = l + i * SLOTS, *to = out + i * p.value;
                V most = broadcast<V>(largest[i]);
                int64_t j = 0;
                for (; j + LANES<W> <= count; j += LANES<W>) most = max(most, load(row + j));
                W now = seqzoo::largest(most);
                for (; j < count; j++) now = std::max(now, row[j]);
                if (now == nothing) {  // not one was seen so far
                    std::fill_n(row, count, W(0));
                    continue;
                }
                V minus = broadcast<V>(-now), added{};
                for_each_vector<W>(count, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
                    store(row + at, exp(load(row + at) + minus));
                    added += load(row + at);  // zeros past the last slot
                });
                if (now != largest[i]) {
                    const W keep = std::exp(largest[i] - now);
                    total[i] *= keep;
                    for_each_vector<W>(p.value, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
                        store(to + at, load(to + at) * keep);
                    });
                    largest[i] = now;
                }
                total[i] += sum(added);
            }
            gemm<PRECISION<T>>({rows, p.value, count}, Matrix<const W>{l, SLOTS}, group.rows_of(p.v, j0),
                               Matrix<W>{out, p.value}, W(1), true);
        }
        for (int64_t i = 0; i < rows; i++) {
            W* to = out + i * p.value;
            V share = broadcast<V>(1 / total[i]);
            for_each_vector<W>(p.value, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
                store(to + at, load(to + at) * share);
            });
            const int64_t head = group.g * shared + i % shared;
            sums[(group.b * p.heads + head) * p.time + t0 + i / shared] = largest[i] + std::log(total[i]);
        }
        group.scatter(out, p.value, t0, t1, o);
    });
}

// to[i] += x[i], in double: of a running sum's gradient only what rows and columns do not have in common remains.
template <class V>
SEQZOO_INLINE void add_exactly(double* to, V x) {
    constexpr int HALVES = sizeof(double) / sizeof(Lane<V>);
    using Part = typename VectorOf<Lane<V>, sizeof(V) / HALVES>::type;
    Part parts[HALVES];
    std::memcpy(parts, &x, sizeof(x));
    SEQZOO_UNROLL
    for (int i = 0; i < HALVES; i++) {
        double* at = to + i * LANES<double>;
        store(at, load(at) + __builtin_convertvector(parts[i], Vec<double>));
    }
}

template <class T>
struct Gradients {
    const T *o, *d_o;
    const Wide<T>* sums;
    T *q, *k, *v;
    double* decay;   // null where there is none
    Wide<T>* sink;   // the same
};

// Tiles of slots whose number is `part` modulo `parts`: their dk and dv as they must be, their share of all else.
template <class T>
void backward_part(const Group<T>& group, const Gradients<T>& grad, int64_t part, int64_t parts, Wide<T>* dq,
                   double* ddecay) {
    using W = Wide<T>;
    using V = Vec<W>;
    const auto& p = group.p;
    const int64_t tokens = p.tokens_of_tile(), shared = p.shared(), all = p.time * shared;
    std::fill_n(dq, all * p.key, W(0));
    if (ddecay) std::fill_n(ddecay, shared * p.slots, 0.0);
    W *along = workspace<4, W>(2 * all), *sums = along + all;
    for (int64_t t = 0; t < p.time; t++) {
        for (int64_t r = 0; r < shared; r++) {
            const int64_t head = group.g * shared + r, at = ((group.b * p.time + t) * p.heads + head) * p.value;
            along[t * shared + r] = dot(p.value, grad.o + at, grad.d_o + at);
            sums[t * shared + r] = grad.sums[(group.b * p.heads + head) * p.time + t];
        }
    }
    const int64_t most = tokens * shared;
    T *q = workspace<0, T>(most * p.key + LANES<T>), *d_o = workspace<5, T>(most * p.value + LANES<T>);
    W *l = workspace<1, W>(most * SLOTS), *dl = workspace<2, W>(most * SLOTS);
    W* slope = p.soft_cap != 0 ? workspace<6, W>(most * SLOTS) : nullptr;
    W *dk = workspace<7, W>(SLOTS * p.key), *dv = workspace<8, W>(SLOTS * p.value);
    double* columns = workspace<9, double>(shared * SLOTS);
    const Rows<T> d_o_rows{grad.d_o, p.time * p.heads * p.value, p.heads * p.value, p.value};
    for (int64_t j0 = part * SLOTS; j0 < p.slots; j0 += parts * SLOTS) {
        const int64_t j1 = std::min(p.slots, j0 + SLOTS), count = j1 - j0;
        std::fill_n(dk, count * p.key, W(0));
        std::fill_n(dv, count * p.value, W(0));
        std::fill_n(columns, shared * SLOTS, 0.0);
        const Matrix<const T> keys = group.rows_of(p.k, j0), values = group.rows_of(p.v, j0);
        for (int64_t t0 = std::max<int64_t>(0, j0 - p.own(0)) / tokens * tokens; t0 < p.time; t0 += tokens) {
            const int64_t t1 = std::min(p.time, t0 + tokens), rows = (t1 - t0) * shared;
            if (!any_seen(group, t0, t1, j0, j1)) continue;
            group.gather(p.q, t0, t1, q);
            group.gather(d_o_rows, t0, t1, d_o);
            gemm<PRECISION<T>>({rows, count, p.key}, Matrix<const T>{q, p.key}, keys.transposed(), Matrix<W>{l, SLOTS},
                               p.scale);
            finish_logits<T>(group, t0, t1, j0, j1, l, slope);
            gemm<PRECISION<T>>({rows, count, p.value}, Matrix<const T>{d_o, p.value}, values.transposed(),
                               Matrix<W>{dl, SLOTS});
            for (int64_t i = 0; i < rows; i++) {
                const int64_t row = t0 * shared + i;
                W *weights = l + i * SLOTS, *dlogits = dl + i * SLOTS;
                double *column = columns + i % shared * SLOTS, totals[LANES<W>] = {};
                V minus = broadcast<V>(-sums[row]), mean = broadcast<V>(along[row]);
                for_each_vector<W>(count, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
                    V weight = exp(load(weights + at) + minus);
                    V d = weight * (load(dlogits + at) - mean);
                    store(weights + at, weight);
                    store(dlogits + at, d);
                    if (ddecay) {
                        d = load(dlogits + at);  // zeros past the last slot
                        add_exactly(column + at, d);
                        add_exactly(totals, d);
                    }
                });
                if (ddecay) {
                    double& to = ddecay[i % shared * p.slots + p.own(t0 + i / shared)];
                    for (double total : totals) to += total;
                }
                if (slope) {
                    for_each_vector<W>(count, [&](int64_t at, auto load, auto store) __attribute__((always_inline)) {
                        store(dlogits + at, load(dlogits + at) * load(slope + i * SLOTS + at));
                    });
                }
            }
            gemm<PRECISION<T>>({count, p.value, rows}, Matrix<const W>{l, SLOTS}.transposed(),
                               Matrix<const T>{d_o, p.value}, Matrix<W>{dv, p.value}, W(1), true);
            gemm<PRECISION<T>>({count, p.key, rows}, Matrix<const W>{dl, SLOTS}.transposed(),
                               Matrix<const T>{q, p.key}, Matrix<W>{dk, p.key}, p.scale, true);
            gemm<PRECISION<T>>({rows, p.key, count}, Matrix<const W>{dl, SLOTS}, keys,
                               Matrix<W>{dq + t0 * shared * p.key, p.key}, p.scale, true);
        }
        for (int64_t r = 0; ddecay && r < shared; r++) {
            for (int64_t j = 0; j < count; j++) ddecay[r * p.slots + j0 + j] -= columns[r * SLOTS + j];
        }
        for (int64_t j = 0; j < count; j++) {
            const int64_t row = (group.b * p.slots + j0 + j) * p.groups + group.g;
            copy_row(p.key, dk + j * p.key, grad.k + row * p.key);
            copy_row(p.value, dv + j * p.value, grad.v + row * p.value);
        }
    }
}

template <class T>
void backward(const Problem<T>& p, const Gradients<T>& grad, int64_t threads) {
    using W = Wide<T>;
    const int64_t groups = p.batch * p.groups, shared = p.shared(), all = p.time * shared * p.key;
    // Where groups are fewer than threads, several parts share one; each sums what tiles of slots give to queries.
    const int64_t parts = std::clamp<int64_t>((threads + groups - 1) / groups, 1, (p.slots + SLOTS - 1) / SLOTS);
    const bool split = parts > 1;
    W* dq = split ? workspace<20, W>(groups * parts * all) : nullptr;
    double* ddecay = split && grad.decay ? workspace<21, double>(groups * parts * shared * p.slots) : nullptr;
    parallel_for(int(threads), groups * parts, [&](int64_t task) {
        const int64_t which = task / parts, part = task % parts;
        const Group<T> group{p, which / p.groups, which % p.groups};
        double* of_decay = !grad.decay ? nullptr
                           : split     ? ddecay + task * shared * p.slots
                                       : grad.decay + which * shared * p.slots;
        W* mine = split ? dq + task * all : workspace<11, W>(all);
        backward_part(group, grad, part, parts, mine, of_decay);
        if (!split) group.scatter(mine, p.key, 0, p.time, grad.q);
    });
    if (split) {
        parallel_for(int(threads), groups, [&](int64_t which) {
            W* sum = dq + which * parts * all;
            for (int64_t part = 1; part < parts; part++) {
                for_each_vector<W>(all, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    store(sum + i, load(sum + i) + load(sum + part * all + i));
                });
            }
            Group<T>{p, which / p.groups, which % p.groups}.scatter(sum, p.key, 0, p.time, grad.q);
            for (int64_t i = 0; grad.decay && i < shared * p.slots; i++) {
                double total = 0;
                for (int64_t part = 0; part < parts; part++) total += ddecay[(which * parts + part) * shared * p.slots + i];
                grad.decay[which * shared * p.slots + i] = total;
            }
        });
    }
    parallel_for(int(threads), grad.sink ? p.heads : 0, [&](int64_t head) {
        double total = 0;
        for (int64_t row = 0; row < p.batch * p.time; row++) {
            const int64_t at = (row * p.heads + head) * p.value;
            double along = 0;
            for (int64_t i = 0; i < p.value; i++) along += double(widen(grad.o[at + i])) * widen(grad.d_o[at + i]);
            const W sum = grad.sums[(row / p.time * p.heads + head) * p.time + row % p.time];
            total -= std::exp(double(p.sink[head]) - sum) * along;
        }
        grad.sink[head] = W(total);
    });
}

// What both directions begin with. Of queries, keys and values, strides of the first two axes; no window is 0.
template <class T>
Problem<T> make(const void* q, int64_t q_batch, int64_t q_token, const void* k, int64_t k_batch, int64_t k_slot,
                const void* v, int64_t v_batch, int64_t v_slot, const void* decay, const void* sink, const void* first,
                const void* cutoff, int64_t batch, int64_t time, int64_t slots, int64_t heads, int64_t groups,
                int64_t key, int64_t value, int64_t window, int64_t sinks, int64_t prefix, double soft_cap, double scale) {
    return {{static_cast<const T*>(q), q_batch, q_token, key},
            {static_cast<const T*>(k), k_batch, k_slot, key},
            {static_cast<const T*>(v), v_batch, v_slot, value},
            static_cast<const double*>(decay),
            static_cast<const Wide<T>*>(sink),
            static_cast<const int64_t*>(first),
            static_cast<const double*>(cutoff),
            batch,
            time,
            slots,
            heads,
            groups,
            key,
            value,
            window ? window : slots,
            sinks,
            prefix,
            Wide<T>(soft_cap),
            Wide<T>(scale)};
}

}  // namespace

// The running sum of what is forgotten, the sink's logit, first slots and cut-offs may be null.
SEQZOO_EXPORT void attention_forward(int64_t dtype, int64_t threads, const void* q, int64_t q_batch, int64_t q_token,
                                     const void* k, int64_t k_batch, int64_t k_slot, const void* v, int64_t v_batch,
                                     int64_t v_slot, const void* decay, const void* sink, const void* first,
                                     const void* cutoff, void* o, void* sums, int64_t batch, int64_t time,
                                     int64_t slots, int64_t heads, int64_t groups, int64_t key, int64_t value,
                                     int64_t window, int64_t sinks, int64_t prefix, double soft_cap, double scale) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto p = make<T>(q, q_batch, q_token, k, k_batch, k_slot, v, v_batch, v_slot, decay, sink, first, cutoff,
                         batch, time, slots, heads, groups, key, value, window, sinks, prefix, soft_cap,
                         scale);
        forward<T>(p, static_cast<T*>(o), static_cast<Wide<T>*>(sums), threads);
    });
}

// The gradients of the running sum and of the sink may be null where these are.
SEQZOO_EXPORT void attention_backward(int64_t dtype, int64_t threads, const void* q, int64_t q_batch, int64_t q_token,
                                      const void* k, int64_t k_batch, int64_t k_slot, const void* v, int64_t v_batch,
                                      int64_t v_slot, const void* decay, const void* sink, const void* first,
                                      const void* cutoff, const void* o, const void* sums, const void* d_o, void* dq,
                                      void* dk, void* dv, void* ddecay, void* dsink, int64_t batch, int64_t time,
                                      int64_t slots, int64_t heads, int64_t groups, int64_t key, int64_t value,
                                      int64_t window, int64_t sinks, int64_t prefix, double soft_cap, double scale) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto p = make<T>(q, q_batch, q_token, k, k_batch, k_slot, v, v_batch, v_slot, decay, sink, first, cutoff,
                         batch, time, slots, heads, groups, key, value, window, sinks, prefix, soft_cap,
                         scale);
        backward<T>(p, {static_cast<const T*>(o), static_cast<const T*>(d_o), static_cast<const Wide<T>*>(sums),
                        static_cast<T*>(dq), static_cast<T*>(dk), static_cast<T*>(dv), static_cast<double*>(ddecay),
                        static_cast<Wide<T>*>(dsink)},
                    threads);
    });
}
