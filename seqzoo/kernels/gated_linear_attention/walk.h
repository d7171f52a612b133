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
// Weights of writes and the skip are known forwards only: backwards all that has them goes by chunks.
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
constexpr int TILE = VECTOR_REGISTERS == 32 ? 4 : 2;
// Steps whose operands are loaded at once, and steps between two states that the backward multiplies with gradients.
constexpr int64_t STRETCH = 64, ANCHOR = 16;

enum class Decay { none, rows, columns };
enum class Read { never, before_writing, after_writing };

// One row a step, padded with zeros to whole vectors.
template <class W>
struct Rows {
    W* data;
    int64_t stride;
    W* operator[](int64_t step) const { return data + step * stride; }
    Rows from(int64_t column) const { return {data + column, stride}; }
};

// The same of every head of a block, with room for one step more than a stretch has.
template <class W>
struct Operand {
    W* data;
    int64_t stride;
    Rows<W> operator[](int64_t head) const { return {data + head * (STRETCH + 1) * stride, stride}; }
};

// The tiles of `size` columns that the part `part` of `parts` takes; one that begins at `column` has its state, a row
// of `vectors` vectors after the other, from column * rows on.
struct Tiles {
    int64_t part, parts;

    // body(column, numbers that are not padding, vectors)
    template <class W, class Body>
    void each(int64_t size, Body body) const {
        constexpr int64_t WIDTH = TILE * LANES<W>;
        for (int64_t column = part * WIDTH; column < size; column += parts * WIDTH) {
            int64_t width = std::min(WIDTH, size - column);
            body(column, width, int(padded<W>(width) / LANES<W>));
        }
    }
};

// Step by step along one stretch: how one tile of a state reads and writes.
template <class W>
struct Walk {
    W* state;
    int64_t rows;
    Rows<W> decay, write_row, write_column, read, out;
};

template <int STEPS, int VECTORS, Decay DECAY, Read READ, class W>
SEQZOO_INLINE void walk_block(const Walk<W>& walk, int64_t first, int64_t direction) {
    using V = Vec<W>;
    V out[STEPS][VECTORS], column[STEPS][VECTORS];
    const W *decay[STEPS], *write[STEPS], *read[STEPS];
    SEQZOO_UNROLL
    for (int t = 0; t < STEPS; t++) {
        int64_t step = first + t * direction;
        decay[t] = DECAY == Decay::none ? nullptr : walk.decay[step];
        write[t] = walk.write_row[step];
        read[t] = READ == Read::never ? nullptr : walk.read[step];
        SEQZOO_UNROLL
        for (int j = 0; j < VECTORS; j++) {
            out[t][j] = V{};
            column[t][j] = load(walk.write_column[step] + j * LANES<W>);
        }
    }
    W* state = walk.state;
    for (int64_t row = 0; row < walk.rows; row++, state += VECTORS * LANES<W>) {
        V s[VECTORS];
        SEQZOO_UNROLL
        for (int j = 0; j < VECTORS; j++) s[j] = load(state + j * LANES<W>);
        SEQZOO_UNROLL
        for (int t = 0; t < STEPS; t++) {
            V written = broadcast<V>(write[t][row]);
            V reading = READ == Read::never ? V{} : broadcast<V>(read[t][row]);
            V kept = DECAY == Decay::rows ? broadcast<V>(decay[t][row]) : V{};
            SEQZOO_UNROLL
            for (int j = 0; j < VECTORS; j++) {
                if constexpr (DECAY == Decay::rows) s[j] *= kept;
                if constexpr (DECAY == Decay::columns) s[j] *= load(decay[t] + j * LANES<W>);
                if constexpr (READ == Read::before_writing) out[t][j] = fma(reading, s[j], out[t][j]);
                s[j] = fma(written, column[t][j], s[j]);
                if constexpr (READ == Read::after_writing) out[t][j] = fma(reading, s[j], out[t][j]);
            }
        }
        SEQZOO_UNROLL
        for (int j = 0; j < VECTORS; j++) store(state + j * LANES<W>, s[j]);
    }
    if constexpr (READ != Read::never) {
        SEQZOO_UNROLL
        for (int t = 0; t < STEPS; t++) {
            SEQZOO_UNROLL
            for (int j = 0; j < VECTORS; j++) store(walk.out[first + t * direction] + j * LANES<W>, out[t][j]);
        }
    }
}

