// Chunk by chunk, as matrix products: one decay a head, or none.
//
// With G the running sum of g inside a chunk, S the state that enters it, D_ij = e^{G_i - G_j} for j <= i, e = e^G and
// w = e^{G_C - G}:
//
//     P = Q K^T,    O = e Q S + (P o D) V,    S' = e^{G_C} S + K^T (w V)
//
// (where writes have weights, V in all this is the weighted one; the skip is added to O)
//
// and backwards, with dS' the gradient of S' and X = dO V^T:
//
//     dV = (P o D)^T dO + w K dS',    dQ = (X o D) K + e dO S^T,    dK = (X o D)^T Q + w V dS'^T,
//     dS = e^{G_C} dS' + Q^T (e dO)
//
// A block of heads of one group goes through time together, so that P is computed once for all of them, and X o D is
// summed over them before it meets K and Q. For bfloat16 inputs the operands of all products are rounded to bfloat16;
// sums, states and decays are float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "gemm.h"
#include "heads.h"
#include "problem.h"

namespace linear_attention {

constexpr int64_t CHUNK = 64;
// Chunks of one span, whose entering states the backward holds at once.
constexpr int64_t CHUNKS = SPAN / CHUNK;

template <class T>
struct Block {
    using W = Wide<T>;
    static constexpr Precision PRECISION = std::is_same_v<T, bfloat16> ? Precision::bf16 : Precision::full;

    const Problem<T>& p;
    int64_t b, group, first_head, count;  // heads [first_head, first_head + count) of a group

    int64_t columns() const { return count * p.value; }
    int64_t chunks() const { return (p.time + CHUNK - 1) / CHUNK; }
    int64_t length(int64_t chunk) const { return std::min(CHUNK, p.time - chunk * CHUNK); }
    int64_t at_key(int64_t token) const { return ((b * p.time + token) * p.groups + group) * p.key; }
    int64_t at_value(int64_t token, int64_t head) const { return ((b * p.time + token) * p.heads + head) * p.value; }
    const W* of_row(const W* states) const { return states ? states + b * p.heads * p.key * p.value : nullptr; }
    W* of_row(W* states) const { return states + b * p.heads * p.key * p.value; }
    Matrix<const T> queries(int64_t token) const { return {p.q + at_key(token), p.groups * p.key}; }
    Matrix<const T> keys(int64_t token) const { return {p.k + at_key(token), p.groups * p.key}; }
    Matrix<const T> rows_of_head(const T* from, int64_t token, int64_t head) const {
        return {from + at_value(token, head), p.heads * p.value};
    }

    template <class A, class B>
    static void multiply(Sizes sizes, Matrix<A> a, Matrix<B> b, Matrix<W> c, bool accumulate = false) {
        gemm<PRECISION>(sizes, a, b, c, W(1), accumulate);
    }

    // The heads' states side by side, [key, columns], from those of all heads of this batch row; null is zero.
    void load_states(const W* from, W* to) const {
        for (int64_t n = 0; n < count; n++) {
            for (int64_t c = 0; c < p.key; c++) {
                W* row = to + c * columns() + n * p.value;
                if (from) {
                    std::copy_n(from + ((first_head + n) * p.key + c) * p.value, p.value, row);
                } else {
                    std::fill_n(row, p.value, W(0));
                }
            }
        }
    }
    void store_states(const W* from, W* to) const {
        for (int64_t n = 0; n < count; n++) {
            for (int64_t c = 0; c < p.key; c++) {
                std::copy_n(from + c * columns() + n * p.value, p.value, to + ((first_head + n) * p.key + c) * p.value);
            }
        }
    }
};

// The decays of one head inside one chunk; nothing passes a document's start.
template <class W>
struct ChunkDecay {
    double total[CHUNK];
    int64_t visible[CHUNK];  // the first token that each one sees
    W from_start[CHUNK], to_end[CHUNK], over;
    int64_t size;
    bool decays;

