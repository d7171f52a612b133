// Memories that learn while they read, forward and backward, for the CPU; chunked.py has the equations and the letters.
//
// One task is one head of one sequence. It goes from piece to piece, a piece being a chunk or what of one a call, a
// document or PIECE has room for, and all that a piece needs stays in the caches. The forward keeps the weights that
// enter each segment; the backward walks a segment once more to find those of its pieces.
//
// What a token reads its piece's weights with, A and C and S from before the piece:
//
//     W_t = A + alpha_t A + gamma_t C - delta_t S - sum_s pi_ts x_s e_s^T
//     alpha = reach (a - 1),   gamma = reach a,   delta = reach d,   pi = reach p

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "heads.h"
#include "network.h"

namespace seqzoo {
namespace {

// The most tokens in a piece.
constexpr int64_t PIECE = 64;
// Pieces between the weights that the forward keeps.
constexpr int64_t PIECES = 32;

struct Layer {
    int64_t inputs;   // channels that enter
    int64_t rows;     // with a one for the biases, where there are any
    int64_t columns;  // channels that leave
    int64_t at;       // where its weights begin among all

    bool biased() const { return rows > inputs; }
};

// Tokens that follow each other in one chunk of one document.
struct Span {
    int64_t begin, size;
    int64_t place;  // of the first token in its chunk
    bool fresh;     // the initial weights enter
    bool whole;     // the chunk ends with it
    bool last;      // another document follows
};

template <class T>
struct Inputs {
    using W = Wide<T>;
    int64_t batch, time, heads, key, value, chunk;
    const T *q, *k, *v;
    const W *rate, *weights, *norm_weight, *norm_bias, *reach, *log_momentum, *log_keep;
    const W *anchor, *change, *momentum;
    const int64_t* position;
    const uint8_t* starts;
    bool tanh;
    W eps;
    std::vector<Layer> layers;
    int64_t numbers = 0, widest = 0;

    void set_layers(int64_t depth, const int64_t* sizes) {
        int64_t inputs = key;
        for (int64_t n = 0; n < depth; n++) {
            layers.push_back({inputs, sizes[2 * n], sizes[2 * n + 1], numbers});
            numbers += sizes[2 * n] * sizes[2 * n + 1];
            widest = std::max({widest, inputs, sizes[2 * n + 1]});
            inputs = sizes[2 * n + 1];
        }
    }
    int64_t piece() const { return std::min({chunk, PIECE, time}); }
    int64_t segment() const { return PIECES * std::min(chunk, PIECE); }
    int64_t kept_states() const { return (time - 1) / segment(); }
    // C is zero between pieces, unless a chunk is cut into several.
    int64_t kept_numbers() const { return numbers * (1 + (log_momentum != nullptr) + (chunk > PIECE)); }

    std::vector<Span> spans(int64_t row) const {
        std::vector<Span> found;
        // No legal position is clamped; any other would be an endless loop.
        int64_t place = position ? std::clamp<int64_t>(position[row], 0, chunk - 1) : 0;
        const uint8_t* begins = starts ? starts + row * time : nullptr;
        for (int64_t t = 0, end; t < time; t = end) {
            bool begun = begins && begins[t];
            if (begun) place = 0;
            int64_t limit = std::min(time, t + std::min(PIECE, chunk - place));
            for (end = t + 1; end < limit && !(begins && begins[end]);) end++;
            bool whole = place + end - t == chunk;
            found.push_back({t, end - t, place, begun || (!t && !anchor), whole, end < time && begins && begins[end]});
            place = whole ? 0 : place + end - t;
        }
        return found;
    }

    // Where segments begin among `spans`, and the end of the last.
    std::vector<const Span*> segments(const std::vector<Span>& spans) const {
        std::vector<const Span*> found;
        for (const Span& span : spans) {
            if (found.empty() || span.begin / segment() != found.back()->begin / segment()) found.push_back(&span);
        }
        found.push_back(spans.data() + spans.size());
        return found;
    }
};

template <class W>
Matrix<const W> matrix(const W* data, int64_t stride) {
    return {data, stride};
}

// to (+)= sign rows weights^T, [size, inputs], by way of its transpose: of the two, rows of tokens are sooner turned.
template <class W>
void back_through(int64_t size, const Layer& layer, const W* rows, const W* weights, W* to, W sign, bool accumulate) {
    constexpr int N = LANES<W>;
    const int64_t inputs = layer.inputs, width = layer.columns, stride = padded<W>(size);
    W* turned = workspace<4, W>(inputs * stride);
    gemm({inputs, size, width}, matrix(weights, width), matrix(rows, width).transposed(), Matrix<W>{turned, stride},
         sign);
    for (int64_t i = 0; i < inputs; i += N) {
        for (int64_t j = 0; j < size; j += N) {
            Vec<W> square[N];
            SEQZOO_UNROLL
            for (int k = 0; k < N; k++) square[k] = i + k < inputs ? load(turned + (i + k) * stride + j) : Vec<W>{};
            detail::transpose_square(square);
            SEQZOO_UNROLL
            for (int k = 0; k < N; k++) {
                if (j + k >= size) continue;
                W* row = to + (j + k) * inputs + i;
                store_up_to(row, accumulate ? square[k] + load_up_to(row, inputs - i) : square[k], inputs - i);
            }
        }
    }
}

// Weights of all layers, [numbers] each; null where they are zero.
template <class W>
struct Weights {
    W *anchor, *change, *momentum;
};

// What enters a layer, for each token of a piece: rows of `rows` numbers, the last of which may be the bias's one.
template <class W>
void put_ones(const Layer& layer, int64_t size, W* entering) {
    for (int64_t i = 0; i < size && layer.biased(); i++) entering[i * layer.rows + layer.inputs] = 1;
}

// What a piece's gates make of A, C, S and steps: rows of tokens.
template <class W>
struct Gates {
    W *reach, *keep, *lose, *push, *carry;  // reach, a, a - 1, d and m from the piece's start
    W *keeps, *carries, *written;           // a_ts, m_ts and p_ts, zeros for s > t; the last m is what reaches the end
    W *alpha, *gamma, *delta, *pi;