// Steps from, from + 1, ..., to - 1; a step that begins a document forgets the state first. Or, backwards, steps
// to - 1, to - 2, ..., from; a step that begins a document forgets the gradient after it.
template <int VECTORS, Decay DECAY, Read READ, class W>
__attribute__((noinline)) void walk_tile(const Walk<W>& walk, const bool* begins, int64_t from, int64_t to,
                                         bool backwards) {
    auto forget = [&] { std::fill_n(walk.state, walk.rows * VECTORS * LANES<W>, W(0)); };
    while (from < to) {
        if (!backwards) {
            if (begins[from]) forget();
            if (from + 1 < to && !begins[from + 1]) {
                walk_block<2, VECTORS, DECAY, READ>(walk, from, 1);
                from += 2;
            } else {
                walk_block<1, VECTORS, DECAY, READ>(walk, from, 1);
                from += 1;
            }
        } else {
            if (to - 1 > from && !begins[to - 1]) {
                walk_block<2, VECTORS, DECAY, READ>(walk, to - 1, -1);
                to -= 2;
            } else {
                walk_block<1, VECTORS, DECAY, READ>(walk, to - 1, -1);
                to -= 1;
            }
            if (begins[to]) forget();
        }
    }
}

template <Decay DECAY, Read READ, class W>
void walk_along(const Walk<W>& walk, int vectors, const bool* begins, int64_t from, int64_t to,
                bool backwards = false) {
    if (vectors == 1) return walk_tile<1, DECAY, READ>(walk, begins, from, to, backwards);
    if (vectors == 2) return walk_tile<2, DECAY, READ>(walk, begins, from, to, backwards);
    if constexpr (TILE == 4) {
        if (vectors == 3) return walk_tile<3, DECAY, READ>(walk, begins, from, to, backwards);
        return walk_tile<4, DECAY, READ>(walk, begins, from, to, backwards);
    }
}

// Some heads of one batch row, `count` of them from `first` on, and their operands of one stretch at a time. A token's
// heads lie beside each other in memory, so they are loaded and stored together.
template <class T>
struct Heads {
    using W = Wide<T>;
    const Problem<T>& p;
    int64_t b, first, count;
    Tiles tiles;

    int64_t at_key(int64_t token, int64_t n) const {
        int64_t group = (first + n) / (p.heads / p.groups);
        return ((b * p.time + token) * p.groups + group) * p.key;
    }
    int64_t at_value(int64_t token, int64_t n) const { return ((b * p.time + token) * p.heads + first + n) * p.value; }

