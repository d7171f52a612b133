// Short causal convolutions: channels in lanes, a few rows of time at once, so that one load of a row serves several.
//
// With z the output before its activation and f_t the gradient of z_t,
//     gradient of x_t = sum_j w_j f_{t+j},    gradient of w_j = sum_t f_t x_{t-j},
// each over the tokens of one document only. w_j is the tap that meets the token j places back.
#include <algorithm>
#include <vector>

#include "interface.h"

using namespace seqzoo;

namespace {

// Rows of time at once; rows and channels whose f stays in the cache; rows of one task of the backward.
constexpr int ROWS = 4;
constexpr int64_t PIECE = 64, CHANNELS = 256, TASK = 256;

// Channels of one task, and where they lie in the outputs or their gradients: in one tensor of [token][stride].
template <class T>
struct Strip {
    T* y;
    int64_t stride, channel, width;
};

// Those of `y`, a dense tensor of all channels; or, where there are widths, of `parts` such tensors, to whose addresses it
// points, of the first widths[0] channels, the next widths[1] and so on.
template <class T, class Y>
std::vector<Strip<T>> strips_of(Y* y, const int64_t* widths, int64_t parts, int64_t channels) {
    std::vector<Strip<T>> strips;
    strips.reserve(channels / CHANNELS + parts);
    for (int64_t part = 0, first = 0; part < parts; part++) {
        T* to = static_cast<T*>(widths ? static_cast<Y* const*>(y)[part] : y);
        const int64_t width = widths ? widths[part] : channels;
        for (int64_t c = 0; c < width; c += CHANNELS) {
            strips.push_back({to + c, width, first + c, std::min(CHANNELS, width - c)});
        }
        first += width;
    }
    return strips;
}

template <class T>
struct Conv {
    const T* x;
    int64_t x_batch, x_time;  // strides
    const T* state;
    const bool* starts;
    const Wide<T>*weight, *bias;  // [size][channels], the current token's tap first; [channels]
    int64_t batch, time, channels, size;
    bool silu;

    // Token t of a sequence; before 0 they are in the state.
    const T* row(int64_t b, int64_t t) const {
        return t >= 0 ? x + b * x_batch + t * x_time : state + (b * (size - 1) + size - 1 + t) * channels;
    }

    // How many taps of each of the tokens t0 .. t1 - 1 see their document.
    void look_back(int64_t b, int64_t t0, int64_t t1, int64_t* taps) const {
        int64_t first = state ? -size : 0;
        for (int64_t t = std::max<int64_t>(0, t0 - size + 1); t < t1; t++) {
            if (starts && starts[b * time + t]) first = t;
            if (t >= t0) taps[t - t0] = std::min(size, t - first + 1);
        }
    }

    // How many taps of later tokens see each of the tokens t0 .. t1 - 1, which may lie before 0.
    void look_ahead(int64_t b, int64_t t0, int64_t t1, int64_t* taps) const {
        const int64_t end = std::min(time, t1 + size - 1);
        int64_t next = end == time ? time : end + size;
        for (int64_t t = end - 1; t >= t0; t--) {
            if (t < t1) taps[t - t0] = std::min(size, next - t);
            if (t >= 0 && starts && starts[b * time + t]) next = t;
        }
    }

