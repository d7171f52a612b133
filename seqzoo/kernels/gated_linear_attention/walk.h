// Token by token: what decays of key channels need, a bonus, and a few tokens.
//
// Columns of S are recurrences of their own, so a tile of a few vectors of columns is walked through time with all its
// rows in the cache. One loop serves the outputs and, with other operands and directions, every gradient:
//
//     o_t  = S_t^T q_t,            S_t  = a_t S_{t-1} + k_t v_t^T,              tiles of value columns, forwards
//     dv_t = dS_t^T k_t,           dS_t = a_{t+1} dS_{t+1} + q_t do_t^T,        tiles of value columns, backwards
//     dq_t = S_t do_t,             S^T as above,                                tiles of key columns, forwards
//     dk_t = dS_t v_t,             dS^T as above,                               tiles of key columns, backwards
//
// With a bonus, step t reads with the query of token t but writes token t - 1 (`shift`), and the bonus is added apart.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "problem.h"

namespace linear_attention {

using namespace seqzoo;

// How many vectors of columns one tile has: its outputs of two steps stay in registers.
constexpr int COLUMNS = VECTOR_REGISTERS == 32 ? 4 : 2;
template <class W>
constexpr int64_t TILE = COLUMNS * LANES<W>;
// Steps of one stretch, whose operands are loaded at once, and steps between two states that the backward keeps.
constexpr int64_t STRETCH = 256, ANCHOR = 16;

enum class Decay { none, rows, columns };
enum class Read { never, before_writing, after_writing };

// Rows of one operand, widened and padded with zeros to whole tiles: [step][stride].
template <class W>
struct Rows {
    W* data;
    int64_t stride;
    W* operator[](int64_t step) const { return data + step * stride; }
};

template <class W>
int64_t padded(int64_t size) {
    return (size + TILE<W> - 1) / TILE<W> * TILE<W>;
}

template <class W>
W dot(const W* a, const W* b, int64_t padded_count) {
    Vec<W> total{};
    for (int64_t i = 0; i < padded_count; i += LANES<W>) total = fma(load(a + i), load(b + i), total);
    return sum(total);
}

// Step by step along one stretch: a tile of the state of `rows` rows, each COLUMNS vectors wide, reads and writes.
template <class W>
struct Walk {
    W* state;
    int64_t rows;
    Rows<W> decay, write_row, write_column, read, out;
};

template <int STEPS, Decay DECAY, Read READ, class W>
SEQZOO_INLINE void walk_block(const Walk<W>& walk, int64_t first, int64_t direction) {
    using V = Vec<W>;
    V out[STEPS][COLUMNS], column[STEPS][COLUMNS];
    const W *decay[STEPS], *write[STEPS], *read[STEPS];
    SEQZOO_UNROLL
    for (int t = 0; t < STEPS; t++) {
        int64_t step = first + t * direction;
        decay[t] = DECAY == Decay::none ? nullptr : walk.decay[step];
        write[t] = walk.write_row[step];
        read[t] = READ == Read::never ? nullptr : walk.read[step];
        SEQZOO_UNROLL
        for (int j = 0; j < COLUMNS; j++) {
            out[t][j] = V{};
            column[t][j] = load(walk.write_column[step] + j * LANES<W>);
        }
    }
    W* state = walk.state;
    for (int64_t row = 0; row < walk.rows; row++, state += TILE<W>) {
        V s[COLUMNS];
        SEQZOO_UNROLL
        for (int j = 0; j < COLUMNS; j++) s[j] = load(state + j * LANES<W>);
        SEQZOO_UNROLL
        for (int t = 0; t < STEPS; t++) {
            V written = broadcast<V>(write[t][row]);
            V reading = READ == Read::never ? V{} : broadcast<V>(read[t][row]);
            V kept = DECAY == Decay::rows ? broadcast<V>(decay[t][row]) : V{};
            SEQZOO_UNROLL
            for (int j = 0; j < COLUMNS; j++) {
                if constexpr (DECAY == Decay::rows) s[j] *= kept;
                if constexpr (DECAY == Decay::columns) s[j] *= load(decay[t] + j * LANES<W>);
                if constexpr (READ == Read::before_writing) out[t][j] = fma(reading, s[j], out[t][j]);
                s[j] = fma(written, column[t][j], s[j]);
                if constexpr (READ == Read::after_writing) out[t][j] = fma(reading, s[j], out[t][j]);
            }
        }
        SEQZOO_UNROLL
        for (int j = 0; j < COLUMNS; j++) store(state + j * LANES<W>, s[j]);
    }
    if constexpr (READ != Read::never) {
        SEQZOO_UNROLL
        for (int t = 0; t < STEPS; t++) {
            SEQZOO_UNROLL
            for (int j = 0; j < COLUMNS; j++) store(walk.out[first + t * direction] + j * LANES<W>, out[t][j]);
        }
    }
}

template <class W>
void forget(const Walk<W>& walk) {
    std::fill_n(walk.state, walk.rows * TILE<W>, W(0));
}

// Steps from, from + 1, ..., to - 1. A step that begins a document forgets the state first.
template <Decay DECAY, Read READ, class W>
__attribute__((noinline)) void walk_forwards(const Walk<W>& walk, const bool* begins, int64_t from, int64_t to) {
    while (from < to) {
        if (begins[from]) forget(walk);
        if (from + 1 < to && !begins[from + 1]) {
            walk_block<2, DECAY, READ>(walk, from, 1);
            from += 2;
        } else {
            walk_block<1, DECAY, READ>(walk, from, 1);
            from += 1;
        }
    }
}

// Steps to - 1, to - 2, ..., from. A step that begins a document forgets the gradient after it.
template <Decay DECAY, Read READ, class W>
__attribute__((noinline)) void walk_backwards(const Walk<W>& walk, const bool* begins, int64_t from, int64_t to) {
    while (from < to) {
        int count = to - 1 > from && !begins[to - 1] ? 2 : 1;
        if (count == 2) {
            walk_block<2, DECAY, READ>(walk, to - 1, -1);
        } else {
            walk_block<1, DECAY, READ>(walk, to - 1, -1);
        }
        to -= count;
        if (begins[to]) forget(walk);
    }
}

// Loads the operands of one stretch of steps, of which it has `count` from `first` on.
template <class T>
struct Stretch {
    using W = Wide<T>;
    const Problem<T>& p;
    int64_t b, h, first, count;