    Gates() = default;
    Gates(int64_t n, bool momentum, Arena<W>& arena) {
        for (W** each : {&reach, &keep, &lose, &push, &carry, &alpha, &gamma, &delta}) *each = arena.take(n);
        keeps = arena.take(n * n);
        carries = momentum ? arena.take(n * n) : nullptr;
        written = momentum ? arena.take(n * n) : keeps;
        pi = arena.take(n * n);
    }
};

template <class T>
struct Piece {
    using W = Wide<T>;
    struct Inside {
        W* entering;        // x: [size, rows]
        W *slope, *bend;    // gelu's derivatives at what leaves, but for the last layer
        W* back;            // the error after gelu, likewise
        W* errors;          // e: [size, columns]
    };
    Span span;
    Weights<const W> before;
    Gates<W> gates;
    std::vector<Inside> layers;
    W *unit, *spread;  // of the norm of what is read
    W* aim;            // k + norm_bias - v
    W* plain;          // errors of the last layer without the rate

    // Take the memory of a piece of `size` tokens.
    void lay_out(const Inputs<T>& x, int64_t size, Arena<W>& arena) {
        gates = Gates<W>(size, x.log_momentum, arena);
        layers.resize(x.layers.size());
        for (size_t n = 0; n < x.layers.size(); n++) {
            const Layer& layer = x.layers[n];
            Inside& c = layers[n];
            c.entering = arena.take(size * layer.rows);
            c.errors = arena.take(size * layer.columns);
            if (n + 1 == x.layers.size()) continue;
            for (W** each : {&c.slope, &c.bend, &c.back}) *each = arena.take(size * layer.columns);
        }
        for (W** each : {&unit, &aim, &plain}) *each = arena.take(size * x.value);
        spread = arena.take(size);
    }
};

// One head of one sequence.
template <class T>
struct Head : HeadPlace {
    using W = Wide<T>;
    const Inputs<T>& x;

    Head(const Inputs<T>& x, int64_t index) : HeadPlace(x.time, x.heads, index), x(x) {}
    const W* initial() const { return x.weights + head * x.numbers; }
    // The weights that the call was given.
    Weights<const W> given() const {
        const int64_t first = index() * x.numbers;
        if (!x.anchor) return {initial(), nullptr, nullptr};
        return {x.anchor + first, x.change + first, x.log_momentum ? x.momentum + first : nullptr};
    }
    const W* norm_weight() const { return x.norm_weight + head * x.value; }
    const W* norm_bias() const { return x.norm_bias + head * x.value; }
    int64_t kept(int64_t segment) const { return (index() * x.kept_states() + segment - 1) * x.kept_numbers(); }
};

// Neighbouring heads of one sequence. They go through a segment one after the other before the next one: a token's rows
// of all heads share pages of memory, which are found sooner when they have just been used.
template <class T>
struct Heads {
    const Inputs<T>& x;
    int64_t row, begin, end;

    Head<T> operator[](int64_t head) const { return {x, row * x.heads + head}; }
};

// Rows of a head's tokens lie far apart, each on a page of its own: ask for those of the next piece while this one is
// computed, or waiting for them takes longer than that.
template <bool TO_WRITE = false, class T>
void ask_for(const Head<T>& head, const Span* span, int64_t width, const T* rows) {
    if (!span) return;
    for (int64_t i = 0; i < span->size; i++) {
        const T* row = rows + head.at(span->begin + i) * width;
        for (int64_t o = 0; o < width; o += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + o, TO_WRITE);
        __builtin_prefetch(row + width - 1, TO_WRITE);
    }
}

// The products of gates from token s to t, of those from s + 1 on: `pairs` is [size, size]; `totals` [size] those from
// the piece's start, and `less_one` them less 1.
template <class T>
void decays(const Head<T>& head, const Span& span, const Wide<T>* log, Wide<T>* pairs, Wide<T>* totals,
            Wide<T>* less_one) {
    using W = Wide<T>;
    const int64_t n = span.size;
    decays_between<PIECE>(n, [&](int64_t i) { return log[head.at(span.begin + i)]; }, pairs, n, totals);
    if (less_one) {
        for_each_vector<W>(n, [&](int64_t i, auto load, auto store) { store(less_one + i, expm1(load(totals + i))); });
    }
    exponentials(n, totals);
}

template <class T>
void gate(const Head<T>& head, Piece<T>& c) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const Span& span = c.span;
    const Gates<W>& g = c.gates;
    const int64_t n = span.size;
    if (x.log_keep) {
        decays(head, span, x.log_keep, g.keeps, g.keep, g.lose);
    } else {
        for (int64_t i = 0; i < n; i++) {
            std::fill_n(g.keeps + i * n, i + 1, W(1));
            std::fill(g.keeps + i * n + i + 1, g.keeps + (i + 1) * n, W(0));
        }
        std::fill_n(g.keep, n, W(1));
        std::fill_n(g.lose, n, W(0));
    }
    if (x.log_momentum) {
        decays(head, span, x.log_momentum, g.carries, g.carry, static_cast<W*>(nullptr));
        gemm({n, n, n}, matrix(g.keeps, n), matrix(g.carries, n), Matrix<W>{g.written, n});
    }
    for (int64_t i = 0; i < n; i++) {
        g.reach[i] = x.reach ? x.reach[span.place + i] : W(1);
        g.push[i] = x.log_momentum ? dot(i + 1, g.keeps + i * n, g.carry) : W(0);
        g.alpha[i] = g.reach[i] * g.lose[i];
        g.gamma[i] = g.reach[i] * g.keep[i];
        g.delta[i] = g.reach[i] * g.push[i];
        scaled(n, g.reach[i], g.written + i * n, g.pi + i * n);
    }
}

// Rows of tokens, with the bias's one.
template <class T>
void gather(const Head<T>& head, const Span& span, const T* from, Wide<T>* to) {
    const Layer& layer = head.x.layers[0];
    for (int64_t i = 0; i < span.size; i++) {
        copy_row(layer.inputs, from + head.at(span.begin + i) * layer.inputs, to + i * layer.rows);
    }
    put_ones(layer, span.size, to);
}

// Rows of gelu of what leaves layer `n`, as what enters the next.
template <class T>
void enter_next(const Inputs<T>& x, int64_t n, int64_t size, const Wide<T>* leaving, Wide<T>* entering, Wide<T>* slope,
                Wide<T>* bend) {
    const Layer &layer = x.layers[n], &next = x.layers[n + 1];
    const int64_t width = layer.columns;
    for (int64_t i = 0; i < size; i++) {
        activate(width, x.tanh, leaving + i * width, entering + i * next.rows, slope + i * width,
                 bend ? bend + i * width : nullptr);
    }
    put_ones(next, size, entering);
}

// to = factors from, row by row.
template <class W>
void scale_rows(int64_t size, int64_t width, const W* factors, const W* from, W* to) {
    for (int64_t i = 0; i < size; i++) scaled(width, factors[i], from + i * width, to + i * width);
}

// Errors where there is a norm, in double: what they are rounded by comes back in every later weight.
template <class T>
void norm_errors(const Head<T>& head, Piece<T>& c, const Wide<T>* read, Wide<T>* errors) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const int64_t value = x.value;
    double* scale = workspace<3, double>(6 * value);
    double *bias = scale + value, *row = bias + value, *unit = row + value, *aim = unit + value, *plain = aim + value;
    std::copy_n(head.norm_weight(), value, scale);
    std::copy_n(head.norm_bias(), value, bias);
    for (int64_t i = 0; i < c.span.size; i++) {
        const int64_t at = head.at(c.span.begin + i), to = i * value;
        const T *v = x.v + at * value, *k = x.k + at * value;
        const double rate = x.rate[at];
        std::copy_n(read + to, value, row);
        const double spread = normalize(value, double(x.eps), row, unit);
        for (int64_t o = 0; o < value; o++) {
            aim[o] = widen(k[o]) + bias[o] - widen(v[o]);
            plain[o] = scale[o] * (scale[o] * unit[o] + aim[o]);
        }
        normalize_back(value, spread, unit, plain, plain);
        c.spread[i] = W(spread);
        for (int64_t o = 0; o < value; o++) {
            c.unit[to + o] = W(unit[o]);
            c.aim[to + o] = W(aim[o]);
            c.plain[to + o] = W(plain[o]);
            errors[to + o] = W(rate * plain[o]);
        }
    }
}