    // Whether the last state holds token t, one of the last size - 1, given what look_ahead says of it.
    bool is_kept(int64_t t, int64_t taps) const { return t + taps == time && (t >= 0 || state); }
};

// Call body with the number of taps where it is a usual one, so that loops over them vanish; else with 0.
template <class Body>
void with_size(int64_t size, Body body) {
    if (size == 2) return body(std::integral_constant<int, 2>());
    if (size == 3) return body(std::integral_constant<int, 3>());
    if (size == 4) return body(std::integral_constant<int, 4>());
    body(std::integral_constant<int, 0>());
}

// Whether ROWS tokens have all their taps.
SEQZOO_INLINE bool all_full(const int64_t* taps, int64_t size) {
    return std::all_of(taps, taps + ROWS, [&](int64_t row) { return row == size; });
}

// z of ROWS tokens from t on, all of whose taps are in x: body(offset, x from t - SIZE + 1 on, z, load, store).
template <int SIZE, class T, class Body>
SEQZOO_INLINE void full_rows(const Conv<T>& conv, int64_t b, int64_t t, int64_t c, int64_t width, Body body) {
    using V = Vec<Wide<T>>;
    const T* x = conv.row(b, t - (SIZE - 1)) + c;
    for_each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        V seen[ROWS + SIZE - 1], z[ROWS];
        SEQZOO_UNROLL
        for (int n = 0; n < ROWS + SIZE - 1; n++) seen[n] = load(x + n * conv.x_time + i);
        V bias = conv.bias ? load(conv.bias + c + i) : V{};
        SEQZOO_UNROLL
        for (int n = 0; n < ROWS; n++) z[n] = bias;
        SEQZOO_UNROLL
        for (int j = 0; j < SIZE; j++) {
            V weight = load(conv.weight + j * conv.channels + c + i);
            SEQZOO_UNROLL
            for (int n = 0; n < ROWS; n++) z[n] = fma(weight, seen[n + SIZE - 1 - j], z[n]);
        }
        body(i, seen, z, load, store);
    });
}

// z of one token with any number of taps: body(offset, z, load, store).
template <class T, class Body>
SEQZOO_INLINE void one_row(const Conv<T>& conv, int64_t b, int64_t t, int64_t taps, int64_t c, int64_t width,
                           Body body) {
    using V = Vec<Wide<T>>;
    const int64_t inside = std::min(taps, t + 1), channels = conv.channels, step = conv.x_time;
    const T *x = conv.row(b, t) + c, *before = taps > inside ? conv.row(b, -1) + c : nullptr;
    const Wide<T>*weight = conv.weight + c, *bias = conv.bias ? conv.bias + c : nullptr;
    for_each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        V z = bias ? load(bias + i) : V{};
        for (int64_t j = 0; j < inside; j++) z = fma(load(weight + j * channels + i), load(x - j * step + i), z);
        for (int64_t j = inside; j < taps; j++) {
            z = fma(load(weight + j * channels + i), load(before - (j - inside) * channels + i), z);
        }
        body(i, z, load, store);
    });
}

template <int SIZE, class T>
void forward(const Conv<T>& conv, const std::vector<Strip<T>>& strips, T* last, int64_t threads) {
    using V = Vec<Wide<T>>;
    const int64_t blocks = (conv.time + PIECE - 1) / PIECE, count = int64_t(strips.size()), history = conv.size - 1;
    auto activate = [&](V z) __attribute__((always_inline)) { return conv.silu ? silu(z) : z; };
    parallel_for(int(threads), conv.batch * blocks * count, [&](int64_t index) {
        const int64_t b = index / (blocks * count), t0 = index / count % blocks * PIECE;
        const Strip<T>& strip = strips[index % count];
        const int64_t c = strip.channel, width = strip.width, stride = strip.stride;
        const int64_t t1 = std::min(conv.time, t0 + PIECE);
        int64_t taps[PIECE];
        conv.look_back(b, t0, t1, taps);
        for (int64_t t = t0; t < t1;) {
            T* to = strip.y + (b * conv.time + t) * stride;
            if constexpr (SIZE > 0) {
                if (t >= SIZE - 1 && t + ROWS <= t1 && all_full(taps + t - t0, SIZE)) {
                    auto write = [&](int64_t i, auto&, auto& z, auto, auto store) __attribute__((always_inline)) {
                        SEQZOO_UNROLL
                        for (int n = 0; n < ROWS; n++) store(to + n * stride + i, activate(z[n]));
                    };
                    full_rows<SIZE>(conv, b, t, c, width, write);
                    t += ROWS;
                    continue;
                }
            }
            auto write = [&](int64_t i, V z, auto, auto store)
                             __attribute__((always_inline)) { store(to + i, activate(z)); };
            one_row(conv, b, t, taps[t - t0], c, width, write);
            t++;
        }
        for (int64_t n = 0; n < history && t1 == conv.time; n++) {
            const int64_t t = conv.time - history + n;
            int64_t ahead;
            conv.look_ahead(b, t, t + 1, &ahead);
            T* to = last + (b * history + n) * conv.channels + c;
            if (conv.is_kept(t, ahead)) {
                std::memcpy(to, conv.row(b, t) + c, sizeof(T) * width);
            } else {
                std::memset(to, 0, sizeof(T) * width);
            }
        }
    });
}

