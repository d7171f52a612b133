// The gated delta rule in chunks, forward and backward, for the CPU; chunked.py has the equations, and the same letters.
//
// One task is one head of one sequence. It goes from chunk to chunk, and all that a chunk needs stays in the caches.
// A chunk never holds the start of a document, except as its first token: then the state that enters it is zero. The
// forward keeps the state that enters each segment; the backward walks a segment once more to find its chunks' states.
//
// No sum of decays is ever subtracted from another in the precision of the data, and a decay's gradient adds up only
// what passes over it, so nothing cancels however strong decays are.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "heads.h"

namespace seqzoo {
namespace {

// The most tokens in a chunk. It has no more than the keys have channels: among more, keys depend on each other, and
// the errors of the inverse grow.
constexpr int64_t CHUNK = 32;
constexpr int64_t SHORTEST_CHUNK = 8;
// Tokens between the states that the forward keeps.
constexpr int64_t SEGMENT = 512;
// Blocks of a chunk whose decays per channel are worked out pair by pair of tokens.
constexpr int64_t BLOCK = 16;
// Calls of at most so many tokens go token by token.
constexpr int64_t FEW = 8;

enum class Decay : int64_t { none, head, channel };

template <class T>
struct Inputs {
    using W = Wide<T>;
    int64_t batch, time, groups, heads, key, value;
    Decay decay;
    const T *q, *k, *v;
    const W *log_decay, *beta, *state;
    const uint8_t* starts;

    int64_t chunk() const { return std::clamp(key, SHORTEST_CHUNK, CHUNK); }
};

// One head of one sequence.
template <class T>
struct Head : HeadPlace {
    using W = Wide<T>;
    const Inputs<T>& x;

    Head(const Inputs<T>& x, int64_t index) : HeadPlace(x.time, x.heads, index), x(x) {}
    const T* shared(const T* from, int64_t t) const {
        return from + (token(t) * x.groups + head / (x.heads / x.groups)) * x.key;
    }
    bool begins(int64_t t) const { return x.starts && x.starts[token(t)]; }
    W beta(int64_t t) const { return x.beta[at(t)]; }
    Matrix<const T> values(const T* of, int64_t t) const { return {of + at(t) * x.value, x.heads * x.value}; }
    Matrix<T> values(T* of, int64_t t) const { return {of + at(t) * x.value, x.heads * x.value}; }

    // The first token of the segment or document that holds the token before `end`.
    int64_t run_before(int64_t end) const {
        int64_t begin = end - 1;
        while (begin % SEGMENT && !begins(begin)) begin--;
        return begin;
    }
    // The end of the one that begins at `begin`.
    int64_t run_after(int64_t begin) const {
        int64_t end = begin + 1;
        while (end < x.time && end % SEGMENT && !begins(end)) end++;
        return end;
    }
    int64_t kept_states() const { return (x.time - 1) / SEGMENT; }
    // Which of the kept states enters at `begin`, a multiple of SEGMENT above 0.
    int64_t kept(int64_t begin) const { return (index() * kept_states() + begin / SEGMENT - 1) * x.key * x.value; }
};

template <class T, class A, class B>
void product(Sizes sizes, Matrix<A> a, Matrix<B> b, Matrix<Wide<T>> c, Wide<T> alpha = 1, bool accumulate = false) {
    constexpr Precision precision = std::is_same_v<T, bfloat16> ? Precision::bf16 : Precision::full;
    gemm<precision>(sizes, a, b, c, std::common_type_t<Wide<T>>(alpha), accumulate);
}

// What a chunk's tokens have to do with each other and with the state: rows of tokens, `size` of them in use.
template <class T>
struct Chunk {
    using W = Wide<T>;
    int64_t begin, size;
    W* reads;     // [2 size, key]    queries, then keys, decayed from the chunk's start
    W* writes;    // [size, key]      keys decayed to the chunk's end
    W* keep;      // [key]            the decay over the chunk
    W* products;  // [2 size, CHUNK]  q_i . k_j, decayed, for j <= i; then k_i . k_j for j < i; else 0
    W* solve;     // [size, CHUNK]    (I + beta (k_i . k_j))^-1
    W* unknown;   // [size, value]    values without what the memory already holds under their keys
    W* news;      // [size, value]    N: what is written
    W* entering;  // [key, value]     S
    // Decays that all channels share:
    W* decays;      // [size, CHUNK]  from j to i
    W* from_start;  // [size]
    // Decays of each channel:
    W* steps;  // [size, key]      e^g
    W* over;   // [block, key]     the decay over a block
    W* near;   // [2 size, key]    queries, then keys, decayed from the start of their block
    W* seen;   // [.., key]        for each block: all keys before it, decayed to its start; then `writes`

