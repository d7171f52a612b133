// The mLSTM on the CPU, one token after the other: for the few tokens of a decoding step.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "interface.h"
#include "simd.h"

using namespace seqzoo;

namespace {

// Rows of one head: `stride` numbers from token to token.
template <class T>
struct Tokens {
    const T* data;
    int64_t stride;
    const T* operator[](int64_t t) const { return data + t * stride; }
};

template <class W>
struct State {
    W *memory, *normalizer, *stabilizer;
};

// `before` may be null, for zeros.
template <class T>
void steps_of_head(int64_t time, int64_t key, int64_t value, Tokens<T> q, Tokens<T> k, Tokens<T> v,
                   Tokens<Wide<T>> input_gate, Tokens<Wide<T>> log_forget, const bool* starts, State<Wide<T>> before,
                   T* h, int64_t h_stride, State<Wide<T>> after, Wide<T> smallest) {
    using W = Wide<T>;
    using V = Vec<W>;
    constexpr int TILE = 4;
    W *keep = workspace<0, W>(3 * time), *write = keep + time, *scale = write + time;
    auto forgotten = [&](int64_t t) { return (starts && starts[t]) || (t == 0 && !before.stabilizer); };
    for (int64_t t = 0; t < time; t++) {
        W gate = *input_gate[t], forget = *log_forget[t], overlap = 0;
        W past = forgotten(t) ? W(0) : *(t ? after : before).stabilizer, now = std::max(forget + past, gate);
        keep[t] = std::exp(past - now + forget);
        write[t] = std::exp(gate - now);
        *after.stabilizer = now;
        const W* normalizer = forgotten(t) ? nullptr : (t ? after : before).normalizer;
        for (int64_t c = 0; c < key; c++) {
            W kept = normalizer ? keep[t] * normalizer[c] : W(0);
            after.normalizer[c] = kept + write[t] * widen(k[t][c]);
            overlap += after.normalizer[c] * widen(q[t][c]);
        }
        scale[t] = 1 / std::max(std::abs(overlap), std::max(std::exp(-now), smallest));
    }
    for (int64_t column = 0; column < value; column += TILE * LANES<W>) {
        // Vectors of the tile, a ragged one last: the loops over them vanish, so that they stay in registers.
        auto each = [&](auto body) __attribute__((always_inline)) {
            SEQZOO_UNROLL
            for (int j = 0; j < TILE; j++) {
                int64_t at = column + j * LANES<W>;
                if (at < value) body(j, at, value - at);
            }
        };
        for (int64_t t = 0; t < time; t++) {
            V out[TILE] = {}, written[TILE];
            each([&](int j, int64_t at, int64_t left)
                     __attribute__((always_inline)) { written[j] = load_up_to(v[t] + at, left) * write[t]; });
            const W* memory = forgotten(t) ? nullptr : (t ? after : before).memory;
            V kept = broadcast<V>(keep[t]);
            for (int64_t c = 0; c < key; c++) {
                V weight = broadcast<V>(widen(k[t][c])), reading = broadcast<V>(widen(q[t][c]));
                each([&](int j, int64_t at, int64_t left) __attribute__((always_inline)) {
                    V s = weight * written[j];
                    if (memory) s = fma(kept, load_up_to(memory + c * value + at, left), s);
                    out[j] = fma(reading, s, out[j]);
                    store_up_to(after.memory + c * value + at, s, left);
                });
            }
            each([&](int j, int64_t at, int64_t left)
                     __attribute__((always_inline)) { store_up_to(h + t * h_stride + at, out[j] * scale[t], left); });
        }
    }
}

}  // namespace

// Gates and states are float32, or float64 with float64 inputs. The states before may be null, for zeros.
SEQZOO_EXPORT void mlstm_steps(int64_t dtype, int64_t threads, int64_t batch, int64_t time, int64_t heads, int64_t key,
                               int64_t value, const void* q, const void* k, const void* v, const void* input_gate,
                               const void* log_forget, const void* starts, void* memory, void* normalizer,
                               void* stabilizer, void* h, void* new_memory, void* new_normalizer, void* new_stabilizer,
                               double smallest) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        parallel_for(int(threads), batch * heads, [&](int64_t index) {
            int64_t b = index / heads, first = b * time * heads + index % heads;
            auto tokens = [&](const void* from, int64_t size) {
                return Tokens<T>{static_cast<const T*>(from) + first * size, heads * size};
            };
            auto gates = [&](const void* from) { return Tokens<W>{static_cast<const W*>(from) + first, heads}; };
            auto state = [&](void* of_memory, void* of_normalizer, void* of_stabilizer) -> State<W> {
                if (!of_stabilizer) return {};  // of no values the memory is null too
                return {static_cast<W*>(of_memory) + index * key * value, static_cast<W*>(of_normalizer) + index * key,
                        static_cast<W*>(of_stabilizer) + index};
            };
            steps_of_head<T>(time, key, value, tokens(q, key), tokens(k, key), tokens(v, value), gates(input_gate),
                             gates(log_forget), starts ? static_cast<const bool*>(starts) + b * time : nullptr,
                             state(memory, normalizer, stabilizer), static_cast<T*>(h) + first * value, heads * value,
                             state(new_memory, new_normalizer, new_stabilizer), W(smallest));
        });
    });
}