template <class T>
struct Gradients {
    const T* last;
    T *x, *state;
    Wide<T>* sums;  // [task][size + 1][channels]: of the taps, the current token's first, then of the bias
};

// Gradients from tokens t0 .. t1 - 1 and of them (of the state too where t0 is 0), all in the channels of `strip`.
template <int SIZE, class T>
void backward_piece(const Conv<T>& conv, const Gradients<T>& grad, const Strip<const T>& strip, Wide<T>* sums,
                    int64_t b, int64_t t0, int64_t t1) {
    using V = Vec<Wide<T>>;
    const int64_t c = strip.channel, width = strip.width;
    const int64_t history = conv.size - 1, stride = conv.channels, end = std::min(conv.time, t1 + history);
    Wide<T>* f = workspace<0, Wide<T>>((PIECE + history) * CHANNELS);
    int64_t* taps = workspace<1, int64_t>(PIECE + 2 * history);
    auto differentiate = [&](V z, V y_grad) __attribute__((always_inline)) {
        if (!conv.silu) return y_grad;
        V s = sigmoid(z);
        return y_grad * s * fma(z, 1 - s, broadcast<V>(1));
    };
    auto add = [&](int64_t which, int64_t i, V x, auto load, auto store) __attribute__((always_inline)) {
        Wide<T>* to = sums + which * stride + c + i;
        store(to, load(to) + x);
    };

    conv.look_back(b, t0, end, taps);
    for (int64_t t = t0; t < end;) {
        const T* y_grad = strip.y + (b * conv.time + t) * strip.stride;
        Wide<T>* to = f + (t - t0) * CHANNELS;
        if constexpr (SIZE > 0) {
            if (t >= SIZE - 1 && t + ROWS <= t1 && all_full(taps + t - t0, SIZE)) {
                auto write = [&](int64_t i, auto& seen, auto& z, auto load, auto store)
                                 __attribute__((always_inline)) {
                    V total{};
                    SEQZOO_UNROLL
                    for (int n = 0; n < ROWS; n++) {
                        z[n] = differentiate(z[n], load(y_grad + n * strip.stride + i));
                        store(to + n * CHANNELS + i, z[n]);
                        total += z[n];
                    }
                    add(SIZE, i, total, load, store);
                    SEQZOO_UNROLL
                    for (int j = 0; j < SIZE; j++) {
                        V product{};
                        SEQZOO_UNROLL
                        for (int n = 0; n < ROWS; n++) product = fma(z[n], seen[n + SIZE - 1 - j], product);
                        add(j, i, product, load, store);
                    }
                };
                full_rows<SIZE>(conv, b, t, c, width, write);
                t += ROWS;
                continue;
            }
        }
        const int64_t count = taps[t - t0];
        auto write = [&](int64_t i, V z, auto load, auto store) __attribute__((always_inline)) {
            V gradient = differentiate(z, load(y_grad + i));
            store(to + i, gradient);
            if (t >= t1) return;  // the next piece sums it
            add(conv.size, i, gradient, load, store);
            for (int64_t j = 0; j < count; j++) {
                add(j, i, gradient * load(conv.row(b, t - j) + c + i), load, store);
            }
        };
        one_row(conv, b, t, count, c, width, write);
        t++;
    }

    const int64_t first = t0 == 0 && conv.state ? -history : t0;
    conv.look_ahead(b, first, t1, taps);
    for (int64_t t = first; t < t1;) {
        T* to = (t < 0 ? grad.state + (b * history + history + t) * stride : grad.x + (b * conv.time + t) * stride) + c;
        const Wide<T>* from = f + (t - t0) * CHANNELS;
        if constexpr (SIZE > 0) {
            if (t >= 0 && t + ROWS <= t1 && all_full(taps + t - first, SIZE)) {
                for_each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                    V later[ROWS + SIZE - 1], gradient[ROWS] = {};
                    SEQZOO_UNROLL
                    for (int n = 0; n < ROWS + SIZE - 1; n++) later[n] = load(from + n * CHANNELS + i);
                    SEQZOO_UNROLL
                    for (int j = 0; j < SIZE; j++) {
                        V weight = load(conv.weight + j * stride + c + i);
                        SEQZOO_UNROLL
                        for (int n = 0; n < ROWS; n++) gradient[n] = fma(weight, later[n + j], gradient[n]);
                    }
                    SEQZOO_UNROLL
                    for (int n = 0; n < ROWS; n++) store(to + n * stride + i, gradient[n]);
                });
                t += ROWS;
                continue;
            }
        }
        const int64_t count = taps[t - first], n = t - (conv.time - history);
        const T* kept = n >= 0 && conv.is_kept(t, count) ? grad.last + (b * history + n) * stride + c : nullptr;
        for_each_vector<T>(width, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            V gradient = kept ? load(kept + i) : V{};
            for (int64_t j = std::max<int64_t>(0, -t); j < count; j++) {
                gradient = fma(load(conv.weight + j * stride + c + i), load(from + j * CHANNELS + i), gradient);
            }
            store(to + i, gradient);
        });
        t++;
    }
}