    static constexpr int64_t BLOCKS = CHUNK / BLOCK;

    // Take the memory of a chunk; with none, only count it.
    Chunk(const Inputs<T>& x, Arena<W>& arena) {
        reads = arena.take(2 * CHUNK * x.key);
        keep = arena.take(x.key);
        products = arena.take(2 * CHUNK * CHUNK);
        solve = arena.take(CHUNK * CHUNK);
        unknown = arena.take(CHUNK * x.value);
        news = arena.take(CHUNK * x.value);
        entering = arena.take(x.key * x.value);
        if (x.decay == Decay::channel) {
            steps = arena.take(CHUNK * x.key);
            over = arena.take(BLOCKS * x.key);
            near = arena.take(2 * CHUNK * x.key);
            seen = arena.take(BLOCKS * (BLOCKS + 1) / 2 * BLOCK * x.key);
        } else {
            writes = arena.take(CHUNK * x.key);
            decays = arena.take(CHUNK * CHUNK);
            from_start = arena.take(CHUNK);
        }
    }

    W* seen_by(int64_t block, int64_t key) const { return seen + block * (block - 1) / 2 * BLOCK * key; }
    const W* scores() const { return products; }
    const W* overlaps() const { return products + size * CHUNK; }
};

// Queries, then keys, of a chunk: [2 size, key].
template <class T>
T* gather(const Head<T>& head, int64_t begin, int64_t size) {
    int64_t key = head.x.key;
    T* rows = workspace<1, T>(2 * CHUNK * key);
    for (int64_t i = 0; i < size; i++) {
        std::memcpy(rows + i * key, head.shared(head.x.q, begin + i), key * sizeof(T));
        std::memcpy(rows + (size + i) * key, head.shared(head.x.k, begin + i), key * sizeof(T));
    }
    return rows;
}

template <class T>
void relate_by_head(const Head<T>& head, Chunk<T>& c, const T* rows) {
    using W = Wide<T>;
    int64_t n = c.size, key = head.x.key;
    auto log = [&](int64_t i) { return head.x.decay == Decay::head ? head.x.log_decay[head.at(c.begin + i)] : W(0); };
    decays_between<CHUNK>(n, log, c.decays, CHUNK, c.from_start);
    exponentials(n, c.from_start);
    const W* to_end = c.decays + (n - 1) * CHUNK;

    Matrix<const T> keys{rows + n * key, key};
    product<T>({2 * n, n, key}, Matrix<const T>{rows, key}, keys.transposed(), Matrix<W>{c.products, CHUNK});
    for (int64_t i = 0; i < n; i++) {
        const W* decay = c.decays + i * CHUNK;
        W *of_query = c.products + i * CHUNK, *of_key = of_query + n * CHUNK;
        for_each_vector<W>(n, [&](int64_t j, auto load, auto store) {
            store(of_query + j, load(of_query + j) * load(decay + j));
            store(of_key + j, load(of_key + j) * load(decay + j));
        });
        of_key[i] = 0;
        scaled(key, c.from_start[i], rows + i * key, c.reads + i * key);
        scaled(key, c.from_start[i], rows + (n + i) * key, c.reads + (n + i) * key);
        scaled(key, to_end[i], rows + (n + i) * key, c.writes + i * key);
    }
    std::fill(c.keep, c.keep + key, c.from_start[n - 1]);
}

// A key of an earlier block reaches a token decayed to the start of the token's block, which is on the key's side of
// the product, and from there to the token, which is on the other. Within a block each pair has its own decay.
template <class T>
void relate_by_channel(const Head<T>& head, Chunk<T>& c, const T* rows) {
    using W = Wide<T>;
    int64_t n = c.size, key = head.x.key, blocks = (n + BLOCK - 1) / BLOCK;
    std::fill(c.products, c.products + 2 * n * CHUNK, W(0));
    std::fill(c.keep, c.keep + key, W(1));
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * BLOCK, m = std::min(BLOCK, n - first);
        W *over = c.over + block * key, *seen = c.seen_by(block, key), *next = c.seen_by(block + 1, key);
        const T *queries = rows + first * key, *keys = rows + (n + first) * key;
        W *steps = c.steps + first * key, *near = c.near + first * key, *reads = c.reads + first * key;
        Vec<W> of_query[BLOCK][BLOCK], of_key[BLOCK][BLOCK];
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j <= i; j++) of_query[i][j] = of_key[i][j] = Vec<W>{};
        }
        for_each_vector<W>(key, [&](int64_t o, auto load, auto store) {
            Vec<W> step[BLOCK], q[BLOCK], k[BLOCK];
            Vec<W> before = load(c.keep + o), since = broadcast<Vec<W>>(1), until = since;
            for (int64_t i = 0; i < m; i++) {
                step[i] = exp(load(head.x.log_decay + head.at(c.begin + first + i) * key + o));
                q[i] = load(queries + i * key + o);
                k[i] = load(keys + i * key + o);
                since *= step[i];
                store(steps + i * key + o, step[i]);
                store(near + i * key + o, q[i] * since);
                store(near + (n + i) * key + o, k[i] * since);
                store(reads + i * key + o, q[i] * since * before);
                store(reads + (n + i) * key + o, k[i] * since * before);
            }
            store(over + o, since);
            store(c.keep + o, before * since);
            for (int64_t j = 0; j < first; j++) store(next + j * key + o, load(seen + j * key + o) * since);
            for (int64_t j = m - 1; j >= 0; j--) {
                store(next + (first + j) * key + o, k[j] * until);
                until *= step[j];
            }
            for (int64_t j = 0; j < m; j++) {
                Vec<W> reaching = k[j];
                of_query[j][j] = fma(q[j], reaching, of_query[j][j]);
                for (int64_t i = j + 1; i < m; i++) {
                    reaching *= step[i];
                    of_query[i][j] = fma(q[i], reaching, of_query[i][j]);
                    of_key[i][j] = fma(k[i], reaching, of_key[i][j]);
                }
            }
        });
        W *scores = c.products + first * CHUNK, *overlaps = scores + n * CHUNK;
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j <= i; j++) {
                scores[i * CHUNK + first + j] = sum(of_query[i][j]);
                overlaps[i * CHUNK + first + j] = sum(of_key[i][j]);
            }
        }
        if (block) {
            Matrix<const W> earlier{seen, key};
            Matrix<const W> later{near, key};
            product<T>({m, first, key}, later, earlier.transposed(), Matrix<W>{scores, CHUNK});
            product<T>({m, first, key}, later.block(n, 0), earlier.transposed(), Matrix<W>{overlaps, CHUNK});
        }
    }
    c.writes = c.seen_by(blocks, key);
}