    // Keys and values are written, queries and gradients of outputs are read with.
    void load_keys(const T* from, bool written, int64_t step, int64_t steps, const Operand<W>& to) const {
        load(written, step, steps, to,
             [&](int64_t token, int64_t n, W* row) { copy_padded(p.key, from + at_key(token, n), to.stride, row); });
    }
    void load_values(const T* from, bool written, int64_t step, int64_t steps, const Operand<W>& to) const {
        load(written, step, steps, to,
             [&](int64_t t, int64_t n, W* row) { copy_padded(p.value, from + at_value(t, n), to.stride, row); });
        if (!written || !p.write) return;
        for (int64_t i = 0; i < steps; i++) {
            for (int64_t n = 0; n < count; n++) scaled(p.value, p.weight(b, step + i, first + n), to[n][i], to[n][i]);
        }
    }
    // e^g of each step, and of the one after the last.
    void load_decays(int64_t step, int64_t steps, const Operand<W>& to) const {
        for (int64_t i = 0; i <= steps; i++) {
            int64_t token = step + i - p.shift();
            for (int64_t n = 0; n < count; n++) {
                W* row = to[n][i];
                int64_t at = (b * p.time + token) * p.heads + first + n;
                if (token < 0 || token >= p.time || !p.log_decay) {
                    std::fill_n(row, to.stride, W(1));
                } else if (!p.per_channel) {
                    std::fill_n(row, to.stride, exp(broadcast<Vec<W>>(p.log_decay[at]))[0]);
                } else {
                    copy_padded(p.key, p.log_decay + at * p.key, to.stride, row);
                    for (int64_t c = 0; c < to.stride; c += LANES<W>) store(row + c, exp(seqzoo::load(row + c)));
                }
            }
        }
    }
    void load_begins(int64_t step, int64_t steps, bool* to) const {
        for (int64_t i = 0; i < steps; i++) to[i] = p.begins(b, step + i);
    }

    // What the bonus adds to a token's own pair: q . (u k).
    W own_weight(int64_t token, int64_t n) const {
        const T *q = p.q + at_key(token, n), *k = p.k + at_key(token, n);
        const W* u = p.bonus + (first + n) * p.key;
        Vec<W> total{};
        for_each_vector<T>(
            p.key, [&](int64_t c, auto load, auto) { total = fma(load(q + c) * load(k + c), load(u + c), total); });
        return sum(total);
    }
    // The product of a token's value with the gradient of its output.
    W own_gradient(const T* o_grad, int64_t token, int64_t n) const {
        return dot(p.value, p.v + at_value(token, n), o_grad + at_value(token, n));
    }

 private:
    template <class Load>
    void load(bool written, int64_t step, int64_t steps, const Operand<W>& to, Load load) const {
        for (int64_t i = 0; i < steps; i++) {
            int64_t token = step + i - (written ? p.shift() : 0);
            bool there = written ? token >= 0 : p.reads(b, token);
            for (int64_t n = 0; n < count; n++) {
                if (there) {
                    load(token, n, to[n][i]);
                } else {
                    std::fill_n(to[n][i], to.stride, W(0));
                }
            }
        }
    }
};

// One tile of a state [rows, columns]; null is zero.
template <class W>
void load_tile(const W* from, int64_t rows, int64_t columns, int64_t column, int64_t width, W* to) {
    int64_t stride = padded<W>(width);
    if (!from) return void(std::fill_n(to, rows * stride, W(0)));
    for (int64_t r = 0; r < rows; r++) copy_padded(width, from + r * columns + column, stride, to + r * stride);
}

template <class W>
void store_tile(const W* from, int64_t rows, int64_t columns, int64_t column, int64_t width, W* to) {
    for (int64_t r = 0; r < rows; r++) copy_row(width, from + r * padded<W>(width), to + r * columns + column);
}

// One tile of the transpose of a state [columns, rows].
template <class W>
void load_transposed(const W* from, int64_t rows, int64_t column, int64_t width, W* to) {
    int64_t stride = padded<W>(width);
    std::fill_n(to, rows * stride, W(0));
    if (!from) return;
    for (int64_t c = 0; c < width; c++) {
        for (int64_t r = 0; r < rows; r++) to[r * stride + c] = from[(column + c) * rows + r];
    }
}

template <class W>
void store_transposed(const W* from, int64_t rows, int64_t column, int64_t width, W* to) {
    for (int64_t c = 0; c < width; c++) {
        for (int64_t r = 0; r < rows; r++) to[(column + c) * rows + r] = from[r * padded<W>(width) + c];
    }
}

// Memory handed out piece by piece.
template <class W>
struct Arena {
    W* next;

    W* take(int64_t count) {
        W* first = next;
        next += count;
        return first;
    }
    Operand<W> operand(int64_t heads, int64_t stride) { return {take(heads * (STRETCH + 1) * stride), stride}; }
};