template <int SIZE, class T>
void backward(const Conv<T>& conv, const Gradients<T>& grad, const std::vector<Strip<const T>>& strips,
              int64_t threads) {
    const int64_t blocks = (conv.time + TASK - 1) / TASK, count = int64_t(strips.size());
    parallel_for(int(threads), conv.batch * blocks * count, [&](int64_t index) {
        const int64_t task = index / count, b = task / blocks, t0 = task % blocks * TASK;
        const Strip<const T>& strip = strips[index % count];
        Wide<T>* sums = grad.sums + task * (conv.size + 1) * conv.channels;
        for (int64_t n = 0; n <= conv.size; n++) {
            std::fill_n(sums + n * conv.channels + strip.channel, strip.width, Wide<T>(0));
        }
        const int64_t t1 = std::min(conv.time, t0 + TASK);
        for (int64_t t = t0; t < t1; t += PIECE) {
            backward_piece<SIZE>(conv, grad, strip, sums, b, t, std::min(t1, t + PIECE));
        }
    });
}

// The weight as the kernels read it, in a buffer that a following call may overwrite.
template <class W>
const W* packed(int64_t dtype, const void* weight, int64_t channels, int64_t size) {
    W* to = workspace<2, W>(channels * size);
    with_dtype(int(dtype), [&](auto kind) {
        auto* from = static_cast<const decltype(kind)*>(weight);
        with_size(size, [&](auto known) {
            const int64_t taps = known.value ? known.value : size;
            for (int64_t j = 0; j < taps; j++) {
                for (int64_t c = 0; c < channels; c++) to[j * channels + c] = W(widen(from[c * taps + taps - 1 - j]));
            }
        });
    });
    return to;
}

template <class W>
const W* widened(int64_t dtype, const void* bias, int64_t channels) {
    if (!bias) return nullptr;
    W* to = workspace<3, W>(channels);
    with_dtype(int(dtype), [&](auto kind) {
        auto* from = static_cast<const decltype(kind)*>(bias);
        for (int64_t c = 0; c < channels; c++) to[c] = W(widen(from[c]));
    });
    return to;
}