template <class T>
void relate(const Head<T>& head, Chunk<T>& c) {
    const T* rows = gather(head, c.begin, c.size);
    head.x.decay == Decay::channel ? relate_by_channel(head, c, rows) : relate_by_head(head, c, rows);
}

// What the chunk writes, given the state that enters it. `held` becomes what the state holds under `reads`, or, without
// queries, under the keys of it only.
template <class T>
void solve(const Head<T>& head, Chunk<T>& c, bool queries, Wide<T>* held) {
    using W = Wide<T>;
    int64_t n = c.size, key = head.x.key, value = head.x.value, skip = queries ? 0 : n;
    Matrix<const W> state{c.entering, value};
    product<T>({2 * n - skip, value, key}, Matrix<const W>{c.reads + skip * key, key}, state, Matrix<W>{held, value});
    W* lower = workspace<3, W>(CHUNK * CHUNK);
    W* wanted = workspace<4, W>(CHUNK * value);
    Matrix<const T> values = head.values(head.x.v, c.begin);
    for (int64_t i = 0; i < n; i++) {
        W beta = head.beta(c.begin + i);
        scaled(i, beta, c.overlaps() + i * CHUNK, lower + i * CHUNK);
        const T* v = values.data + i * values.stride;
        const W* known = held + (n - skip + i) * value;
        for_each_vector<W>(value, [&](int64_t o, auto load, auto store) {
            Vec<W> unknown = load(v + o) - load(known + o);
            store(c.unknown + i * value + o, unknown);
            store(wanted + i * value + o, beta * unknown);
        });
    }
    unit_lower_inverse(n, Matrix<const W>{lower, CHUNK}, Matrix<W>{c.solve, CHUNK});
    product<T>({n, value, n}, Matrix<const W>{c.solve, CHUNK}, Matrix<const W>{wanted, value}, Matrix<W>{c.news, value});
}