    template <class T>
    void load(const Problem<T>& p, int64_t b, int64_t head, int64_t token, int64_t count) {
        size = count;
        decays = p.log_decay != nullptr;
        double sum = 0;
        int64_t start = -1;
        for (int64_t i = 0; i < size; i++) {
            // The decay of a first token would act on the document before it.
            if (p.starts && p.starts[b * p.time + token + i]) {
                start = i;
            } else if (decays) {
                sum += std::max(double(p.log_decay[(b * p.time + token + i) * p.heads + head]), STRONGEST);
            }
            total[i] = sum;
            visible[i] = std::max<int64_t>(start, 0);
            from_start[i] = start < 0 ? W(std::exp(sum)) : W(0);
        }
        for (int64_t i = 0; i < size; i++) to_end[i] = i >= start ? W(std::exp(sum - total[i])) : W(0);
        over = start < 0 ? W(std::exp(sum)) : W(0);
    }

    // D, with rows of CHUNK numbers.
    void between(W* to) const {
        alignas(64) W difference[CHUNK];
        for (int64_t i = 0; i < size; i++, to += CHUNK) {
            std::fill_n(to, CHUNK, W(0));
            if (!decays) {
                std::fill(to + visible[i], to + i + 1, W(1));
                continue;
            }
            for (int64_t j = 0; j < CHUNK; j++) difference[j] = j <= i ? W(total[i] - total[j]) : W(0);
            for (int64_t j = visible[i] / LANES<W> * LANES<W>; j <= i; j += LANES<W>) {
                seqzoo::store(to + j, exp(seqzoo::load(difference + j)));
            }
            std::fill(to + visible[i] / LANES<W> * LANES<W>, to + visible[i], W(0));
            std::fill(to + i + 1, to + (i / LANES<W> + 1) * LANES<W>, W(0));
        }
    }
};

// to += factor * from; returns the dot product of `from` with `with`.
template <class W, class T>
W add_row(const W* from, int64_t count, W factor, W* to, const T* with) {
    Vec<W> by = broadcast<Vec<W>>(factor), total{};
    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) {
        Vec<W> x = load(from + i);
        store(to + i, fma(x, by, load(to + i)));
        total = fma(x, load(with + i), total);
    });
    return sum(total);
}

// S' from S, with w V as a by-product that needs [CHUNK, columns].
template <class T>
void advance(const Block<T>& block, int64_t chunk, Wide<T>* states, Wide<T>* weighted) {
    using W = Wide<T>;
    const Problem<T>& p = block.p;
    int64_t token = chunk * CHUNK, size = block.length(chunk), columns = block.columns();
    ChunkDecay<W> decay;
    for (int64_t n = 0; n < block.count; n++) {
        decay.load(p, block.b, block.first_head + n, token, size);
        for (int64_t i = 0; i < size; i++) {
            int64_t head = block.first_head + n;
            scaled(p.value, decay.to_end[i] * p.weight(block.b, token + i, head), p.v + block.at_value(token + i, head),
                   weighted + i * columns + n * p.value);
        }
        if (decay.over == 1) continue;
        for (int64_t c = 0; c < p.key; c++) {
            W* row = states + c * columns + n * p.value;
            scaled(p.value, decay.over, row, row);
        }
    }
    block.multiply({p.key, columns, size}, block.keys(token).transposed(), Matrix{weighted, columns},
                   Matrix{states, columns}, true);
}

template <class W>
void multiply_elements(const W* a, const W* b, int64_t rows, W* to) {
    for (int64_t i = 0; i < rows * CHUNK; i += LANES<W>) store(to + i, load(a + i) * load(b + i));
}

// Column j of a matrix with rows of CHUNK numbers times the weight of what token j writes.
template <class T>
void weigh_columns(const Block<T>& block, int64_t token, int64_t head, int64_t size, Wide<T>* matrix) {
    using W = Wide<T>;
    if (!block.p.write) return;
    alignas(64) W weights[CHUNK] = {};
    for (int64_t j = 0; j < size; j++) weights[j] = block.p.weight(block.b, token + j, head);
    for (int64_t i = 0; i < size; i++) multiply_elements(matrix + i * CHUNK, weights, 1, matrix + i * CHUNK);
}