template <class T>
void forward_heads(const Heads<T>& heads, T* o, Wide<T>* last, Wide<T>* kept) {
    using W = Wide<T>;
    const Problem<T>& p = heads.p;
    int64_t count = heads.count, keys = padded<W>(p.key), values = padded<W>(p.value), size = p.key * values;
    Arena<W> arena{workspace<0, W>(count * ((STRETCH + 1) * (3 * keys + 2 * values) + size))};
    Operand<W> q = arena.operand(count, keys), k = arena.operand(count, keys), decay = arena.operand(count, keys),
               v = arena.operand(count, values), out = arena.operand(count, values);
    W* states = arena.take(count * size);
    bool begins[STRETCH];
    auto each_tile = [&](auto body) {
        for (int64_t n = 0; n < count; n++) {
            heads.tiles.template each<W>(p.value, [&](int64_t column, int64_t width, int vectors) {
                body(n, column, width, vectors, states + n * size + column * p.key);
            });
        }
    };
    auto store_states = [&](W* to) {
        each_tile([&](int64_t n, int64_t column, int64_t width, int, W* state) {
            store_tile(state, p.key, p.value, column, width, to + (heads.first + n) * p.key * p.value);
        });
    };
    each_tile([&](int64_t n, int64_t column, int64_t width, int, W* state) {
        const W* from = p.state ? p.state + (heads.b * p.heads + heads.first + n) * p.key * p.value : nullptr;
        load_tile(from, p.key, p.value, column, width, state);
    });
    for (int64_t first = 0; first < p.steps(); first += STRETCH) {
        int64_t steps = std::min(STRETCH, p.steps() - first);
        if (kept && first && first % SPAN == 0) store_states(kept + p.at_kept(heads.b, first));
        heads.load_keys(p.q, false, first, steps, q);
        heads.load_keys(p.k, true, first, steps, k);
        heads.load_values(p.v, true, first, steps, v);
        if (p.log_decay) heads.load_decays(first, steps, decay);
        heads.load_begins(first, steps, begins);
        each_tile([&](int64_t n, int64_t column, int64_t, int vectors, W* state) {
            Walk<W> walk{state, p.key, decay[n], k[n], v[n].from(column), q[n], out[n].from(column)};
            if (p.log_decay) {
                walk_along<Decay::rows, Read::after_writing>(walk, vectors, begins, 0, steps);
            } else {
                walk_along<Decay::none, Read::after_writing>(walk, vectors, begins, 0, steps);
            }
        });
        for (int64_t i = 0; i < steps && first + i < p.time; i++) {
            each_tile([&](int64_t n, int64_t column, int64_t width, int, W*) {
                int64_t place = heads.at_value(first + i, n) + column;
                W* row = out[n][i] + column;
                if (p.bonus) add_scaled(width, heads.own_weight(first + i, n), p.v + place, row);
                if (p.skip) add_scaled(width, p.skip[heads.first + n], p.v + place, row);
                copy_row(width, row, o + place);
            });
        }
    }
    store_states(last + heads.b * p.heads * p.key * p.value);
}