// The state after the chunk; `to` may be the entering one.
template <class T>
void write(const Head<T>& head, const Chunk<T>& c, Wide<T>* to) {
    using W = Wide<T>;
    int64_t key = head.x.key, value = head.x.value;
    for (int64_t i = 0; i < key; i++) scaled(value, c.keep[i], c.entering + i * value, to + i * value);
    Matrix<const W> writes{c.writes, key};
    product<T>({key, value, c.size}, writes.transposed(), Matrix<const W>{c.news, value}, Matrix<W>{to, value}, 1, true);
}

template <class T>
struct Outputs {
    T* o;
    Wide<T>*last, *kept;
};

template <class T>
void forward_in_chunks(const Head<T>& head, const Outputs<T>& y) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    int64_t numbers = x.key * x.value;
    Arena<W> count;
    Chunk<T>(x, count);
    Arena<W> arena{workspace<0, W>(count.used + 2 * CHUNK * x.value)};
    Chunk<T> c(x, arena);
    W* read = arena.take(2 * CHUNK * x.value);
    // The last state is the running one.
    W* state = c.entering = y.last + head.index() * numbers;
    if (x.state) {
        std::copy_n(x.state + head.index() * numbers, numbers, state);
    } else {
        std::fill_n(state, numbers, W(0));
    }
    for (int64_t run = 0, end; run < x.time; run = end) {
        end = head.run_after(run);
        if (head.begins(run)) std::fill_n(state, numbers, W(0));
        if (run && run % SEGMENT == 0) std::copy_n(state, numbers, y.kept + head.kept(run));
        for (c.begin = run; c.begin < end; c.begin += c.size) {
            c.size = std::min(x.chunk(), end - c.begin);
            relate(head, c);
            solve(head, c, true, read);
            product<T>({c.size, x.value, c.size}, Matrix<const W>{c.scores(), CHUNK}, Matrix<const W>{c.news, x.value},
                       Matrix<W>{read, x.value}, 1, true);
            Matrix<T> o = head.values(y.o, c.begin);
            for (int64_t i = 0; i < c.size; i++) copy_row(x.value, read + i * x.value, o.data + i * o.stride);
            write(head, c, state);
        }
    }
}

template <class T>
struct Gradients {
    using W = Wide<T>;
    // Of the outputs.
    const T* o;
    const W *last, *kept;
    // Of the inputs; q's and k's for each head.
    T *q, *k, *v;
    W *log_decay, *beta, *state;
};

// Gradients of what `relate` made, and of what it took.
template <class T>
struct ChunkGradients {
    using W = Wide<T>;
    W* reads;     // [2 size, key]
    W* writes;    // [size, key]
    W* keep;      // [key], times the decay
    W* products;  // [2 size, CHUNK]
    W* rows;      // [2 size, key]  of queries, then of keys
    W* near;      // [2 size, key], for decays of channels

    ChunkGradients(const Inputs<T>& x, Arena<W>& arena) {
        for (W** each : {&reads, &rows, &near}) *each = arena.take(2 * CHUNK * x.key);
        writes = arena.take(CHUNK * x.key);
        keep = arena.take(x.key);
        products = arena.take(2 * CHUNK * CHUNK);
    }
};