template <class T>
void forward_block(const Block<T>& block, T* o, Wide<T>* last, Wide<T>* kept) {
    using W = Wide<T>;
    const Problem<T>& p = block.p;
    int64_t columns = block.columns();
    W* states = workspace<0, W>(columns * (p.key + 2 * CHUNK) + 2 * CHUNK * CHUNK);
    W *out = states + columns * p.key, *weighted = out + columns * CHUNK, *products = weighted + columns * CHUNK;
    W* scores = products + CHUNK * CHUNK;
    ChunkDecay<W> decay;
    block.load_states(block.of_row(p.state), states);
    for (int64_t chunk = 0; chunk < block.chunks(); chunk++) {
        int64_t token = chunk * CHUNK, size = block.length(chunk);
        if (kept && chunk && chunk % CHUNKS == 0) block.store_states(states, kept + p.at_kept(block.b, token));
        block.multiply({size, size, p.key}, block.queries(token), block.keys(token).transposed(),
                       Matrix{products, CHUNK});
        block.multiply({size, columns, p.key}, block.queries(token), Matrix{states, columns}, Matrix{out, columns});
        for (int64_t n = 0; n < block.count; n++) {
            int64_t head = block.first_head + n;
            decay.load(p, block.b, head, token, size);
            decay.between(scores);
            multiply_elements(products, scores, size, scores);
            weigh_columns(block, token, head, size, scores);
            W* mine = out + n * p.value;
            for (int64_t i = 0; i < size; i++) {
                scaled(p.value, decay.from_start[i], mine + i * columns, mine + i * columns);
            }
            block.multiply({size, p.value, size}, Matrix{scores, CHUNK}, block.rows_of_head(p.v, token, head),
                           Matrix{mine, columns}, true);
            for (int64_t i = 0; i < size; i++) {
                int64_t place = block.at_value(token + i, head);
                if (p.skip) add_scaled(p.value, p.skip[head], p.v + place, mine + i * columns);
                copy_row(p.value, mine + i * columns, o + place);
            }
        }
        advance(block, chunk, states, weighted);
    }
    block.store_states(states, block.of_row(last));
}

// sum_{i >= t, j < t} W_ij for each t, W lower triangular with rows of CHUNK numbers: what a decay at t takes part in.
template <class W>
void passing(const W* pairs, int64_t size, W* to) {
    alignas(64) W below[CHUNK] = {};
    for (int64_t t = size - 1; t >= 0; t--) {
        Vec<W> total{};
        for (int64_t j = 0; j <= t; j += LANES<W>) {
            Vec<W> column = load(below + j) + load(pairs + t * CHUNK + j);
            store(below + j, column);
            total += t - j >= LANES<W> ? column : load_first(below + j, int(t - j));
        }
        to[t] = sum(total);
    }
}

// Where the gradients of queries and keys go: to their tensors, or to [batch, time, group, key] sums of one block.
template <class T>
struct KeyGradients {
    T *q, *k;
    Wide<T>*q_part, *k_part;

    void store(int64_t place, const Wide<T>* dq, const Wide<T>* dk, int64_t count) const {
        if (q_part) {
            copy_row(count, dq, q_part + place);
            copy_row(count, dk, k_part + place);
        } else {
            copy_row(count, dq, q + place);
            copy_row(count, dk, k + place);
        }
    }
};