// A piece's keys through the network at A, and their errors back. `again`: for the backward, which takes more of it.
template <class T>
void learn(const Head<T>& head, Piece<T>& c, bool again) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const int64_t n = c.span.size, depth = x.layers.size(), value = x.value;
    W* leaving = workspace<1, W>(PIECE * x.widest);
    gather(head, c.span, x.k, c.layers[0].entering);
    for (int64_t index = 0; index < depth; index++) {
        const Layer& layer = x.layers[index];
        auto& inside = c.layers[index];
        gemm({n, layer.columns, layer.rows}, matrix<W>(inside.entering, layer.rows),
             matrix(c.before.anchor + layer.at, layer.columns), Matrix<W>{leaving, layer.columns});
        if (index + 1 < depth) {
            enter_next(x, index, n, leaving, c.layers[index + 1].entering, inside.slope, again ? inside.bend : nullptr);
        }
    }
    W* errors = c.layers[depth - 1].errors;
    if (x.norm_weight) {
        norm_errors(head, c, leaving, errors);
    } else {
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = head.at(c.span.begin + i);
            const T* v = x.v + at * value;
            W *plain = c.plain + i * value, *read = leaving + i * value;
            for_each_vector<W>(value, [&](int64_t o, auto load, auto store) {
                store(plain + o, load(read + o) - load(v + o));
            });
            scaled(value, x.rate[at], plain, errors + i * value);
        }
    }
    for (int64_t index = depth - 1; index > 0; index--) {
        const Layer& layer = x.layers[index];
        auto& inside = c.layers[index - 1];
        back_through<W>(n, layer, c.layers[index].errors, c.before.anchor + layer.at, inside.back, W(1), false);
        for_each_vector<W>(n * layer.inputs, [&](int64_t i, auto load, auto store) {
            store(inside.errors + i, load(inside.back + i) * load(inside.slope + i));
        });
    }
}

// A, C and S after the piece; `to` may be what entered it. C is left alone after a whole chunk, where it is zero.
template <class T>
void write(const Inputs<T>& x, const Piece<T>& c, const Weights<Wide<T>>& to) {
    using W = Wide<T>;
    const Gates<W>& g = c.gates;
    const int64_t n = c.span.size, end = n - 1;
    const auto& from = c.before;
    const bool whole = c.span.whole;
    W keep = whole ? g.alpha[end] : g.lose[end], change = whole ? g.gamma[end] : g.keep[end];
    W push = whole ? g.delta[end] : g.push[end], *next = whole ? to.anchor : to.change;
    for_each_vector<W>(x.numbers, [&](int64_t i, auto load, auto store) {
        Vec<W> a = load(from.anchor + i), y = a * keep;
        if (from.change) y = fma(broadcast<Vec<W>>(change), load(from.change + i), y);
        if (x.log_momentum) {
            Vec<W> s = from.momentum ? load(from.momentum + i) : Vec<W>{};
            y -= push * s;
            store(to.momentum + i, g.carry[end] * s);
        }
        // Last: what is added to A is small beside it.
        store(next + i, whole ? a + y : y);
        if (!whole) store(to.anchor + i, a);
    });
    W* steps = workspace<1, W>(PIECE * x.widest);
    for (size_t index = 0; index < x.layers.size(); index++) {
        const Layer& layer = x.layers[index];
        const auto& inside = c.layers[index];
        auto add = [&](const W* shares, W* weights, W sign) {
            scale_rows(n, layer.columns, shares, inside.errors, steps);
            gemm({layer.rows, layer.columns, n}, matrix<W>(inside.entering, layer.rows).transposed(),
                 matrix<W>(steps, layer.columns), Matrix<W>{weights + layer.at, layer.columns}, sign, true);
        };
        add((whole ? g.pi : g.written) + end * n, next, W(-1));
        if (x.log_momentum) add(g.carries + end * n, to.momentum, W(1));
    }
}

// What a piece's queries read, and what that needs of each layer.
template <class T>
struct Reading {
    using W = Wide<T>;
    struct Inside {
        W* entering;  // z: [size, rows]
        W* overlaps;  // z x^T: [size, size]
        W* slope;
        W *of_anchor, *of_change, *of_momentum;  // z A, z C, z S: [size, columns]
    };
    std::vector<Inside> layers;
    W *scores, *leaving;

    Reading(const Inputs<T>& x, int64_t size, Arena<W>& arena) {
        for (const Layer& layer : x.layers) {
            Inside inside;
            inside.entering = arena.take(size * layer.rows);
            inside.overlaps = arena.take(size * size);
            for (W** each : {&inside.slope, &inside.of_anchor, &inside.of_change, &inside.of_momentum}) {
                *each = arena.take(size * layer.columns);
            }
            layers.push_back(inside);
        }
        scores = arena.take(size * size);
        leaving = arena.take(size * x.widest);
    }
};