    int64_t group() const { return h / (p.heads / p.groups); }

    // Keys and values that the steps write; queries and gradients of outputs that they read with. `width` numbers from
    // `channel` on.
    void keys(const Rows<W>& to, int64_t channel, int64_t width) const {
        fill(to, true, [&](int64_t token, W* row) { load_row(p.k + at_key(token) + channel, width, row, to.stride); });
    }
    void values(const Rows<W>& to, int64_t channel, int64_t width) const {
        fill(to, true, [&](int64_t token, W* row) { load_row(p.v + at_value(token) + channel, width, row, to.stride); });
    }
    void queries(const Rows<W>& to, int64_t channel, int64_t width) const {
        fill(to, false, [&](int64_t token, W* row) { load_row(p.q + at_key(token) + channel, width, row, to.stride); });
    }
    void gradients(const T* from, const Rows<W>& to, int64_t channel, int64_t width) const {
        fill(to, false, [&](int64_t token, W* row) { load_row(from + at_value(token) + channel, width, row, to.stride); });
    }

    int64_t at_key(int64_t token) const { return ((b * p.time + token) * p.groups + group()) * p.key; }
    int64_t at_value(int64_t token) const { return ((b * p.time + token) * p.heads + h) * p.value; }

    // e^g of each step, or of the step after each.
    void decays(const Rows<W>& to, int64_t channel, int64_t width, int64_t later) const {
        for (int64_t i = 0; i < count; i++) {
            int64_t token = first + i + later - p.shift();
            W* row = to[i];
            if (token < 0 || token >= p.time || !p.log_decay) {
                std::fill_n(row, to.stride, W(1));
            } else if (!p.per_channel) {
                W a = exp(broadcast<Vec<W>>(p.log_decay[(b * p.time + token) * p.heads + h]))[0];
                std::fill_n(row, to.stride, a);
            } else {
                const W* g = p.log_decay + ((b * p.time + token) * p.heads + h) * p.key + channel;
                load_row(g, width, row, to.stride);
                for (int64_t c = 0; c < to.stride; c += LANES<W>) store(row + c, exp(load(row + c)));
            }
        }
    }