// All gradients of some heads, which are all heads of some groups.
//
// The gradient of g_t is D_t = e^{g_t} sum_v S_{t-1} dS_t. At a few steps it is computed like this; between, from
// D_t = D_{t+1} + q_t dq'_t - k_t dk'_t, where ' leaves the token's own pair out: what cancels there is small.
template <class T>
void backward_heads(const Heads<T>& heads, const T* o_grad, const Wide<T>* last_grad, const Wide<T>* kept,
                    const Gradients<T>& to) {
    using W = Wide<T>;
    using V = Vec<W>;
    const Problem<T>& p = heads.p;
    int64_t count = heads.count, shared = p.heads / p.groups;
    int64_t keys = padded<W>(p.key), values = padded<W>(p.value), size = p.value * keys;
    constexpr int64_t STRETCHES = SPAN / STRETCH, ANCHORS = STRETCH / ANCHOR + 1;
    int64_t saved = std::min(STRETCHES, (p.steps() + STRETCH - 1) / STRETCH);
    Arena<W> arena{
        workspace<0, W>(count * ((STRETCH + 1) * (6 * keys + 3 * values) + size * (saved + 1) + p.key * values + keys) +
                        size * ANCHORS)};
    Operand<W> q = arena.operand(count, keys), k = arena.operand(count, keys), decay = arena.operand(count, keys),
               dq = arena.operand(count, keys), dk = arena.operand(count, keys), change = arena.operand(count, keys),
               v = arena.operand(count, values), gradient = arena.operand(count, values),
               dv = arena.operand(count, values);
    // [stretch][head][value][key], [head][value][key], [head][key][value]
    W *past = arena.take(saved * count * size), *future = arena.take(count * size),
      *future_columns = arena.take(count * p.key * values);
    // D of the first step after the stretch, [head][key]; states at the anchors of one head
    W *changes = arena.take(count * keys), *anchors = arena.take(size * ANCHORS);
    bool begins[STRETCH];

    for (int64_t n = 0; n < count; n++) {
        const W* from = last_grad ? last_grad + (heads.b * p.heads + heads.first + n) * p.key * p.value : nullptr;
        heads.tiles.template each<W>(p.key, [&](int64_t column, int64_t width, int) {
            load_transposed(from, p.value, column, width, future + n * size + column * p.value);
        });
        heads.tiles.template each<W>(p.value, [&](int64_t column, int64_t width, int) {
            load_tile(from, p.key, p.value, column, width, future_columns + n * p.key * values + column * p.key);
        });
    }

    for (int64_t span = (p.steps() - 1) / SPAN * SPAN; span >= 0; span -= SPAN) {
        int64_t span_end = std::min(span + SPAN, p.steps());
        const W* entering = span ? kept + p.at_kept(heads.b, span) : p.state;
        if (!span && entering) entering += heads.b * p.heads * p.key * p.value;
        for (int64_t first = span; first < span_end; first += STRETCH) {
            W* states = past + (first - span) / STRETCH * count * size;
            if (first + STRETCH < span_end) {
                heads.load_keys(p.k, true, first, STRETCH, k);
                heads.load_values(p.v, true, first, STRETCH, v);
                heads.load_decays(first, STRETCH, decay);
                heads.load_begins(first, STRETCH, begins);
            }
            for (int64_t n = 0; n < count; n++) {
                heads.tiles.template each<W>(p.key, [&](int64_t column, int64_t width, int vectors) {
                    W* state = states + n * size + column * p.value;
                    if (first == span) {
                        const W* from = entering ? entering + (heads.first + n) * p.key * p.value : nullptr;
                        load_transposed(from, p.value, column, width, state);
                    }
                    if (first + STRETCH >= span_end) return;
                    W* next = state + count * size;
                    std::copy_n(state, p.value * vectors * LANES<W>, next);
                    Walk<W> walk{next, p.value, decay[n].from(column), v[n], k[n].from(column), v[n], v[n]};
                    walk_along<Decay::columns, Read::never>(walk, vectors, begins, 0, STRETCH);
                });
            }
        }

        for (int64_t first = (span_end - 1) / STRETCH * STRETCH; first >= span; first -= STRETCH) {
            int64_t steps = std::min(STRETCH, p.steps() - first);
            bool ends = first + steps == p.steps();
            heads.load_keys(p.q, false, first, steps, q);
            heads.load_keys(p.k, true, first, steps, k);
            heads.load_values(p.v, true, first, steps, v);
            heads.load_values(o_grad, false, first, steps, gradient);
            heads.load_decays(first, steps, decay);
            heads.load_begins(first, steps, begins);
            // What the gradient of the last state adds has not decayed at the last step: so that step stands alone.
            int64_t marks[ANCHORS + 1], spans = 0;
            for (int64_t step = 0; step < steps; step += ANCHOR) marks[spans++] = step;
            if (ends && marks[spans - 1] < steps - 1) marks[spans++] = steps - 1;
            marks[spans] = steps;

            for (int64_t n = 0; n < count; n++) {
                Rows<W> later{decay[n][1], keys};
                heads.tiles.template each<W>(p.value, [&](int64_t column, int64_t, int vectors) {
                    Walk<W> walk{future_columns + n * p.key * values + column * p.key,
                                 p.key,
                                 later,
                                 q[n],
                                 gradient[n].from(column),
                                 k[n],
                                 dv[n].from(column)};
                    if (p.log_decay) {
                        walk_along<Decay::rows, Read::after_writing>(walk, vectors, begins, 0, steps, true);
                    } else {
                        walk_along<Decay::none, Read::after_writing>(walk, vectors, begins, 0, steps, true);
                    }
                });
                heads.tiles.template each<W>(p.key, [&](int64_t column, int64_t, int vectors) {
                    int64_t width = vectors * LANES<W>, tile = p.value * width;
                    W* before = past + ((first - span) / STRETCH * count + n) * size + column * p.value;
                    W *after = future + n * size + column * p.value, *running = changes + n * keys + column;
                    Walk<W> reads{before,      p.value,           decay[n].from(column), v[n], k[n].from(column),
                                  gradient[n], dq[n].from(column)};
                    for (int64_t m = 0; m < spans; m++) {
                        std::copy_n(before, tile, anchors + m * tile);
                        walk_along<Decay::columns, Read::before_writing>(reads, vectors, begins, marks[m],
                                                                         marks[m + 1]);
                    }
                    Walk<W> writes{after, p.value,           later.from(column), gradient[n], q[n].from(column),
                                   v[n],  dk[n].from(column)};
                    for (int64_t m = spans - 1; m >= 0; m--) {
                        walk_along<Decay::columns, Read::before_writing>(writes, vectors, begins, marks[m],
                                                                         marks[m + 1], true);
                        if (!p.log_decay) continue;
                        for (int64_t c = 0; c < width; c += LANES<W>) {
                            V total = load(running + c);
                            for (int64_t t = marks[m + 1] - 1; t > marks[m]; t--) {
                                V read = load(q[n][t] + column + c) * load(dq[n][t] + column + c);
                                V written = load(k[n][t] + column + c) * load(dk[n][t] + column + c);
                                total = begins[t] ? V{} : total + (read - written);
                                store(change[n][t] + column + c, total);
                            }
                            total = V{};
                            for (int64_t r = 0; r < p.value && !begins[marks[m]]; r++) {
                                total =
                                    fma(load(anchors + m * tile + r * width + c), load(after + r * width + c), total);
                            }
                            total *= load(decay[n][marks[m]] + column + c);
                            store(change[n][marks[m]] + column + c, total);
                            store(running + c, total);
                        }
                    }
                });
            }

            for (int64_t i = 0; i < steps; i++) {
                int64_t reader = first + i, writer = reader - p.shift();
                for (int64_t n = 0; n < count; n++) {
                    // Sums over the heads of a group gather in its first head.
                    int64_t main = n / shared * shared;
                    V own = broadcast<V>(dot(values, v[n][i], gradient[n][i]));
                    W read_own = 0, written_own = 0;
                    if (p.bonus && reader < p.time) read_own = heads.own_gradient(o_grad, reader, n);
                    if (p.bonus && writer >= 0) written_own = heads.own_gradient(o_grad, writer, n);
                    heads.tiles.template each<W>(p.key, [&](int64_t column, int64_t width, int) {
                        const W *query = q[n][i] + column, *key = k[n][i] + column;
                        W *to_q = dq[n][i] + column, *to_k = dk[n][i] + column;
                        for (int64_t c = 0; c < width; c += LANES<W>) {
                            store(to_q + c, fma(own, load(key + c), load(to_q + c)));
                            store(to_k + c, fma(own, load(query + c), load(to_k + c)));
                        }
                        const W* u = p.bonus + (heads.first + n) * p.key + column;
                        if (p.bonus && reader < p.time) {
                            const T* own_q = p.q + heads.at_key(reader, n) + column;
                            const T* own_k = p.k + heads.at_key(reader, n) + column;
                            W* to_u = to.bonus + (heads.b * p.heads + heads.first + n) * p.key + column;
                            for_each_vector<T>(width, [&](int64_t c, auto load, auto store) {
                                V product = read_own * load(own_k + c);
                                store(to_q + c, fma(product, load(u + c), load(to_q + c)));
                                store(to_u + c, fma(product, load(own_q + c), load(to_u + c)));
                            });
                        }
                        if (p.bonus && writer >= 0) {
                            const T* own_q = p.q + heads.at_key(writer, n) + column;
                            for_each_vector<T>(width, [&](int64_t c, auto load, auto store) {
                                store(to_k + c, fma(written_own * load(own_q + c), load(u + c), load(to_k + c)));
                            });
                        }
                        for (int64_t c = 0; n != main && c < width; c += LANES<W>) {
                            W *sum_q = dq[main][i] + column + c, *sum_k = dk[main][i] + column + c;
                            store(sum_q, load(sum_q) + load(to_q + c));
                            store(sum_k, load(sum_k) + load(to_k + c));
                        }
                        bool complete = n + 1 == main + shared;
                        if (complete && reader < p.time) {
                            copy_row(width, dq[main][i] + column, to.q + heads.at_key(reader, n) + column);
                        }
                        if (complete && writer >= 0) {
                            copy_row(width, dk[main][i] + column, to.k + heads.at_key(writer, n) + column);
                        }
                        if (p.log_decay && writer >= 0) {
                            int64_t place = ((heads.b * p.time + writer) * p.heads + heads.first + n) * p.key + column;
                            copy_row(width, change[n][i] + column, to.log_decay + place);
                        }
                    });
                    if (writer < 0) continue;
                    W weight = p.bonus ? heads.own_weight(writer, n) : W(0);
                    heads.tiles.template each<W>(p.value, [&](int64_t column, int64_t width, int) {
                        int64_t place = heads.at_value(writer, n) + column;
                        W* row = dv[n][i] + column;
                        if (p.bonus) add_scaled(width, weight, o_grad + place, row);
                        copy_row(width, row, to.v + place);
                    });
                }
            }
        }
    }

    heads.load_decays(0, 0, decay);
    for (int64_t n = 0; n < count; n++) {
        heads.tiles.template each<W>(p.key, [&](int64_t column, int64_t width, int vectors) {
            W* tile = future + n * size + column * p.value;
            for (int64_t r = 0; r < p.value; r++) {
                for (int64_t c = 0; c < vectors * LANES<W>; c += LANES<W>) {
                    W* at = tile + r * vectors * LANES<W> + c;
                    store(at, load(at) * load(decay[n][0] + column + c));
                }
            }
            store_transposed(tile, p.value, column, width,
                             to.state + (heads.b * p.heads + heads.first + n) * p.key * p.value);
        });
    }
}