// A decay's gradient is the sum over all pairs of tokens that it stands between: of what the pair's product is times
// its gradient. The state that enters is before all tokens, the one that leaves behind them.
template <class T>
void unrelate_by_head(const Head<T>& head, const Chunk<T>& c, const T* rows, ChunkGradients<T>& d, Wide<T>* log_decay) {
    using W = Wide<T>;
    int64_t n = c.size, key = head.x.key;
    W *of_query = d.products, *of_key = of_query + n * CHUNK;
    if (log_decay) {
        W between[CHUNK] = {}, read = 0, kept = 0, written[CHUNK + 1] = {};
        for (int64_t o = 0; o < key; o++) kept += d.keep[o];
        for (int64_t j = 0; j < n; j++) written[j + 1] = written[j] + dot(key, c.writes + j * key, d.writes + j * key);
        for (int64_t i = n - 1; i >= 0; i--) {
            for (int64_t row : {i, n + i}) read += dot(key, c.reads + row * key, d.reads + row * key);
            const W *scores = c.scores() + i * CHUNK, *overlaps = c.overlaps() + i * CHUNK;
            W all = 0;
            for (int64_t j = 0; j < i; j++) {
                between[j] += of_query[i * CHUNK + j] * scores[j] + of_key[i * CHUNK + j] * overlaps[j];
                all += between[j];
            }
            log_decay[head.at(c.begin + i)] = all + read + written[i] + kept;
        }
    }

    for (int64_t i = 0; i < n; i++) {
        const W* decay = c.decays + i * CHUNK;
        for_each_vector<W>(n, [&](int64_t j, auto load, auto store) {
            store(of_query + i * CHUNK + j, load(of_query + i * CHUNK + j) * load(decay + j));
            store(of_key + i * CHUNK + j, load(of_key + i * CHUNK + j) * load(decay + j));
        });
        of_key[i * CHUNK + i] = 0;
    }
    W* both_ways = workspace<5, W>(CHUNK * CHUNK);
    const W* to_end = c.decays + (n - 1) * CHUNK;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) both_ways[i * CHUNK + j] = of_key[i * CHUNK + j] + of_key[j * CHUNK + i];
        scaled(key, c.from_start[i], d.reads + i * key, d.rows + i * key);
        Vec<W> start = broadcast<Vec<W>>(c.from_start[i]), end = broadcast<Vec<W>>(to_end[i]);
        for_each_vector<W>(key, [&](int64_t o, auto load, auto store) {
            store(d.rows + (n + i) * key + o,
                  start * load(d.reads + (n + i) * key + o) + end * load(d.writes + i * key + o));
        });
    }
    Matrix<const T> queries{rows, key}, keys{rows + n * key, key};
    Matrix<const W> scores{of_query, CHUNK}, overlaps{both_ways, CHUNK};
    Matrix<W> to_queries{d.rows, key}, to_keys{d.rows + n * key, key};
    product<T>({n, key, n}, scores, keys, to_queries, 1, true);
    product<T>({n, key, n}, scores.transposed(), queries, to_keys, 1, true);
    product<T>({n, key, n}, overlaps, keys, to_keys, 1, true);
}

