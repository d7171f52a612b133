// What operators share whose tasks are heads of sequences: where a head stands, its memory, decays between its tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "interface.h"
#include "simd.h"

namespace seqzoo {

// One head of one sequence; `index` counts the heads of all sequences.
struct HeadPlace {
    int64_t time, heads, row, head;

    HeadPlace(int64_t time, int64_t heads, int64_t index)
        : time(time), heads(heads), row(index / heads), head(index % heads) {}
    // Where it stands in [batch, head], and its tokens in [batch, time] and [batch, time, head].
    int64_t index() const { return row * heads + head; }
    int64_t token(int64_t t) const { return row * time + t; }
    int64_t at(int64_t t) const { return token(t) * heads + head; }
};

// How many of `threads` so many multiplications keep busy: waking others up takes as long.
inline int busy_threads(int64_t threads, int64_t multiplications) {
    return multiplications < 1 << 18 ? 1 : int(threads);
}

// Hands out rows of numbers from one piece of memory; with none, only counts them.
template <class W>
struct Arena {
    W* memory = nullptr;
    int64_t used = 0;

    W* take(int64_t count) {
        W* taken = memory ? memory + used : nullptr;
        used += (count + 15) / 16 * 16;
        return taken;
    }
};

// A stronger decay, -inf too, leaves as little: e^STRONGEST is 0, and differences of its sums stay numbers.
constexpr double STRONGEST = -800;

// x = e^x
template <class W>
void exponentials(int64_t count, W* x) {
    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) { store(x + i, exp(load(x + i))); });
}

// total[i] = log(0) + ... + log(i), for at most MOST tokens; pairs[i][j] = e^(log(j + 1) + ... + log(i)) for j <= i, else
// 0, in rows of `stride` numbers. Sums are in double: one strong decay would blur all differences after it.
template <int64_t MOST, class W, class Log>
void decays_between(int64_t count, Log log, W* pairs, int64_t stride, W* total) {
    double sums[MOST], sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += std::max(double(log(i)), STRONGEST);
        sums[i] = sum;
        total[i] = W(sum);
    }
    for (int64_t i = 0; i < count; i++) {
        W* row = pairs + i * stride;
        for (int64_t j = 0; j <= i; j++) row[j] = W(sums[i] - sums[j]);
        exponentials(i + 1, row);
        std::fill(row + i + 1, row + stride, W(0));
    }
}

}  // namespace seqzoo