// One token of one head: the state is read from where it stands and written to its new place, without tiles.
template <class T>
void step_head(const Problem<T>& p, int64_t b, int64_t h, T* o, Wide<T>* last) {
    using W = Wide<T>;
    using V = Vec<W>;
    Heads<T> head{p, b, h, 1, {}};
    int64_t place = (b * p.heads + h) * p.key * p.value;
    const W* state = p.state && !p.begins(b, p.shift()) ? p.state + place : nullptr;
    const T *q = p.q + head.at_key(0, 0), *k = p.k + head.at_key(0, 0), *v = p.v + head.at_value(0, 0);
    W* decay = workspace<0, W>(padded<W>(p.key));
    head.load_decays(p.shift(), 0, {decay, padded<W>(p.key)});
    V own = broadcast<V>(p.bonus ? head.own_weight(0, 0) : p.skip ? p.skip[h] : W(0));
    V weight = broadcast<V>(p.weight(b, 0, h));
    for (int64_t column = 0; column < p.value; column += TILE * LANES<W>) {
        // Vectors of the tile, a ragged one last: the loops over them vanish, so that they stay in registers.
        auto each = [&](auto body) __attribute__((always_inline)) {
            SEQZOO_UNROLL
            for (int j = 0; j < TILE; j++) {
                int64_t at = column + j * LANES<W>;
                if (at < p.value) body(j, at, p.value - at);
            }
        };
        V out[TILE], written[TILE];
        each([&](int j, int64_t at, int64_t left) __attribute__((always_inline)) {
            written[j] = load_up_to(v + at, left);
            out[j] = own * written[j];
            written[j] *= weight;
        });
        for (int64_t c = 0; c < p.key; c++) {
            V kept = broadcast<V>(decay[c]), key = broadcast<V>(widen(k[c])), query = broadcast<V>(widen(q[c]));
            each([&](int j, int64_t at, int64_t left) __attribute__((always_inline)) {
                V before = state ? load_up_to(state + c * p.value + at, left) : V{};
                V after = fma(kept, before, key * written[j]);
                out[j] = fma(query, p.bonus ? before : after, out[j]);
                store_up_to(last + place + c * p.value + at, after, left);
            });
        }
        each([&](int j, int64_t at, int64_t left)
                 __attribute__((always_inline)) { store_up_to(o + head.at_value(0, 0) + at, out[j], left); });
    }
}