template <class T>
void backward_block(const Block<T>& block, const T* o_grad, const Wide<T>* last_grad, const Wide<T>* kept,
                    const Gradients<T>& to, const KeyGradients<T>& key_gradients) {
    using W = Wide<T>;
    const Problem<T>& p = block.p;
    int64_t columns = block.columns(), size_of_states = columns * p.key, chunks = block.chunks();
    int64_t square = CHUNK * CHUNK, keys = CHUNK * p.key;
    W* memory =
        workspace<0, W>(size_of_states * (std::min(chunks, CHUNKS) + 1) + 2 * columns * CHUNK + 5 * square + 3 * keys);
    auto take = [&](int64_t count) {
        W* first = memory;
        memory += count;
        return first;
    };
    W *entering = take(size_of_states * std::min(chunks, CHUNKS)), *future = take(size_of_states);
    W *weighted = take(columns * CHUNK), *dv = take(columns * CHUNK);
    W *products = take(square), *between = take(square), *scores = take(square), *x = take(square),
      *summed = take(square);
    W *dq = take(keys), *dk = take(keys), *part = take(keys);
    alignas(64) W change[CHUNK], reads[CHUNK], writes[CHUNK];
    ChunkDecay<W> decay;

    block.load_states(block.of_row(last_grad), future);
    if (p.skip) std::fill_n(to.skip + block.b * p.heads + block.first_head, block.count, W(0));
    for (int64_t begin = (chunks - 1) / CHUNKS * CHUNKS; begin >= 0; begin -= CHUNKS) {
        int64_t end = std::min(begin + CHUNKS, chunks);
        block.load_states(begin ? kept + p.at_kept(block.b, begin * CHUNK) : block.of_row(p.state), entering);
        for (int64_t chunk = begin; chunk + 1 < end; chunk++) {
            W* next = entering + (chunk + 1 - begin) * size_of_states;
            std::copy_n(next - size_of_states, size_of_states, next);
            advance(block, chunk, next, weighted);
        }
        for (int64_t chunk = end - 1; chunk >= begin; chunk--) {
            int64_t token = chunk * CHUNK, size = block.length(chunk);
            W* past = entering + (chunk - begin) * size_of_states;
            block.multiply({size, size, p.key}, block.queries(token), block.keys(token).transposed(),
                           Matrix{products, CHUNK});
            block.multiply({size, columns, p.key}, block.keys(token), Matrix{future, columns}, Matrix{dv, columns});
            std::fill_n(dq, keys, W(0));
            std::fill_n(dk, keys, W(0));
            for (int64_t n = 0; n < block.count; n++) {
                int64_t head = block.first_head + n;
                decay.load(p, block.b, head, token, size);
                decay.between(between);
                multiply_elements(products, between, size, scores);
                auto v = block.rows_of_head(p.v, token, head), gradient = block.rows_of_head(o_grad, token, head);
                W *my_dv = dv + n * p.value, *my_past = past + n * p.value, *my_future = future + n * p.value;

                for (int64_t i = 0; i < size; i++) {
                    scaled(p.value, decay.to_end[i], my_dv + i * columns, my_dv + i * columns);
                }
                block.multiply({size, p.value, size}, Matrix{scores, CHUNK}.transposed(), gradient,
                               Matrix{my_dv, columns}, true);
                W skipped = 0;
                for (int64_t i = 0; i < size; i++) {
                    W* row = my_dv + i * columns;
                    int64_t place = block.at_value(token + i, head);
                    if (p.write) {
                        to.write[(block.b * p.time + token + i) * p.heads + head] = dot(p.value, row, p.v + place);
                        scaled(p.value, p.weight(block.b, token + i, head), row, row);
                    }
                    if (p.skip) {
                        skipped += dot(p.value, p.v + place, o_grad + place);
                        add_scaled(p.value, p.skip[head], o_grad + place, row);
                    }
                    copy_row(p.value, row, to.v + place);
                }
                if (p.skip) to.skip[block.b * p.heads + head] += skipped;

                block.multiply({size, size, p.value}, gradient, v.transposed(), Matrix{x, CHUNK});
                weigh_columns(block, token, head, size, x);
                multiply_elements(scores, x, size, scores);
                multiply_elements(between, x, size, x);
                for (int64_t i = 0; i < size * CHUNK; i += LANES<W>) {
                    store(summed + i, n ? load(summed + i) + load(x + i) : load(x + i));
                }

                block.multiply({size, p.key, p.value}, gradient, Matrix{my_past, columns}.transposed(),
                               Matrix{part, p.key});
                for (int64_t i = 0; i < size; i++) {
                    W factor = decay.from_start[i];
                    reads[i] = factor *
                               add_row(part + i * p.key, p.key, factor, dq + i * p.key, p.q + block.at_key(token + i));
                }
                block.multiply({size, p.key, p.value}, v, Matrix{my_future, columns}.transposed(), Matrix{part, p.key});
                for (int64_t i = 0; i < size; i++) {
                    W factor = decay.to_end[i] * p.weight(block.b, token + i, head);
                    writes[i] = factor *
                                add_row(part + i * p.key, p.key, factor, dk + i * p.key, p.k + block.at_key(token + i));
                }

                Vec<W> whole{};
                for (int64_t c = 0; c < p.key; c++) {
                    W *state = my_past + c * columns, *gradient_of_state = my_future + c * columns;
                    Vec<W> by = broadcast<Vec<W>>(decay.over);
                    for_each_vector<W>(p.value, [&](int64_t i, auto load, auto store) {
                        Vec<W> scaled = load(gradient_of_state + i) * by;
                        whole = fma(scaled, load(state + i), whole);
                        store(gradient_of_state + i, scaled);
                    });
                }
                if (p.log_decay) {
                    // What passes the decay at t: from pairs of tokens, from the state before to a token, from a token
                    // to the state after, and from state to state.
                    passing(scores, size, change);
                    W total = sum(whole);
                    for (int64_t t = 0; t < size; t++) {
                        change[t] += total;
                        total += writes[t];
                    }
                    total = 0;
                    for (int64_t t = size - 1; t >= 0; t--) {
                        total += reads[t];
                        bool begins = p.starts && p.starts[block.b * p.time + token + t];
                        to.log_decay[(block.b * p.time + token + t) * p.heads + head] =
                            begins ? W(0) : change[t] + total;
                    }
                }
                for (int64_t i = 0; i < size; i++) {
                    scaled(p.value, decay.from_start[i], o_grad + block.at_value(token + i, head),
                           weighted + i * columns + n * p.value);
                }
            }
            block.multiply({size, p.key, size}, Matrix{summed, CHUNK}, block.keys(token), Matrix{dq, p.key}, true);
            block.multiply({size, p.key, size}, Matrix{summed, CHUNK}.transposed(), block.queries(token),
                           Matrix{dk, p.key}, true);
            for (int64_t i = 0; i < size; i++) {
                key_gradients.store(block.at_key(token + i), dq + i * p.key, dk + i * p.key, p.key);
            }
            block.multiply({p.key, columns, size}, block.queries(token).transposed(), Matrix{weighted, columns},
                           Matrix{future, columns}, true);
        }
    }
    block.store_states(future, block.of_row(to.state));
}