template <class T>
void unrelate_by_channel(const Head<T>& head, const Chunk<T>& c, const T* rows, ChunkGradients<T>& d,
                         Wide<T>* log_decay) {
    using W = Wide<T>;
    int64_t n = c.size, key = head.x.key;
    // What all tokens that read the entering state give to the decays of the blocks before theirs.
    W* read_later = workspace<5, W>(key);
    std::fill_n(read_later, key, W(0));
    for (int64_t block = (n + BLOCK - 1) / BLOCK - 1; block >= 0; block--) {
        int64_t first = block * BLOCK, m = std::min(BLOCK, n - first);
        const W *over = c.over + block * key, *next = c.seen_by(block + 1, key), *steps = c.steps + first * key;
        const T *queries = rows + first * key, *keys = rows + (n + first) * key;
        const W *scores = d.products + first * CHUNK, *overlaps = scores + n * CHUNK;
        Matrix<const W> near{c.near + first * key, key}, seen{c.seen_by(block, key), key};
        W* d_near = d.near + first * key;
        if (block) {
            product<T>({m, key, first}, Matrix<const W>{scores, CHUNK}, seen, Matrix<W>{d_near, key});
            product<T>({m, key, first}, Matrix<const W>{overlaps, CHUNK}, seen, Matrix<W>{d_near + n * key, key});
        } else {
            for (int64_t row : {int64_t(0), n}) std::fill_n(d_near + row * key, m * key, W(0));
        }
        for_each_vector<W>(key, [&](int64_t o, auto load, auto store) {
            Vec<W> step[BLOCK], q[BLOCK], k[BLOCK], d_q[BLOCK], d_k[BLOCK], d_step[BLOCK];
            Vec<W> since = broadcast<Vec<W>>(1), until = since, before = since;
            for (int64_t b = 0; b < block; b++) before *= load(c.over + b * key + o);

            // Pairs that the whole block stands between.
            Vec<W> through = load(d.keep + o) + load(read_later + o);
            for (int64_t j = 0; j < first; j++) {
                Vec<W> gradient = load(d.writes + j * key + o);
                through = fma(load(next + j * key + o), gradient, through);
                store(d.writes + j * key + o, gradient * load(over + o));
            }
            // Tokens of the block and earlier keys.
            Vec<W> read = load(read_later + o);
            for (int64_t i = 0; i < m; i++) {
                step[i] = load(steps + i * key + o);
                q[i] = load(queries + i * key + o);
                k[i] = load(keys + i * key + o);
                since *= step[i];
                Vec<W> of_query = load(d.reads + (first + i) * key + o), of_key = load(d.reads + (n + first + i) * key + o);
                read = fma(load(c.reads + (first + i) * key + o), of_query, read);
                read = fma(load(c.reads + (n + first + i) * key + o), of_key, read);
                of_query = fma(of_query, before, load(d_near + i * key + o));
                of_key = fma(of_key, before, load(d_near + (n + i) * key + o));
                d_q[i] = of_query * since;
                d_k[i] = of_key * since;
                d_step[i] = load(near.data + i * key + o) * of_query + load(near.data + (n + i) * key + o) * of_key;
            }
            store(read_later + o, read);
            Vec<W> later{};
            for (int64_t i = m - 1; i >= 0; i--) {
                later += d_step[i];
                d_step[i] = later + through;
            }
            // Keys of the block and later tokens.
            for (int64_t j = m - 1; j >= 0; j--) {
                d_k[j] = fma(load(d.writes + (first + j) * key + o), until, d_k[j]);
                until *= step[j];
            }
            Vec<W> earlier{};
            for (int64_t j = 0; j < m; j++) {
                d_step[j] += earlier;
                earlier = fma(load(next + (first + j) * key + o), load(d.writes + (first + j) * key + o), earlier);
            }
            // Pairs in the block.
            for (int64_t j = 0; j < m; j++) {
                Vec<W> own = broadcast<Vec<W>>(scores[j * CHUNK + first + j]), decay = broadcast<Vec<W>>(1);
                Vec<W> of_pair[BLOCK], of_key = own * q[j], over_pairs{};
                d_q[j] = fma(own, k[j], d_q[j]);
                for (int64_t i = j + 1; i < m; i++) {
                    Vec<W> score = broadcast<Vec<W>>(scores[i * CHUNK + first + j]);
                    Vec<W> overlap = broadcast<Vec<W>>(overlaps[i * CHUNK + first + j]);
                    decay *= step[i];
                    Vec<W> reaching = k[j] * decay, gradient = score * q[i] + overlap * k[i];
                    d_q[i] = fma(score, reaching, d_q[i]);
                    d_k[i] = fma(overlap, reaching, d_k[i]);
                    of_key = fma(gradient, decay, of_key);
                    of_pair[i] = gradient * reaching;
                }
                d_k[j] += of_key;
                for (int64_t i = m - 1; i > j; i--) {
                    over_pairs += of_pair[i];
                    d_step[i] += over_pairs;
                }
            }
            for (int64_t i = 0; i < m; i++) {
                store(d.rows + (first + i) * key + o, d_q[i]);
                store(d.rows + (n + first + i) * key + o, d_k[i]);
                store(log_decay + head.at(c.begin + first + i) * key + o, d_step[i]);
            }
        });
        if (block) {
            Matrix<W> to{d.writes, key};
            Matrix<const W> of_scores{scores, CHUNK}, of_overlaps{overlaps, CHUNK};
            product<T>({first, key, m}, of_scores.transposed(), near, to, 1, true);
            product<T>({first, key, m}, of_overlaps.transposed(), near.block(n, 0), to, 1, true);
        }
    }
}

