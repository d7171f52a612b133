// What the kernels of this folder share: the inputs of one call, and where its gradients go.
#pragma once

#include <cstdint>

#include "interface.h"
#include "simd.h"

namespace linear_attention {

using namespace seqzoo;

// Steps between two states that the forward keeps for the backward.
constexpr int64_t SPAN = 1024;

// Contiguous inputs; log_decay is [batch, time, head], or with per_channel [batch, time, head, key]; null is none.
// write is [batch, time, head], null is 1, skip is [head]; neither comes with per_channel or a bonus.
template <class T>
struct Problem {
    using W = Wide<T>;
    int64_t batch, time, groups, heads, key, value;
    const T *q, *k, *v;
    const W* log_decay;
    bool per_channel;
    const W *bonus, *state;
    const bool* starts;
    const W *write, *skip;

    int64_t shift() const { return bonus != nullptr; }
    int64_t steps() const { return time + shift(); }
    // What a step writes is the token `step - shift`; what it reads with is the token `step`, unless a start hides it.
    bool begins(int64_t b, int64_t step) const {
        int64_t token = step - shift();
        return starts && token >= 0 && token < time && starts[b * time + token];
    }
    // Where the states of a batch row stand that enter `step`, a multiple of SPAN above 0: [batch, span, head, key,
    // value].
    int64_t at_kept(int64_t b, int64_t step) const {
        return (b * ((steps() - 1) / SPAN) + step / SPAN - 1) * heads * key * value;
    }
    W weight(int64_t b, int64_t token, int64_t head) const {
        return write ? write[(b * time + token) * heads + head] : W(1);
    }
    bool reads(int64_t b, int64_t step) const { return step < time && !(bonus && starts && starts[b * time + step]); }
};

template <class T>
Problem<T> problem(int64_t batch, int64_t time, int64_t groups, int64_t heads, int64_t key, int64_t value,
                   const void* q, const void* k, const void* v, const void* log_decay, bool per_channel,
                   const void* bonus, const void* state, const void* starts, const void* write, const void* skip) {
    auto data = [](const void* x) { return static_cast<const T*>(x); };
    auto wide = [](const void* x) { return static_cast<const Wide<T>*>(x); };
    return {batch,       time,
            groups,      heads,
            key,         value,
            data(q),     data(k),
            data(v),     wide(log_decay),
            per_channel, wide(bonus),
            wide(state), static_cast<const bool*>(starts),
            wide(write), wide(skip)};
}

template <class T>
struct Gradients {
    T *q, *k, *v;
    Wide<T>*log_decay, *bonus, *state;
    Wide<T>*write, *skip;  // [batch, time, head], [batch, head]
};

}  // namespace linear_attention