    void begins(bool* to) const {
        for (int64_t i = 0; i < count; i++) to[i] = p.begins(b, first + i);
    }

    // What the bonus adds to a token's own pair: q . (u k), and the product of its value and its output's gradient.
    W own_weight(int64_t token) const {
        const T *q = p.q + at_key(token), *k = p.k + at_key(token);
        const W* u = p.bonus + h * p.key;
        Vec<W> total{};
        for_each_vector<T>(p.key, [&](int64_t c, auto load, auto) {
            total = fma(load(q + c) * load(k + c), load(u + c), total);
        });
        return sum(total);
    }
    W own_gradient(const T* o_grad, int64_t token) const {
        const T *v = p.v + at_value(token), *gradient = o_grad + at_value(token);
        Vec<W> total{};
        for_each_vector<T>(p.value, [&](int64_t c, auto load, auto) { total = fma(load(v + c), load(gradient + c), total); });
        return sum(total);
    }

   private:
    template <class Load>
    void fill(const Rows<W>& to, bool written, Load load) const {
        for (int64_t i = 0; i < count; i++) {
            int64_t token = first + i - (written ? p.shift() : 0);
            if (written ? token >= 0 : p.reads(b, token)) {
                load(token, to[i]);
            } else {
                std::fill_n(to[i], to.stride, W(0));
            }
        }
    }
};

// A tile of a state [rows, columns] with `width` columns from `column` on; null is zero.
template <class W>
void load_state(const W* from, int64_t rows, int64_t columns, int64_t column, int64_t width, W* tile) {
    if (!from) return void(std::fill_n(tile, rows * TILE<W>, W(0)));
    for (int64_t r = 0; r < rows; r++) load_row(from + r * columns + column, width, tile + r * TILE<W>, TILE<W>);
}

template <class W>
void store_state(const W* tile, int64_t rows, int64_t columns, int64_t column, int64_t width, W* to) {
    for (int64_t r = 0; r < rows; r++) store_row(tile + r * TILE<W>, width, to + r * columns + column);
}

// The same of the transpose of a state [columns, rows].
template <class W>
void load_transposed(const W* from, int64_t rows, int64_t column, int64_t width, W* tile) {
    std::fill_n(tile, rows * TILE<W>, W(0));
    if (!from) return;
    for (int64_t c = 0; c < width; c++) {
        for (int64_t r = 0; r < rows; r++) tile[r * TILE<W> + c] = from[(column + c) * rows + r];
    }
}

template <class W>
void store_transposed(const W* tile, int64_t rows, int64_t column, int64_t width, W* to) {
    for (int64_t c = 0; c < width; c++) {
        for (int64_t r = 0; r < rows; r++) to[(column + c) * rows + r] = tile[r * TILE<W> + c];
    }
}

template <class T>
void forward_tile(const Problem<T>& p, int64_t b, int64_t h, int64_t column, T* o, Wide<T>* last) {
    using W = Wide<T>;
    int64_t width = std::min(TILE<W>, p.value - column), keys = padded<W>(p.key), length = std::min(STRETCH, p.steps());
    W* memory = workspace<0, W>(length * (3 * keys + 2 * TILE<W>) + p.key * TILE<W>);
    auto take = [&](int64_t stride) {
        Rows<W> rows{memory, stride};
        memory += length * stride;
        return rows;
    };
    Rows<W> q = take(keys), k = take(keys), decay = take(keys), v = take(TILE<W>), out = take(TILE<W>);
    Walk<W> walk{memory, p.key, decay, k, v, q, out};
    int64_t at = b * p.heads + h;
    load_state(p.state ? p.state + at * p.key * p.value : nullptr, p.key, p.value, column, width, walk.state);
    bool begins[STRETCH];
    for (int64_t first = 0; first < p.steps(); first += STRETCH) {
        Stretch<T> stretch{p, b, h, first, std::min(STRETCH, p.steps() - first)};
        stretch.queries(q, 0, p.key);
        stretch.keys(k, 0, p.key);
        stretch.values(v, column, width);
        stretch.begins(begins);
        if (p.log_decay) {
            stretch.decays(decay, 0, p.key, 0);
            walk_forwards<Decay::rows, Read::after_writing>(walk, begins, 0, stretch.count);
        } else {
            walk_forwards<Decay::none, Read::after_writing>(walk, begins, 0, stretch.count);
        }
        for (int64_t i = 0; i < stretch.count && first + i < p.time; i++) {
            int64_t place = ((b * p.time + first + i) * p.heads + h) * p.value + column;
            if (p.bonus) {
                Vec<W> own = broadcast<Vec<W>>(stretch.own_weight(first + i));
                for_each_vector<T>(width, [&](int64_t c, auto load, auto) {
                    store(out[i] + c, fma(own, load(p.v + place + c), seqzoo::load(out[i] + c)));
                });
            }
            store_row(out[i], width, o + place);
        }
    }
    store_state(walk.state, p.key, p.value, column, width, last + at * p.key * p.value);
}

template <class T>
void values_backward(const Problem<T>& p, int64_t b, int64_t h, int64_t column, const T* o_grad,
                     const Wide<T>* last_grad, const Gradients<T>& to) {
    using W = Wide<T>;
    int64_t width = std::min(TILE<W>, p.value - column), keys = padded<W>(p.key), length = std::min(STRETCH, p.steps());
    W* memory = workspace<0, W>(length * (3 * keys + 2 * TILE<W>) + p.key * TILE<W>);
    auto take = [&](int64_t stride) {
        Rows<W> rows{memory, stride};
        memory += length * stride;
        return rows;
    };
    Rows<W> q = take(keys), k = take(keys), decay = take(keys), gradient = take(TILE<W>), out = take(TILE<W>);
    Walk<W> walk{memory, p.key, decay, q, gradient, k, out};
    load_state(last_grad + (b * p.heads + h) * p.key * p.value, p.key, p.value, column, width, walk.state);
    bool begins[STRETCH];
    for (int64_t first = (p.steps() - 1) / STRETCH * STRETCH; first >= 0; first -= STRETCH) {
        Stretch<T> stretch{p, b, h, first, std::min(STRETCH, p.steps() - first)};
        stretch.queries(q, 0, p.key);
        stretch.keys(k, 0, p.key);
        stretch.gradients(o_grad, gradient, column, width);
        stretch.begins(begins);
        if (p.log_decay) {
            stretch.decays(decay, 0, p.key, 1);
            walk_backwards<Decay::rows, Read::after_writing>(walk, begins, 0, stretch.count);
        } else {
            walk_backwards<Decay::none, Read::after_writing>(walk, begins, 0, stretch.count);
        }
        for (int64_t i = 0; i < stretch.count; i++) {
            int64_t token = first + i - p.shift();
            if (token < 0) continue;
            int64_t place = ((b * p.time + token) * p.heads + h) * p.value + column;
            if (p.bonus) {
                Vec<W> own = broadcast<Vec<W>>(stretch.own_weight(token));
                for_each_vector<T>(width, [&](int64_t c, auto load, auto) {
                    store(out[i] + c, fma(own, load(o_grad + place + c), seqzoo::load(out[i] + c)));
                });
            }
            store_row(out[i], width, to.v + place);
        }
    }
}

// Gradients of queries, keys, decays, bonus and first state for one tile of key channels of a group's heads.
//
// The gradient of g_t is D_t = e^{g_t} sum_v S_{t-1} dS_t. Every ANCHOR steps it is computed like this; between, from
// D_t = D_{t+1} + q_t dq'_t - k_t dk'_t, where ' leaves the token's own pair out: what cancels there is small.
template <class T>
void keys_backward(const Problem<T>& p, int64_t b, int64_t group, int64_t column, const T* o_grad,
                   const Wide<T>* last_grad, const Gradients<T>& to) {
    using W = Wide<T>;
    using V = Vec<W>;
    int64_t width = std::min(TILE<W>, p.key - column), values = padded<W>(p.value), shared = p.heads / p.groups;
    int64_t length = std::min(STRETCH, p.steps()), stretches = (p.steps() + STRETCH - 1) / STRETCH;
    int64_t size = p.value * TILE<W>;
    W* memory =
        workspace<0, W>(length * (8 * TILE<W> + 2 * values) + size * (shared * (stretches + 1) + STRETCH / ANCHOR + 2) +
                                  shared * TILE<W>);
    auto take = [&](int64_t stride) {
        Rows<W> rows{memory, stride};
        memory += length * stride;
        return rows;
    };
    Rows<W> q = take(TILE<W>), k = take(TILE<W>), decay = take(TILE<W>), later = take(TILE<W>), dq = take(TILE<W>),
            dk = take(TILE<W>), q_total = take(TILE<W>), k_total = take(TILE<W>), v = take(values),
            gradient = take(values);
    auto take_states = [&](int64_t count) {
        W* first = memory;
        memory += count * size;
        return first;
    };
    W *entering = take_states(shared * stretches), *future = take_states(shared),
      *anchors = take_states(STRETCH / ANCHOR + 1), *state = take_states(1), *changes = memory;
    bool begins[STRETCH];

    for (int64_t n = 0; n < shared; n++) {
        int64_t h = group * shared + n, at = (b * p.heads + h) * p.key * p.value;
        load_transposed(last_grad + at, p.value, column, width, future + n * size);
        load_transposed(p.state ? p.state + at : nullptr, p.value, column, width, state);
        for (int64_t i = 0; i < stretches; i++) {
            std::copy_n(state, size, entering + (n * stretches + i) * size);
            if (i + 1 == stretches) break;
            Stretch<T> stretch{p, b, h, i * STRETCH, STRETCH};
            stretch.keys(k, column, width);
            stretch.values(v, 0, p.value);
            stretch.decays(decay, column, width, 0);
            stretch.begins(begins);
            walk_forwards<Decay::columns, Read::never>(Walk<W>{state, p.value, decay, v, k, v, dq}, begins, 0, STRETCH);
        }
    }

    for (int64_t i = stretches - 1; i >= 0; i--) {
        int64_t first = i * STRETCH, count = std::min(STRETCH, p.steps() - first);
        // What the gradient of the last state adds has not decayed at the last step: so that step stands alone.
        std::vector<int64_t> spans;
        for (int64_t step = 0; step < count; step += ANCHOR) spans.push_back(step);
        if (i + 1 == stretches && spans.back() < count - 1) spans.push_back(count - 1);
        spans.push_back(count);
        for (int64_t n = 0; n < shared; n++) {
            int64_t h = group * shared + n;
            Stretch<T> stretch{p, b, h, first, count};
            stretch.queries(q, column, width);
            stretch.keys(k, column, width);
            stretch.values(v, 0, p.value);
            stretch.gradients(o_grad, gradient, 0, p.value);
            stretch.decays(decay, column, width, 0);
            stretch.decays(later, column, width, 1);
            stretch.begins(begins);

            Walk<W> past{entering + (n * stretches + i) * size, p.value, decay, v, k, gradient, dq};
            for (size_t m = 0; m + 1 < spans.size(); m++) {
                std::copy_n(past.state, size, anchors + m * size);
                walk_forwards<Decay::columns, Read::before_writing>(past, begins, spans[m], spans[m + 1]);
            }

            Walk<W> ahead{future + n * size, p.value, later, gradient, q, v, dk};
            W* change = changes + n * TILE<W>;
            auto overlap = [&](const W* past_state) {
                for (int64_t c = 0; c < TILE<W>; c += LANES<W>) {
                    V total{};
                    for (int64_t r = 0; r < p.value; r++) {
                        total = fma(load(past_state + r * TILE<W> + c), load(ahead.state + r * TILE<W> + c), total);
                    }
                    store(change + c, total);
                }
            };
            for (size_t m = spans.size() - 1; m-- > 0;) {
                int64_t step = spans[m], end = spans[m + 1];
                walk_backwards<Decay::columns, Read::before_writing>(ahead, begins, step, end);
                for (int64_t t = end - 1; t >= step; t--) {
                    int64_t token = first + t - p.shift();
                    if (begins[t]) {
                        std::fill_n(change, TILE<W>, W(0));
                    } else if (t == step) {
                        overlap(anchors + m * size);
                        for (int64_t c = 0; c < TILE<W>; c += LANES<W>) {
                            store(change + c, load(change + c) * load(decay[t] + c));
                        }
                    } else {
                        for (int64_t c = 0; c < TILE<W>; c += LANES<W>) {
                            V difference = load(q[t] + c) * load(dq[t] + c) - load(k[t] + c) * load(dk[t] + c);
                            store(change + c, load(change + c) + difference);
                        }
                    }
                    if (token >= 0 && p.log_decay) {
                        store_row(change, width, to.log_decay + ((b * p.time + token) * p.heads + h) * p.key + column);
                    }
                }
            }

            for (int64_t t = 0; t < count; t++) {
                V own = broadcast<V>(dot(v[t], gradient[t], values));
                for (int64_t c = 0; c < TILE<W>; c += LANES<W>) {
                    V q_part = fma(own, load(k[t] + c), load(dq[t] + c));
                    V k_part = fma(own, load(q[t] + c), load(dk[t] + c));
                    store(q_total[t] + c, n ? q_part + load(q_total[t] + c) : q_part);
                    store(k_total[t] + c, n ? k_part + load(k_total[t] + c) : k_part);
                }
            }
            if (!p.bonus) continue;
            for (int64_t t = 0; t < count; t++) {
                int64_t reader = first + t, writer = reader - 1;
                const W* u = p.bonus + h * p.key + column;
                W* u_grad = to.bonus + (b * p.heads + h) * p.key + column;
                if (reader < p.time) {
                    V own = broadcast<V>(stretch.own_gradient(o_grad, reader));
                    const T *query = p.q + stretch.at_key(reader) + column, *key = p.k + stretch.at_key(reader) + column;
                    for_each_vector<T>(width, [&](int64_t c, auto load, auto store) {
                        V product = own * load(key + c);
                        store(q_total[t] + c, fma(product, load(u + c), load(q_total[t] + c)));
                        store(u_grad + c, fma(product, load(query + c), load(u_grad + c)));
                    });
                }
                if (writer >= 0) {
                    V own = broadcast<V>(stretch.own_gradient(o_grad, writer));
                    const T* query = p.q + stretch.at_key(writer) + column;
                    for_each_vector<T>(width, [&](int64_t c, auto load, auto store) {
                        store(k_total[t] + c, fma(own * load(query + c), load(u + c), load(k_total[t] + c)));
                    });
                }
            }
        }
        for (int64_t t = 0; t < count; t++) {
            int64_t token = first + t;
            if (token < p.time) store_row(q_total[t], width, to.q + ((b * p.time + token) * p.groups + group) * p.key + column);
            token -= p.shift();
            if (token >= 0) store_row(k_total[t], width, to.k + ((b * p.time + token) * p.groups + group) * p.key + column);
        }
    }
    for (int64_t n = 0; n < shared; n++) {
        int64_t h = group * shared + n;
        W* tile = future + n * size;
        Stretch<T> stretch{p, b, h, -1, 1};
        stretch.decays(later, column, width, 1);
        for (int64_t r = 0; r < p.value; r++) {
            for (int64_t c = 0; c < TILE<W>; c++) tile[r * TILE<W> + c] *= later[0][c];
        }
        store_transposed(tile, p.value, column, width, to.state + (b * p.heads + h) * p.key * p.value);
    }
}

template <class T>
void walk_forward(int64_t threads, const Problem<T>& p, T* o, Wide<T>* last) {
    using W = Wide<T>;
    int64_t tiles = padded<W>(p.value) / TILE<W>;
    parallel_for(int(threads), p.batch * p.heads * tiles, [&](int64_t index) {
        int64_t h = index / tiles % p.heads;
        forward_tile(p, index / tiles / p.heads, h, index % tiles * TILE<W>, o, last);
    });
}

// The gradients of decays are [batch, time, head, key] even where a head has one decay for all; those of the bonus
// [batch, head, key], zeros on entry.
template <class T>
void walk_backward(int64_t threads, const Problem<T>& p, const T* o_grad, const Wide<T>* last_grad,
                   const Gradients<T>& to) {
    using W = Wide<T>;
    int64_t key_tiles = padded<W>(p.key) / TILE<W>, value_tiles = padded<W>(p.value) / TILE<W>;
    int64_t key_work = p.batch * p.groups * key_tiles, value_work = p.batch * p.heads * value_tiles;
    parallel_for(int(threads), key_work + value_work, [&](int64_t index) {
        if (index < key_work) {
            int64_t tile = index % key_tiles, group = index / key_tiles % p.groups;
            keys_backward(p, index / key_tiles / p.groups, group, tile * TILE<W>, o_grad, last_grad, to);
        } else {
            index -= key_work;
            int64_t tile = index % value_tiles, h = index / value_tiles % p.heads;
            values_backward(p, index / value_tiles / p.heads, h, tile * TILE<W>, o_grad, last_grad, to);
        }
    });
}

}  // namespace linear_attention