// Queries through the network, each with its own weights; `leaving` becomes what they read.
template <class T>
void read(const Head<T>& head, const Piece<T>& c, Reading<T>& r) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const Gates<W>& g = c.gates;
    const int64_t n = c.span.size, depth = x.layers.size();
    gather(head, c.span, x.q, r.layers[0].entering);
    for (int64_t index = 0; index < depth; index++) {
        const Layer& layer = x.layers[index];
        const auto &keys = c.layers[index], &inside = r.layers[index];
        const int64_t width = layer.columns;
        auto z = matrix<W>(inside.entering, layer.rows);
        auto times = [&](const W* weights, W* to) {
            gemm({n, width, layer.rows}, z, matrix(weights + layer.at, width), Matrix<W>{to, width});
        };
        times(c.before.anchor, inside.of_anchor);
        if (c.before.change) times(c.before.change, inside.of_change);
        if (c.before.momentum) times(c.before.momentum, inside.of_momentum);
        gemm({n, n, layer.rows}, z, matrix<W>(keys.entering, layer.rows).transposed(), Matrix<W>{inside.overlaps, n});
        for_each_vector<W>(n * n, [&](int64_t i, auto load, auto store) {
            store(r.scores + i, load(inside.overlaps + i) * load(g.pi + i));
        });
        for (int64_t i = 0; i < n; i++) {
            W* to = r.leaving + i * width;
            copy_row(width, inside.of_anchor + i * width, to);
            if (x.log_keep) add_scaled(width, g.alpha[i], inside.of_anchor + i * width, to);
            if (c.before.change) add_scaled(width, g.gamma[i], inside.of_change + i * width, to);
            if (c.before.momentum) add_scaled(width, -g.delta[i], inside.of_momentum + i * width, to);
        }
        gemm({n, width, n}, matrix<W>(r.scores, n), matrix<W>(keys.errors, width), Matrix<W>{r.leaving, width}, W(-1),
             true);
        if (index + 1 < depth) {
            enter_next(x, index, n, r.leaving, r.layers[index + 1].entering, inside.slope, static_cast<W*>(nullptr));
        }
    }
}

template <class T>
struct Outputs {
    using W = Wide<T>;
    T* o;
    W *anchor, *change, *momentum;
    int64_t* position;
    W* kept;

    Weights<W> last(const Head<T>& head) const {
        const int64_t first = head.index() * head.x.numbers;
        return {anchor + first, change + first, head.x.log_momentum ? momentum + first : nullptr};
    }
};

// The pieces of one segment; `before` becomes what enters the next.
template <class T>
void forward_segment(const Head<T>& head, const Span* begin, const Span* end, Piece<T>& c, Reading<T>& r,
                     Weights<const Wide<T>>& before, const Outputs<T>& y) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const int64_t value = x.value;
    W* unit = workspace<2, W>(value);
    const Weights<W> running = y.last(head);
    for (const Span* span = begin; span < end; span++) {
        const Span* next = span + 1 < end ? span + 1 : nullptr;
        if (span->fresh) before = {head.initial(), nullptr, nullptr};
        c.span = *span;
        c.before = before;
        ask_for(head, next, x.key, x.k);
        gate(head, c);
        ask_for(head, next, value, x.v);
        learn(head, c, false);
        ask_for(head, next, x.key, x.q);
        ask_for<true>(head, span, value, y.o);
        read(head, c, r);
        for (int64_t i = 0; i < span->size; i++) {
            const int64_t at = head.at(span->begin + i) * value;
            const W* out = r.leaving + i * value;
            if (!x.norm_weight) {
                copy_row(value, out, y.o + at);
                continue;
            }
            const W *scale = head.norm_weight(), *bias = head.norm_bias();
            normalize(value, x.eps, out, unit);
            for_each_vector<T>(value, [&](int64_t o, auto load, auto store) {
                store(y.o + at + o, load(x.q + at + o) + fma(load(scale + o), load(unit + o), load(bias + o)));
            });
        }
        if (span->last) continue;
        write(x, c, running);
        before = {running.anchor, span->whole ? nullptr : running.change, running.momentum};
    }
}

template <class T>
void forward(const Heads<T>& heads, const Outputs<T>& y) {
    using W = Wide<T>;
    const Inputs<T>& x = heads.x;
    const int64_t size = x.piece(), numbers = x.numbers;
    Piece<T> c;
    Arena<W> count;
    c.lay_out(x, size, count);
    Reading<T>(x, size, count);
    Arena<W> arena{workspace<0, W>(count.used)};
    c.lay_out(x, size, arena);
    Reading<T> r(x, size, arena);

    std::vector<Weights<const W>> before;
    for (int64_t n = heads.begin; n < heads.end; n++) before.push_back(heads[n].given());
    const std::vector<Span> spans = x.spans(heads.row);
    const std::vector<const Span*> segments = x.segments(spans);
    for (size_t index = 0; index + 1 < segments.size(); index++) {
        for (int64_t n = heads.begin; n < heads.end; n++) {
            const Head<T> head = heads[n];
            Weights<const W>& entering = before[n - heads.begin];
            W* to = y.kept + (index ? head.kept(segments[index]->begin / x.segment()) : 0);
            auto keep = [&](const W* from) {
                from ? std::copy_n(from, numbers, to) : std::fill_n(to, numbers, W(0));
                to += numbers;
            };
            if (index) {
                keep(entering.anchor);
                if (x.log_momentum) keep(entering.momentum);
                if (x.chunk > PIECE) keep(entering.change);
            }
            forward_segment(head, segments[index], segments[index + 1], c, r, entering, y);
        }
    }
    const Span& last = spans.back();
    for (int64_t n = heads.begin; n < heads.end && last.whole; n++) {
        std::fill_n(y.last(heads[n]).change, numbers, W(0));
    }
    if (heads.begin == 0) y.position[heads.row] = last.whole ? 0 : last.place + last.size;
}

template <class T>
struct Gradients {
    using W = Wide<T>;
    // Of the outputs.
    const T* o;
    Weights<const W> last;
    const W* kept;
    // Of the inputs; those that rows or heads share for each of them: [batch, head, ...].
    T *q, *k, *v;
    W *rate, *initial, *norm_weight, *norm_bias;
    double* reach;
    W *log_momentum, *log_keep;
    Weights<W> given;

    // Of the weights between the pieces.
    Weights<W> running(const Head<T>& head) const {
        const int64_t first = head.index() * head.x.numbers;
        return {given.anchor + first, given.change + first, head.x.log_momentum ? given.momentum + first : nullptr};
    }
};