// Call body(block, index of the block in its group) for every one of `blocks` blocks of each group's heads.
template <class T, class Body>
void for_each_block(int64_t threads, const Problem<T>& p, int64_t blocks, Body body) {
    int64_t shared = p.heads / p.groups, most = (shared + blocks - 1) / blocks;
    parallel_for(int(threads), p.batch * p.groups * blocks, [&](int64_t index) {
        int64_t part = index % blocks, group = index / blocks % p.groups, first = part * most;
        Block<T> block{p, index / blocks / p.groups, group, group * shared + first, std::min(most, shared - first)};
        body(block, part);
    });
}

template <class T>
void chunks_forward(int64_t threads, const Problem<T>& p, int64_t blocks, T* o, Wide<T>* last, Wide<T>* kept) {
    for_each_block(threads, p, blocks, [&](const Block<T>& block, int64_t) { forward_block(block, o, last, kept); });
}

// With more than one block, `parts` holds what each of them sums: [2, blocks, batch, time, group, key].
template <class T>
void chunks_backward(int64_t threads, const Problem<T>& p, int64_t blocks, const T* o_grad, const Wide<T>* last_grad,
                     const Wide<T>* kept, const Gradients<T>& to, Wide<T>* parts) {
    using W = Wide<T>;
    int64_t size = p.batch * p.time * p.groups * p.key;
    for_each_block(threads, p, blocks, [&](const Block<T>& block, int64_t part) {
        KeyGradients<T> gradients{to.q, to.k, nullptr, nullptr};
        if (parts) {
            gradients.q_part = parts + part * size;
            gradients.k_part = parts + (blocks + part) * size;
        }
        backward_block(block, o_grad, last_grad, kept, to, gradients);
    });
    if (!parts) return;
    constexpr int64_t PIECE = 1 << 14;
    parallel_for(int(threads), 2 * ((size + PIECE - 1) / PIECE), [&](int64_t index) {
        int64_t begin = index / 2 * PIECE, count = std::min(PIECE, size - begin);
        W* sums = parts + index % 2 * blocks * size + begin;
        for (int64_t part = 1; part < blocks; part++) {
            const W* more = sums + part * size;
            for_each_vector<W>(
                count, [&](int64_t i, auto load, auto store) { store(sums + i, load(sums + i) + load(more + i)); });
        }
        copy_row(count, sums, (index % 2 ? to.k : to.q) + begin);
    });
}

}  // namespace linear_attention