// From the gradient of the state that leaves the chunk to that of the one that enters, in place.
template <class T>
void chunk_backward(const Head<T>& head, const Chunk<T>& c, const Gradients<T>& d, ChunkGradients<T>& each,
                    Wide<T>* outputs, Wide<T>* news, Wide<T>* state) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    int64_t n = c.size, key = x.key, value = x.value;
    Matrix<const W> reads{c.reads, key}, writes{c.writes, key}, written{c.news, value}, entering{c.entering, value};
    Matrix<const W> leaving_gradient{state, value}, both_gradients{outputs, value};

    // `outputs`: gradients of o, then of (I + M) N, of which N's is below.
    Matrix<const T> o = head.values(d.o, c.begin);
    for (int64_t i = 0; i < n; i++) copy_row(value, o.data + i * o.stride, outputs + i * value);
    Matrix<W> of_news{news, value}, solved{outputs + n * value, value};
    product<T>({n, value, n}, Matrix<const W>{c.scores(), CHUNK}.transposed(), both_gradients, of_news);
    product<T>({n, value, key}, writes, leaving_gradient, of_news, 1, true);
    product<T>({n, value, n}, Matrix<const W>{c.solve, CHUNK}.transposed(), Matrix<const W>(of_news), solved);

    product<T>({2 * n, n, value}, both_gradients, written.transposed(), Matrix<W>{each.products, CHUNK});
    Matrix<T> of_values = head.values(d.v, c.begin);
    for (int64_t i = 0; i < n; i++) {
        W beta = head.beta(c.begin + i), *row = solved.data + i * value, *overlaps = each.products + (n + i) * CHUNK;
        // M's gradient is the negative of these products.
        d.beta[head.at(c.begin + i)] =
            dot(value, row, c.unknown + i * value) - dot(i, overlaps, c.overlaps() + i * CHUNK);
        scaled(value, beta, row, of_values.data + i * of_values.stride);
        scaled(value, -beta, row, row);
        scaled(n, -beta, overlaps, overlaps);
    }

    product<T>({2 * n, key, value}, both_gradients, entering.transposed(), Matrix<W>{each.reads, key});
    product<T>({n, key, value}, written, leaving_gradient.transposed(), Matrix<W>{each.writes, key});
    for (int64_t i = 0; i < key; i++) {
        each.keep[i] = c.keep[i] * dot(value, c.entering + i * value, state + i * value);
        scaled(value, c.keep[i], state + i * value, state + i * value);
    }
    product<T>({key, value, 2 * n}, reads.transposed(), both_gradients, Matrix<W>{state, value}, 1, true);

    const T* rows = gather(head, c.begin, n);
    if (x.decay == Decay::channel) {
        unrelate_by_channel(head, c, rows, each, d.log_decay);
    } else {
        unrelate_by_head(head, c, rows, each, x.decay == Decay::head ? d.log_decay : nullptr);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t at = head.at(c.begin + i) * key;
        copy_row(key, each.rows + i * key, d.q + at);
        copy_row(key, each.rows + (n + i) * key, d.k + at);
    }
}

template <class T>
void backward(const Head<T>& head, const Gradients<T>& d) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    int64_t most = (SEGMENT + x.chunk() - 1) / x.chunk();
    int64_t numbers = x.key * x.value;
    Arena<W> count;
    Chunk<T>(x, count);
    int64_t chunk_numbers = count.used;
    ChunkGradients<T>(x, count);
    Arena<W> arena{workspace<0, W>(count.used + (most - 1) * chunk_numbers + 5 * CHUNK * x.value)};
    ChunkGradients<T> each(x, arena);
    W* outputs = arena.take(2 * CHUNK * x.value);
    W* news = arena.take(CHUNK * x.value);
    W* held = arena.take(CHUNK * x.value);
    W* state = d.state + head.index() * numbers;
    std::copy_n(d.last + head.index() * numbers, numbers, state);
    for (int64_t end = x.time, run; end > 0; end = run) {
        run = head.run_before(end);
        Arena<W> of_run = arena;
        std::vector<Chunk<T>> chunks;
        for (int64_t begin = run; begin < end; begin += x.chunk()) {
            Chunk<T> c(x, of_run);
            c.begin = begin;
            c.size = std::min(x.chunk(), end - begin);
            if (!chunks.empty()) {
                write(head, chunks.back(), c.entering);
            } else if (head.begins(run) || (!run && !x.state)) {
                std::fill_n(c.entering, numbers, W(0));
            } else {
                const W* from = run ? d.kept + head.kept(run) : x.state + head.index() * numbers;
                std::copy_n(from, numbers, c.entering);
            }
            relate(head, c);
            solve(head, c, false, held);
            chunks.push_back(c);
        }
        for (; !chunks.empty(); chunks.pop_back()) {
            chunk_backward(head, chunks.back(), d, each, outputs, news, state);
        }
        if (head.begins(run)) std::fill_n(state, numbers, W(0));
    }
}