// Zeros, where there is anything.
template <class W>
void clear(int64_t count, W* numbers) {
    if (numbers) std::fill_n(numbers, count, W(0));
}

// Gradients of what a piece's steps made.
template <class T>
struct PieceGradients {
    using W = Wide<T>;
    struct Inside {
        W* entering;  // of x: [size, inputs]
        W* errors;    // of e, then of what leaves: [size, columns]
    };
    std::vector<Inside> layers;
    Gates<W> gates;  // without `lose`, whose gradient is that of `keep`, and without `reach` and `keeps`
    W* written;
    W *first, *second, *pairs;

    PieceGradients(const Inputs<T>& x, int64_t size, Arena<W>& arena) {
        for (const Layer& layer : x.layers) {
            layers.push_back({arena.take(size * layer.inputs), arena.take(size * layer.columns)});
        }
        for (W** each : {&first, &second}) *each = arena.take(size * x.widest);
        pairs = arena.take(size * size);
        gates = Gates<W>(size, true, arena);
    }

    void clear(int64_t n) {
        for (W* each : {gates.keep, gates.push, gates.carry, gates.alpha, gates.gamma, gates.delta}) {
            std::fill_n(each, n, W(0));
        }
        for (W* each : {gates.carries, gates.written, gates.pi}) std::fill_n(each, n * n, W(0));
    }
};

// From the gradients of A, C and S after a piece to those before it, in place, as far as they go past its tokens.
template <class T>
void unwrite(const Inputs<T>& x, const Piece<T>& c, PieceGradients<T>& d, const Weights<Wide<T>>& of) {
    using W = Wide<T>;
    const Gates<W>& g = c.gates;
    const int64_t n = c.span.size, end = n - 1;
    const auto& from = c.before;
    const bool whole = c.span.whole, momentum = x.log_momentum;
    W* next = whole ? of.anchor : of.change;
    for (size_t index = 0; index < x.layers.size(); index++) {
        const Layer& layer = x.layers[index];
        const auto &inside = c.layers[index], &to = d.layers[index];
        const int64_t width = layer.columns;
        std::fill_n(to.errors, n * width, W(0));
        std::fill_n(to.entering, n * layer.inputs, W(0));
        if (c.span.last) continue;
        auto back = [&](const W* weights, const W* shares, W* of_shares, W sign) {
            gemm({n, width, layer.rows}, matrix<W>(inside.entering, layer.rows), matrix(weights + layer.at, width),
                 Matrix<W>{d.first, width});
            for (int64_t i = 0; i < n; i++) {
                const W *step = d.first + i * width, *error = inside.errors + i * width;
                of_shares[i] += sign * dot(width, step, error);
                add_scaled(width, sign * shares[i], step, to.errors + i * width);
                scaled(width, shares[i], error, d.second + i * width);
            }
            back_through<W>(n, layer, d.second, weights + layer.at, to.entering, sign, true);
        };
        back(next, (whole ? g.pi : g.written) + end * n, (whole ? d.gates.pi : d.gates.written) + end * n, W(-1));
        if (momentum) back(of.momentum, g.carries + end * n, d.gates.carries + end * n, W(1));
    }
    if (c.span.last) {
        for (W* each : {of.anchor, of.change, of.momentum}) {
            if (each) std::fill_n(each, x.numbers, W(0));
        }
        return;
    }
    if (whole && !x.log_keep && !momentum && !from.change) return;
    W keep = whole ? g.alpha[end] : g.lose[end], change = whole ? g.gamma[end] : g.keep[end];
    W push = whole ? g.delta[end] : g.push[end], carry = g.carry[end];
    Vec<W> of_keep{}, of_change{}, of_push{}, of_carry{};
    for_each_vector<W>(x.numbers, [&](int64_t i, auto load, auto store) {
        Vec<W> y = load(next + i), kept = fma(broadcast<Vec<W>>(keep), y, load(of.anchor + i));
        of_keep = fma(load(from.anchor + i), y, of_keep);
        if (from.change) of_change = fma(load(from.change + i), y, of_change);
        if (momentum) {
            Vec<W> s = load(of.momentum + i);
            if (from.momentum) {
                Vec<W> before = load(from.momentum + i);
                of_push = fma(before, y, of_push);
                of_carry = fma(before, s, of_carry);
            }
            store(of.momentum + i, s * carry - y * push);
        }
        store(of.anchor + i, kept);
        if (from.change) store(of.change + i, y * change);
    });
    if (whole) {
        d.gates.alpha[end] += sum(of_keep);
        d.gates.gamma[end] += sum(of_change);
        d.gates.delta[end] -= sum(of_push);
    } else {
        d.gates.keep[end] += sum(of_keep) + sum(of_change);
        d.gates.push[end] -= sum(of_push);
    }
    if (momentum) d.gates.carry[end] += sum(of_carry);
}