// to[first + c * stride] = the sum over tasks of from[task * step + c]
template <class W>
void total(const W* from, int64_t tasks, int64_t step, int64_t channels, int64_t dtype, void* to, int64_t first,
           int64_t stride) {
    std::vector<W> sums(channels);
    for (int64_t task = 0; task < tasks; task++) {
        for (int64_t c = 0; c < channels; c++) sums[c] += from[task * step + c];
    }
    with_dtype(int(dtype), [&](auto kind) {
        using U = decltype(kind);
        for (int64_t c = 0; c < channels; c++) static_cast<U*>(to)[first + c * stride] = narrow<U>(Wide<U>(sums[c]));
    });
}

template <class T>
Conv<T> make(int64_t weight_dtype, int64_t bias_dtype, const void* x, int64_t x_batch, int64_t x_time,
             const void* weight, const void* bias, const void* state, const bool* starts, int64_t batch, int64_t time,
             int64_t channels, int64_t size, int64_t silu) {
    return {static_cast<const T*>(x),
            x_batch,
            x_time,
            static_cast<const T*>(state),
            starts,
            packed<Wide<T>>(weight_dtype, weight, channels, size),
            widened<Wide<T>>(bias_dtype, bias, channels),
            batch,
            time,
            channels,
            size,
            silu != 0};
}

}  // namespace

// x has strides between sequences and tokens, and dense rows. Of y and its gradient strips_of says how they may be cut.
SEQZOO_EXPORT void short_conv_forward(int64_t threads, int64_t dtype, int64_t weight_dtype, int64_t bias_dtype,
                                      const void* x, int64_t x_batch, int64_t x_time, const void* weight,
                                      const void* bias, const void* state, const bool* starts, void* y,
                                      const int64_t* widths, int64_t parts, void* last, int64_t batch, int64_t time,
                                      int64_t channels, int64_t size, int64_t silu) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto conv = make<T>(weight_dtype, bias_dtype, x, x_batch, x_time, weight, bias, state, starts, batch, time,
                            channels, size, silu);
        const auto strips = strips_of<T>(y, widths, parts, channels);
        with_size(size, [&](auto taps) { forward<taps.value>(conv, strips, static_cast<T*>(last), threads); });
    });
}

// The gradients of state and bias may be null where these are.
SEQZOO_EXPORT void short_conv_backward(int64_t threads, int64_t dtype, int64_t weight_dtype, int64_t bias_dtype,
                                       const void* y_grad, const int64_t* widths, int64_t parts,
                                       const void* last_grad, const void* x, int64_t x_batch, int64_t x_time,
                                       const void* weight, const void* bias, const void* state, const bool* starts,
                                       void* x_grad, void* weight_grad, void* bias_grad, void* state_grad,
                                       int64_t batch, int64_t time, int64_t channels, int64_t size, int64_t silu) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto conv = make<T>(weight_dtype, bias_dtype, x, x_batch, x_time, weight, bias, state, starts, batch, time,
                            channels, size, silu);
        const auto strips = strips_of<const T>(y_grad, widths, parts, channels);
        const int64_t tasks = batch * ((time + TASK - 1) / TASK), step = (size + 1) * channels;
        Wide<T>* sums = workspace<4, Wide<T>>(tasks * step);
        Gradients<T> grad{static_cast<const T*>(last_grad), static_cast<T*>(x_grad), static_cast<T*>(state_grad), sums};
        with_size(size, [&](auto taps) { backward<taps.value>(conv, grad, strips, threads); });
        for (int64_t j = 0; j < size; j++) {
            total(sums + j * channels, tasks, step, channels, weight_dtype, weight_grad, size - 1 - j, size);
        }
        if (bias) total(sums + size * channels, tasks, step, channels, bias_dtype, bias_grad, 0, 1);
    });
}