// A few tokens, one after the other: the equation itself, with the columns of the state in vectors.
template <class T>
void forward_by_token(const Head<T>& head, const Outputs<T>& y) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    int64_t key = x.key, value = x.value;
    W* decay = workspace<1, W>(3 * key);
    W *q = decay + key, *k = q + key;
    W* state = y.last + head.index() * key * value;
    const W* from = x.state ? x.state + head.index() * key * value : nullptr;
    for (int64_t t = 0; t < x.time; t++) {
        int64_t at = head.at(t);
        if (x.decay == Decay::channel) {
            std::copy_n(x.log_decay + at * key, key, decay);
            exponentials(key, decay);
        } else {
            std::fill_n(decay, key, x.decay == Decay::head ? std::exp(x.log_decay[at]) : W(1));
        }
        copy_row(key, head.shared(x.q, t), q);
        copy_row(key, head.shared(x.k, t), k);
        if (head.begins(t)) from = nullptr;
        W beta = x.beta[at];
        for_each_vector<W>(value, [&](int64_t o, auto load, auto store) {
            Vec<W> known{}, read{};
            for (int64_t i = 0; from && i < key; i++) known += load(from + i * value + o) * (decay[i] * k[i]);
            Vec<W> news = (load(x.v + at * value + o) - known) * beta;
            for (int64_t i = 0; i < key; i++) {
                Vec<W> row = news * k[i];
                if (from) row += load(from + i * value + o) * decay[i];
                store(state + i * value + o, row);
                read += row * q[i];
            }
            store(y.o + at * value + o, read);
        });
        from = state;
    }
}

template <class T>
void run_forward(int64_t threads, const Inputs<T>& x, const Outputs<T>& y) {
    int64_t heads = x.batch * x.heads;
    parallel_for(busy_threads(threads, x.time * heads * x.key * x.value), heads, [&](int64_t i) {
        Head<T> head(x, i);
        x.time <= FEW ? forward_by_token(head, y) : forward_in_chunks(head, y);
    });
}

}  // namespace
}  // namespace seqzoo

using namespace seqzoo;

// [batch, time, ...] as in __init__.py, dense. decay: 0 none, 1 per head, 2 per channel. kept: [batch, head, states,
// key, value], the states that enter the tokens SEGMENT, 2 SEGMENT, ...
SEQZOO_EXPORT void gated_delta_rule_forward(int64_t dtype, int64_t threads, const void* q, const void* k, const void* v,
                                            const void* log_decay, const void* beta, const void* state,
                                            const void* starts, void* o, void* last, void* kept, int64_t decay,
                                            int64_t batch, int64_t time, int64_t groups, int64_t heads, int64_t key,
                                            int64_t value) {
    with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        Inputs<T> x{batch, time, groups, heads, key, value, Decay(decay),
                    static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                    static_cast<const W*>(log_decay), static_cast<const W*>(beta), static_cast<const W*>(state),
                    static_cast<const uint8_t*>(starts)};
        run_forward(threads, x, {static_cast<T*>(o), static_cast<W*>(last), static_cast<W*>(kept)});
    });
}

// Gradients of q and k are those of each head: [batch, time, head, key].
SEQZOO_EXPORT void gated_delta_rule_backward(int64_t dtype, int64_t threads, const void* q, const void* k,
                                             const void* v, const void* log_decay, const void* beta, const void* state,
                                             const void* starts, const void* kept, const void* o_grad,
                                             const void* last_grad, void* q_grad, void* k_grad, void* v_grad,
                                             void* log_decay_grad, void* beta_grad, void* state_grad, int64_t decay,
                                             int64_t batch, int64_t time, int64_t groups, int64_t heads, int64_t key,
                                             int64_t value) {
    with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        Inputs<T> x{batch, time, groups, heads, key, value, Decay(decay),
                    static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
                    static_cast<const W*>(log_decay), static_cast<const W*>(beta), static_cast<const W*>(state),
                    static_cast<const uint8_t*>(starts)};
        Gradients<T> d{static_cast<const T*>(o_grad), static_cast<const W*>(last_grad), static_cast<const W*>(kept),
                       static_cast<T*>(q_grad), static_cast<T*>(k_grad), static_cast<T*>(v_grad),
                       static_cast<W*>(log_decay_grad), static_cast<W*>(beta_grad), static_cast<W*>(state_grad)};
        parallel_for(int(threads), batch * heads, [&](int64_t i) { backward(Head<T>(x, i), d); });
    });
}