// The gradients of what queries read, and of all that they read it from.
template <class T>
void unread(const Head<T>& head, const Piece<T>& c, Reading<T>& r, PieceGradients<T>& d, const Weights<Wide<T>>& of,
            const Gradients<T>& all) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const Gates<W>& g = c.gates;
    const int64_t n = c.span.size, value = x.value;
    read(head, c, r);
    W *out = d.first, *into = d.second, *scaled_out = workspace<1, W>(PIECE * x.widest);
    // In double, as in norm_errors.
    double *wide = workspace<3, double>(2 * value), *of_unit = wide + value;
    for (int64_t i = 0; i < n; i++) {
        const T* given = all.o + head.at(c.span.begin + i) * value;
        W *row = out + i * value, *unit = r.leaving + i * value;
        if (!x.norm_weight) {
            copy_row(value, given, row);
            continue;
        }
        const W* scale = head.norm_weight();
        W *of_scale = all.norm_weight + head.index() * value, *of_bias = all.norm_bias + head.index() * value;
        std::copy_n(unit, value, wide);
        const double spread = normalize(value, double(x.eps), wide, wide);
        std::copy_n(wide, value, unit);
        for_each_vector<W>(value, [&](int64_t o, auto load, auto store) {
            Vec<W> y = load(given + o);
            store(of_scale + o, fma(y, load(unit + o), load(of_scale + o)));
            store(of_bias + o, load(of_bias + o) + y);
        });
        for (int64_t o = 0; o < value; o++) of_unit[o] = double(widen(given[o])) * scale[o];
        normalize_back(value, spread, wide, of_unit, of_unit);
        std::copy_n(of_unit, value, row);
    }
    for (int64_t index = x.layers.size() - 1; index >= 0; index--) {
        const Layer& layer = x.layers[index];
        const auto &keys = c.layers[index];
        const auto &inside = r.layers[index];
        const auto &to = d.layers[index];
        const int64_t width = layer.columns, inputs = layer.inputs;
        Matrix<const W> z = matrix<W>(inside.entering, layer.rows), errors = matrix<W>(keys.errors, width);
        Matrix<const W> x_rows = matrix<W>(keys.entering, layer.rows), y = matrix<W>(out, width);
        Matrix<const W> pairs = matrix<W>(d.pairs, n), scores = matrix<W>(r.scores, n);
        gemm({n, n, width}, y, errors.transposed(), Matrix<W>{d.pairs, n});
        for (int64_t i = 0; i < n; i++) {
            const W *overlaps = inside.overlaps + i * n, *pi = g.pi + i * n;
            W *row = d.pairs + i * n, *of_pi = d.gates.pi + i * n, *score = r.scores + i * n;
            for_each_vector<W>(i + 1, [&](int64_t j, auto load, auto store) {
                store(of_pi + j, load(of_pi + j) - load(row + j) * load(overlaps + j));
                store(row + j, load(row + j) * load(pi + j));
                store(score + j, load(overlaps + j) * load(pi + j));
            });
            std::fill(row + i + 1, row + n, W(0));
            std::fill(score + i + 1, score + n, W(0));
        }
        gemm({n, width, n}, scores.transposed(), y, Matrix<W>{to.errors, width}, W(-1), true);
        gemm({n, inputs, n}, pairs.transposed(), z, Matrix<W>{to.entering, inputs}, W(-1), true);
        gemm({n, inputs, n}, pairs, x_rows, Matrix<W>{into, inputs}, W(-1));
        auto through = [&](const W* weights, W* of_weights, const W* factors, W sign, const W* read, W* of_factors) {
            const W* rows = out;
            if (factors) {
                for (int64_t i = 0; i < n; i++) {
                    of_factors[i] += sign * dot(width, out + i * width, read + i * width);
                    scaled(width, factors[i], out + i * width, scaled_out + i * width);
                    if (factors == g.alpha) add_scaled(width, W(1), out + i * width, scaled_out + i * width);
                }
                rows = scaled_out;
            }
            back_through(n, layer, rows, weights + layer.at, into, sign, true);
            gemm({layer.rows, width, n}, z.transposed(), matrix(rows, width), Matrix<W>{of_weights + layer.at, width},
                 sign, true);
        };
        through(c.before.anchor, of.anchor, x.log_keep ? g.alpha : nullptr, W(1), inside.of_anchor, d.gates.alpha);
        if (c.before.change) {
            through(c.before.change, of.change, g.gamma, W(1), inside.of_change, d.gates.gamma);
        }
        if (c.before.momentum) {
            through(c.before.momentum, of.momentum, g.delta, W(-1), inside.of_momentum, d.gates.delta);
        }
        if (index) {
            const W* slope = r.layers[index - 1].slope;
            for_each_vector<W>(n * inputs, [&](int64_t i, auto load, auto store) {
                store(into + i, load(into + i) * load(slope + i));
            });
            std::swap(out, into);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = head.at(c.span.begin + i);
        const W* row = into + i * x.key;
        if (!x.norm_weight) {
            copy_row(x.key, row, all.q + at * x.key);
            continue;
        }
        for_each_vector<T>(value, [&](int64_t o, auto load, auto store) {
            store(all.q + at * value + o, load(row + o) + load(all.o + at * value + o));
        });
    }
}

// The gradient of the gradient: from those of errors to those of keys, values, rates, the norm and A.
template <class T>
void unlearn(const Head<T>& head, const Piece<T>& c, PieceGradients<T>& d, const Weights<Wide<T>>& of,
             const Gradients<T>& all) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const int64_t n = c.span.size, depth = x.layers.size(), value = x.value;
    for (int64_t index = 0; index + 1 < depth; index++) {
        const Layer& next = x.layers[index + 1];
        const auto &keys = c.layers[index], &later = c.layers[index + 1];
        W* errors = d.layers[index].errors;
        const int64_t width = next.inputs;
        for_each_vector<W>(n * width, [&](int64_t i, auto load, auto store) {
            Vec<W> y = load(errors + i);
            store(d.first + i, y * load(keys.slope + i));
            store(errors + i, y * load(keys.back + i) * load(keys.bend + i));
        });
        gemm({n, next.columns, width}, matrix<W>(d.first, width), matrix(c.before.anchor + next.at, next.columns),
             Matrix<W>{d.layers[index + 1].errors, next.columns}, W(1), true);
        gemm({width, next.columns, n}, matrix<W>(d.first, width).transposed(), matrix<W>(later.errors, next.columns),
             Matrix<W>{of.anchor + next.at, next.columns}, W(1), true);
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = head.at(c.span.begin + i);
        const W *plain = c.plain + i * value, *unit = c.unit + i * value, *aim = c.aim + i * value;
        W* row = d.layers[depth - 1].errors + i * value;
        const W along = dot(value, row, plain), rate = x.rate[at];
        all.rate[at] = along;
        scaled(value, rate, row, row);
        if (!x.norm_weight) {
            scaled(value, W(-1), row, all.v + at * value);
            continue;
        }
        const W *scale = head.norm_weight(), spread = c.spread[i];
        W *of_scale = all.norm_weight + head.index() * value, *of_bias = all.norm_bias + head.index() * value;
        W *of_key = d.layers[0].entering + i * value, *of_wrong = d.first, *wrong = d.second;
        for_each_vector<W>(value, [&](int64_t o, auto load, auto store) {
            Vec<W> factor = load(scale + o);
            store(wrong + o, factor * fma(factor, load(unit + o), load(aim + o)));
        });
        const W of_row = dot(value, unit, row) / W(value), of_unit = dot(value, unit, wrong) / W(value);
        normalize_back(value, spread, unit, row, of_wrong);
        for_each_vector<W>(value, [&](int64_t o, auto load, auto store) {
            Vec<W> factor = load(scale + o), u = load(unit + o), w = load(of_wrong + o), y = w * factor;
            Vec<W> off = fma(factor, 2 * u, load(aim + o));
            store(of_scale + o, fma(w, off, load(of_scale + o)));
            store(of_bias + o, load(of_bias + o) + y);
            store(of_key + o, load(of_key + o) + y);
            store(row + o, y * factor - spread * (load(row + o) * of_unit + load(wrong + o) * of_row));
            store(of_wrong + o, -y);
        });
        copy_row(value, of_wrong, all.v + at * value);
        normalize_back(value, spread, unit, row, row);
        add_scaled(value, -spread * rate * along / W(value), unit, row);
    }
    for (int64_t index = depth - 1; index >= 0; index--) {
        const Layer& layer = x.layers[index];
        const int64_t width = layer.columns, inputs = layer.inputs;
        const auto& to = d.layers[index];
        auto leaving = matrix<W>(to.errors, width);
        gemm({layer.rows, width, n}, matrix<W>(c.layers[index].entering, layer.rows).transposed(), leaving,
             Matrix<W>{of.anchor + layer.at, width}, W(1), true);
        back_through<W>(n, layer, to.errors, c.before.anchor + layer.at, to.entering, W(1), true);
        if (index == 0) break;
        const W* slope = c.layers[index - 1].slope;
        W* before = d.layers[index - 1].errors;
        for_each_vector<W>(n * inputs, [&](int64_t i, auto load, auto store) {
            store(before + i, fma(load(to.entering + i), load(slope + i), load(before + i)));
        });
    }
    for (int64_t i = 0; i < n; i++) {
        copy_row(x.key, d.layers[0].entering + i * x.key, all.k + head.at(c.span.begin + i) * x.key);
    }
}