// Call body(heads) for blocks of heads in units of `unit`, a few for each thread; where heads are few, each block is
// cut into tiles of columns as well.
template <class T, class Body>
void for_each_heads(int64_t threads, const Problem<T>& p, int64_t unit, Body body) {
    if (p.batch * p.heads == 0) return;
    int64_t units = p.heads / unit, wanted = std::max<int64_t>(1, (2 * threads + p.batch - 1) / p.batch);
    int64_t each = (units + wanted - 1) / wanted, blocks = (units + each - 1) / each;
    int64_t parts = p.batch * blocks >= threads ? 1 : (threads + p.batch * blocks - 1) / (p.batch * blocks);
    parallel_for(int(threads), p.batch * blocks * parts, [&](int64_t index) {
        int64_t first = index / parts % blocks * each;
        body(Heads<T>{p, index / parts / blocks, first * unit, std::min(each, units - first) * unit,
                      Tiles{index % parts, parts}});
    });
}

template <class T>
void walk_forward(int64_t threads, const Problem<T>& p, T* o, Wide<T>* last, Wide<T>* kept) {
    if (p.time == 1) {
        // Waking a thread takes as long as a hundred thousand numbers.
        threads = std::min(threads, 1 + (p.batch * p.heads * p.key * p.value >> 17));
        return parallel_for(int(threads), p.batch * p.heads,
                            [&](int64_t index) { step_head(p, index / p.heads, index % p.heads, o, last); });
    }
    for_each_heads(threads, p, 1, [&](const Heads<T>& heads) { forward_heads(heads, o, last, kept); });
}

// The gradients of decays are [batch, time, head, key] even where a head has one decay for all; those of the bonus
// [batch, head, key], zeros on entry.
template <class T>
void walk_backward(int64_t threads, const Problem<T>& p, const T* o_grad, const Wide<T>* last_grad, const Wide<T>* kept,
                   const Gradients<T>& to) {
    for_each_heads(threads, p, p.heads / p.groups,
                   [&](const Heads<T>& heads) { backward_heads(heads, o_grad, last_grad, kept, to); });
}

}  // namespace linear_attention