// A gate's gradient is the sum over all products that it is in, of what the product is times its gradient.
template <class T>
void undecay(const Head<T>& head, const Span& span, const Wide<T>* pairs, const Wide<T>* totals,
             const Wide<T>* of_pairs, const Wide<T>* of_totals, Wide<T>* of_log) {
    using W = Wide<T>;
    const int64_t n = span.size;
    W found[PIECE] = {};
    for (int64_t i = 0; i < n; i++) {
        W so_far = totals[i] * of_totals[i];
        for (int64_t j = 0; j <= i; j++) {
            found[j] += so_far;
            so_far += pairs[i * n + j] * of_pairs[i * n + j];
        }
    }
    for (int64_t i = 0; i < n; i++) of_log[head.at(span.begin + i)] = found[i];
}

template <class T>
void ungate(const Head<T>& head, const Piece<T>& c, PieceGradients<T>& d, const Gradients<T>& all) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const Gates<W>&g = c.gates, &of = d.gates;
    const int64_t n = c.span.size;
    for (int64_t i = 0; i < n; i++) {
        const W *pi = of.pi + i * n, reach = g.reach[i];
        if (x.reach) {
            double& to = all.reach[head.index() * x.chunk + c.span.place + i];
            to += double(g.lose[i]) * of.alpha[i];
            to += double(g.keep[i]) * of.gamma[i];
            to += double(g.push[i]) * of.delta[i];
            for (int64_t j = 0; j <= i; j++) to += double(g.written[i * n + j]) * pi[j];
        }
        of.keep[i] += reach * (of.alpha[i] + of.gamma[i]);
        of.push[i] += reach * of.delta[i];
        add_scaled(i + 1, reach, pi, of.written + i * n);
    }
    const W* of_keeps = of.written;
    if (x.log_momentum) {
        auto written = matrix<W>(of.written, n), keeps = matrix<W>(g.keeps, n);
        gemm({n, n, n}, keeps.transposed(), written, Matrix<W>{of.carries, n}, W(1), true);
        gemm({n, n, n}, written, matrix<W>(g.carries, n).transposed(), Matrix<W>{d.pairs, n});
        for (int64_t i = 0; i < n; i++) {
            add_scaled(i + 1, of.push[i], g.keeps + i * n, of.carry);
            add_scaled(i + 1, of.push[i], g.carry, d.pairs + i * n);
        }
        of_keeps = d.pairs;
        undecay(head, c.span, g.carries, g.carry, of.carries, of.carry, all.log_momentum);
    }
    if (x.log_keep) undecay(head, c.span, g.keeps, g.keep, of_keeps, of.keep, all.log_keep);
}

// A segment's pieces, with the weights that enter each of them.
template <class T>
struct Segment {
    using W = Wide<T>;
    std::vector<Piece<T>> pieces;
    std::vector<Weights<W>> entering;

    void lay_out(const Inputs<T>& x, const Span* begin, const Span* end, Arena<W>& arena) {
        pieces.clear();
        entering.clear();
        for (const Span* span = begin; span != end; span++) {
            pieces.emplace_back();
            pieces.back().span = *span;
            pieces.back().lay_out(x, span->size, arena);
            const bool written = span != begin && !span->fresh, open = written && !span[-1].whole;
            auto take = [&](bool needed) { return needed ? arena.take(x.numbers) : nullptr; };
            W* anchor = take(written);
            W* change = take(open);
            entering.push_back({anchor, change, take(written && x.log_momentum)});
        }
    }

    // Walk the pieces again, from the weights that enter the first.
    void walk(const Head<T>& head, const Weights<const W>& first) {
        const Inputs<T>& x = head.x;
        for (size_t index = 0; index < pieces.size(); index++) {
            Piece<T>& c = pieces[index];
            const Weights<W>& here = entering[index];
            if (c.span.fresh) {
                c.before = {head.initial(), nullptr, nullptr};
            } else if (index == 0) {
                c.before = first;
            } else {
                write(x, pieces[index - 1], here);
                c.before = {here.anchor, here.change, here.momentum};
            }
            const Span* next = index + 1 < pieces.size() ? &pieces[index + 1].span : nullptr;
            ask_for(head, next, x.key, x.k);
            gate(head, c);
            ask_for(head, next, x.value, x.v);
            learn(head, c, true);
        }
    }
};

// The pieces of one segment, from the gradients of the weights that leave it to those of the weights that enter.
template <class T>
void backward_segment(const Head<T>& head, const Segment<T>& segment, Reading<T>& r, PieceGradients<T>& inside,
                      const Gradients<T>& d) {
    using W = Wide<T>;
    const Inputs<T>& x = head.x;
    const Weights<W> of = d.running(head);
    for (size_t index = segment.pieces.size(); index-- > 0;) {
        const Piece<T>& c = segment.pieces[index];
        const Span* next = index ? &segment.pieces[index - 1].span : nullptr;
        inside.clear(c.span.size);
        ask_for<true>(head, &c.span, x.key, d.q);
        unwrite(x, c, inside, of);
        ask_for(head, next, x.key, x.q);
        ask_for<true>(head, &c.span, x.key, d.k);
        unread(head, c, r, inside, of, d);
        ask_for(head, next, x.value, d.o);
        ask_for<true>(head, &c.span, x.value, d.v);
        unlearn(head, c, inside, of, d);
        ungate(head, c, inside, d);
        if (!c.span.fresh) continue;
        add_scaled(x.numbers, W(1), of.anchor, d.initial + head.index() * x.numbers);
        for (W* each : {of.anchor, of.change, of.momentum}) clear(x.numbers, each);
    }
}

template <class T>
void backward(const Heads<T>& heads, const Gradients<T>& d) {
    using W = Wide<T>;
    const Inputs<T>& x = heads.x;
    const int64_t numbers = x.numbers, size = x.piece();
    const std::vector<Span> spans = x.spans(heads.row);
    const std::vector<const Span*> segments = x.segments(spans);

    Arena<W> count;
    Reading<T>(x, size, count);
    PieceGradients<T>(x, size, count);
    Segment<T> segment;
    int64_t most = 0;
    for (size_t n = 0; n + 1 < segments.size(); n++) {
        Arena<W> of_segment = count;
        segment.lay_out(x, segments[n], segments[n + 1], of_segment);
        most = std::max(most, of_segment.used);
    }
    Arena<W> arena{workspace<0, W>(most)};
    Reading<T> r(x, size, arena);
    PieceGradients<T> inside(x, size, arena);

    for (int64_t n = heads.begin; n < heads.end; n++) {
        const int64_t index = heads[n].index(), first = index * numbers;
        const Weights<W> of = d.running(heads[n]);
        std::copy_n(d.last.anchor + first, numbers, of.anchor);
        std::copy_n(d.last.change + first, numbers, of.change);
        if (of.momentum) std::copy_n(d.last.momentum + first, numbers, of.momentum);
        clear(numbers, d.initial + first);
        if (d.norm_weight) clear(x.value, d.norm_weight + index * x.value);
        if (d.norm_bias) clear(x.value, d.norm_bias + index * x.value);
        if (d.reach) clear(x.chunk, d.reach + index * x.chunk);
    }
    for (size_t index = segments.size() - 1; index-- > 0;) {
        Arena<W> of_segment = arena;
        segment.lay_out(x, segments[index], segments[index + 1], of_segment);
        for (int64_t n = heads.begin; n < heads.end; n++) {
            const Head<T> head = heads[n];
            Weights<const W> before = head.given();
            if (index) {
                const W* kept = d.kept + head.kept(segments[index]->begin / x.segment());
                const W* momentum = kept + numbers;
                const W* change = momentum + (x.log_momentum ? numbers : 0);
                before = {kept, segments[index][-1].whole ? nullptr : change, x.log_momentum ? momentum : nullptr};
            }
            segment.walk(head, before);
            backward_segment(head, segment, r, inside, d);
        }
    }
}

// Call run(heads) for the heads of all sequences, in as many groups as keep all threads busy.
template <class T, class Run>
void for_all_heads(int64_t threads, const Inputs<T>& x, Run run) {
    threads = busy_threads(threads, x.time * x.batch * x.heads * x.numbers);
    const int64_t groups = threads == 1 ? 1 : std::min(x.heads, (4 * threads + x.batch - 1) / x.batch);
    parallel_for(int(threads), x.batch * groups, [&](int64_t task) {
        const int64_t group = task % groups;
        run(Heads<T>{x, task / groups, group * x.heads / groups, (group + 1) * x.heads / groups});
    });
}

template <class T>
Inputs<T> inputs(const int64_t* sizes, const int64_t* layers, bool tanh, double eps, const void* const* tensors) {
    using W = Wide<T>;
    auto wide = [&](int n) { return static_cast<const W*>(tensors[n]); };
    auto tokens = [&](int n) { return static_cast<const T*>(tensors[n]); };
    Inputs<T> x{sizes[0],  sizes[1],  sizes[2], sizes[3], sizes[4],  sizes[5], tokens(0), tokens(1), tokens(2),
                wide(3),   wide(4),   wide(5),  wide(6),  wide(7),   wide(8),  wide(9),   wide(10),  wide(11),
                wide(12),  static_cast<const int64_t*>(tensors[13]), static_cast<const uint8_t*>(tensors[14]),
                tanh,      W(eps),    {}};
    x.set_layers(sizes[6], layers);
    return x;
}

}  // namespace
}  // namespace seqzoo

using namespace seqzoo;

// sizes: batch, time, heads, key, value, chunk and depth; layers: rows and columns of each. `in` holds pointers to the
// tensors of __init__.py in its order, weights, and those of a state, as [.., head, numbers] of all layers; then the
// position and starts. `out`: o, the last anchor, change, momentum and position, and [batch, head, segment, numbers] of
// A, and S and C where there are any, that enter the segments after the first.
SEQZOO_EXPORT void fast_weights_forward(int64_t dtype, int64_t threads, const int64_t* sizes, const int64_t* layers,
                                        int64_t tanh, double eps, const void* const* in, void* const* out) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto wide = [&](int n) { return static_cast<Wide<T>*>(out[n]); };
        Inputs<T> x = inputs<T>(sizes, layers, tanh, eps, in);
        Outputs<T> y{static_cast<T*>(out[0]), wide(1), wide(2), wide(3), static_cast<int64_t*>(out[4]), wide(5)};
        for_all_heads(threads, x, [&](const Heads<T>& heads) { forward(heads, y); });
    });
}

// `given`: gradients of o and of the last anchor, change and momentum, then what was kept. `out`: those of q, k, v,
// rate, weights, norm_weight, norm_bias, reach (in double), log_momentum, log_keep, anchor, change and momentum; of what
// heads or rows share, for each of them.
SEQZOO_EXPORT void fast_weights_backward(int64_t dtype, int64_t threads, const int64_t* sizes, const int64_t* layers,
                                         int64_t tanh, double eps, const void* const* in, const void* const* given,
                                         void* const* out) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto wide = [&](int n) { return static_cast<W*>(out[n]); };
        auto last = [&](int n) { return static_cast<const W*>(given[n]); };
        auto tokens = [&](int n) { return static_cast<T*>(out[n]); };
        Inputs<T> x = inputs<T>(sizes, layers, tanh, eps, in);
        Gradients<T> d{static_cast<const T*>(given[0]), {last(1), last(2), last(3)}, last(4), tokens(0), tokens(1),
                       tokens(2), wide(3), wide(4), wide(5), wide(6), static_cast<double*>(out[7]), wide(8), wide(9),
                       {wide(10), wide(11), wide(12)}};
        for_all_heads(threads, x, [&](const Heads<T>& heads) { backward(heads, d); });
    });
}
