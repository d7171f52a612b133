// Mamba's selective scan on the CPU: channels in the lanes of vectors, their states in registers.
//
// Time is cut into blocks. Within one, a tile (a vector of channels) walks its tokens for a few entries of the state at
// a time, whose vectors stay in registers. The forward keeps the states that enter each block; the backward computes a
// block's decays and states from them again, into a workspace that stays in the cache, and walks it in reverse.
// Threads share out batch rows and ranges of channels. What is summed over channels (the gradients of B and C) is
// summed in each range, then over ranges, so that results do not depend on which thread was faster.
#include <algorithm>
#include <vector>

#include "interface.h"

namespace seqzoo {
namespace {

constexpr int BLOCK = 64;

// As many tokens are stepped the way of decoding, unless a backward follows.
constexpr int SHORT = 4;

// Entries of the state that are walked at once. The backward keeps two vectors for each, the forward one.
constexpr int FORWARD_ENTRIES = VECTOR_REGISTERS / 2;
constexpr int BACKWARD_ENTRIES = VECTOR_REGISTERS / 4;

struct Sizes {
    int64_t batch, time, channels, entries;
};

template <class T, class U>
struct Inputs {
    using W = Wide<T>;
    const T* x;
    const U* dt;
    const W* A;
    const T* B;
    const T* C;
    const W* D;
    const T* gate;
    const W* dt_bias;
    const W* state;
    const bool* starts;
};

// e^(delta A): `rate` makes of A what is multiplied by delta.
template <class W>
SEQZOO_INLINE W rate(W A) {
    return std::is_same_v<W, double> ? A : W(A * 1.4426950408889634);
}

template <class V>
SEQZOO_INLINE V decay(V exponent) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return exp(exponent);
    } else {
        // 2^x = 2^n 2^f: f in [-1/2, 1/2], and 2^f = 1 + f q(f), fitted for the least relative error: 2e-9.
#ifdef __AVX512F__
        auto bits = bit_cast<__m512>(exponent);
        V f = bit_cast<V>(_mm512_reduce_ps(bits, 0));
#else
        exponent = exponent < -126.0f ? broadcast<V>(-126.0f) : exponent;
        exponent = exponent > 127.0f ? broadcast<V>(127.0f) : exponent;
        V shifted = exponent + 12582912.0f;
        V f = exponent - (shifted - 12582912.0f);
#endif
        V q = fma(f, broadcast<V>(1.53533620e-4f), broadcast<V>(1.33988750e-3f));
        q = fma(f, q, broadcast<V>(9.61843692e-3f));
        q = fma(f, q, broadcast<V>(5.55033237e-2f));
        q = fma(f, q, broadcast<V>(2.40226477e-1f));
        q = fma(f, q, broadcast<V>(6.93147182e-1f));
        q = fma(f, q, broadcast<V>(1.0f));
#ifdef __AVX512F__
        return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(q), _mm512_roundscale_ps(bits, 0)));
#else
        return bit_cast<V>(bit_cast<Ints>(q) + (bit_cast<Ints>(shifted) << 23));
#endif
    }
}

// What softplus and the gate need, in terms of the exponential above: about half the work of simd.h's.
template <class V>
SEQZOO_INLINE V softplus_here(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return softplus(x);
    } else {
        // log(1 + e) = e p(e) for e in [0, 1], fitted for the least relative error: 5e-9.
        V e = decay(abs(x) * -1.44269504f);
        V p = fma(e, broadcast<V>(-3.24400887e-3f), broadcast<V>(1.98513865e-2f));
        p = fma(e, p, broadcast<V>(-5.69593832e-2f));
        p = fma(e, p, broadcast<V>(1.06036387e-1f));
        p = fma(e, p, broadcast<V>(-1.53055817e-1f));
        p = fma(e, p, broadcast<V>(1.96759358e-1f));
        p = fma(e, p, broadcast<V>(-2.49541327e-1f));
        p = fma(e, p, broadcast<V>(3.33299637e-1f));
        p = fma(e, p, broadcast<V>(-4.99999017e-1f));
        p = fma(e, p, broadcast<V>(1.0f));
        return fma(e, p, x > 0 ? x : V{});
    }
}

template <class V>
SEQZOO_INLINE V sigmoid_here(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return sigmoid(x);
    } else {
        return 1.0f / (decay(x * -1.44269504f) + 1.0f);
    }
}

int64_t tiles_of(int64_t channels, int lanes) { return (channels + lanes - 1) / lanes; }

// Rows of numbers [channel][entry] to tiles [tile][entry][lane], and back; entries up to `padded` are zero.
template <class W, class Convert>
void pack(const W* from, int64_t channels, int64_t entries, int64_t padded, int64_t first, int64_t last, W* to,
          Convert convert) {
    constexpr int L = LANES<W>;
    for (int64_t tile = first; tile < last; tile++, to += padded * L) {
        std::fill_n(to, padded * L, W(0));
        if (!from) continue;
        for (int64_t lane = 0; lane < std::min<int64_t>(L, channels - tile * L); lane++) {
            const W* row = from + (tile * L + lane) * entries;
            for (int64_t n = 0; n < entries; n++) to[n * L + lane] = convert(row[n]);
        }
    }
}

template <class W>
void unpack(const W* from, int64_t channels, int64_t entries, int64_t padded, int64_t first, int64_t last, W* to) {
    constexpr int L = LANES<W>;
    for (int64_t tile = first; tile < last; tile++, from += padded * L) {
        for (int64_t lane = 0; lane < std::min<int64_t>(L, channels - tile * L); lane++) {
            W* row = to + (tile * L + lane) * entries;
            for (int64_t n = 0; n < entries; n++) row[n] = from[n * L + lane];
        }
    }
}

// Rows of B or C, widened, with zeros up to `padded`.
template <class T>
void widen_rows(const T* from, int64_t rows, int64_t entries, int64_t padded, Wide<T>* to) {
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t n = 0; n < entries; n++) to[t * padded + n] = widen(from[t * entries + n]);
        for (int64_t n = entries; n < padded; n++) to[t * padded + n] = 0;
    }
}

template <int BIT, class V, size_t... I>
SEQZOO_INLINE V add_neighbours(V a, V b, std::index_sequence<I...>) {
    constexpr size_t L = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (I & BIT ? L + (I ^ BIT) : I)...) +
           __builtin_shufflevector(a, b, (I & BIT ? L + I : I ^ BIT)...);
#else
    return V{(I & BIT ? b[I ^ BIT] : a[I])...} + V{(I & BIT ? b[I] : a[I ^ BIT])...};
#endif
}

// Vectors x(first), ..., x(first + N - 1), summed together: lane i has a part of the sum over the lanes of
// x(first + i % N). Calls come in order.
template <int N, class X>
SEQZOO_INLINE auto sum_lanes(X x, int first) {
    if constexpr (N == 1) {
        return x(first);
    } else {
        auto low = sum_lanes<N / 2>(x, first);
        auto high = sum_lanes<N / 2>(x, first + N / 2);
        return add_neighbours<N / 2>(low, high, std::make_index_sequence<sizeof(low) / sizeof(low[0])>());
    }
}

// One block of one tile, N entries of its state: adds S_t C_t to y.
template <int N, class W>
__attribute__((noinline)) void walk(int length, const Vec<W>* delta, const Vec<W>* u, const W* rates, const W* B,
                                    const W* C, int64_t padded, const bool* starts, W* state, Vec<W>* y) {
    using V = Vec<W>;
    constexpr int L = LANES<W>;
    V S[N];
    SEQZOO_UNROLL
    for (int n = 0; n < N; n++) S[n] = load(state + n * L);
    for (int t = 0; t < length; t++) {
        if (starts && starts[t]) {
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) S[n] = V{};
        }
        V sums[2] = {y[t], V{}};
        SEQZOO_UNROLL
        for (int n = 0; n < N; n++) {
            V a = decay(delta[t] * load(rates + n * L));
            S[n] = fma(a, S[n], u[t] * broadcast<V>(B[n]));
            sums[n % 2] = fma(S[n], broadcast<V>(C[n]), sums[n % 2]);
        }
        y[t] = sums[0] + sums[1];
        B += padded;
        C += padded;
    }
    SEQZOO_UNROLL
    for (int n = 0; n < N; n++) store(state + n * L, S[n]);
}

// Call body(N, first entry) for groups of entries that cover `padded`, a multiple of 4, none larger than LARGEST.
template <int LARGEST, class Body>
SEQZOO_INLINE void for_entries(int64_t padded, Body body) {
    int64_t n = 0;
    if constexpr (LARGEST >= 16) {
        for (; n + 16 <= padded; n += 16) body(std::integral_constant<int, 16>(), n);
    }
    if constexpr (LARGEST >= 8) {
        for (; n + 8 <= padded; n += 8) body(std::integral_constant<int, 8>(), n);
    }
    for (; n < padded; n += 4) body(std::integral_constant<int, 4>(), n);
}

// What a tile's tokens are before their walk: steps, what they write, and what the skip adds to the output. `ahead` is
// how far away the numbers of the next tile are, which lie in rows so far apart that no hardware foresees them.
template <class T, class U, class V>
SEQZOO_INLINE void enter(const Inputs<T, U>& in, int64_t token, int length, int64_t channels, int64_t channel,
                         int64_t ahead, V* delta, V* u, V* sums) {
    int count = int(std::min<int64_t>(LANES<T>, channels - channel));
    V bias = in.dt_bias ? load_up_to(in.dt_bias + channel, count) : V{};
    V skip = in.D ? load_up_to(in.D + channel, count) : V{};
    for (int t = 0; t < length; t++) {
        int64_t at = (token + t) * channels + channel;
        __builtin_prefetch(in.x + at + ahead);
        __builtin_prefetch(in.dt + at + ahead);
        if (in.gate) __builtin_prefetch(in.gate + at + ahead);
        V x = load_up_to(in.x + at, count);
        delta[t] = softplus_here(load_up_to(in.dt + at, count) + bias);
        u[t] = delta[t] * x;
        sums[t] = skip * x;
    }
}

// What comes out of it.
template <class T, class U, class V>
SEQZOO_INLINE void leave(const Inputs<T, U>& in, int64_t token, int length, int64_t channels, int64_t channel,
                         const V* sums, T* y) {
    int count = int(std::min<int64_t>(LANES<T>, channels - channel));
    for (int t = 0; t < length; t++) {
        int64_t at = (token + t) * channels + channel;
        V out = sums[t];
        if (in.gate) {
            V z = load_up_to(in.gate + at, count);
            out = out * z * sigmoid_here(z);
        }
        store_up_to(y + at, out, count);
    }
}

template <class T, class U>
void forward(int threads, int64_t parts, Sizes sizes, Inputs<T, U> in, T* y, Wide<T>* last, Wide<T>* kept) {
    using W = Wide<T>;
    using V = Vec<W>;
    constexpr int L = LANES<T>;
    auto [batch, time, channels, entries] = sizes;
    int64_t tiles = tiles_of(channels, L), padded = (entries + 3) / 4 * 4, blocks = (time + BLOCK - 1) / BLOCK;
    parallel_for(threads, batch * parts, [&](int64_t task) {
        int64_t row = task / parts, first = task % parts * tiles / parts, end = (task % parts + 1) * tiles / parts;
        int64_t width = (end - first) * padded * L;
        W* rates = workspace<0, W>(width);
        W* states = workspace<1, W>(width);
        W* B = workspace<2, W>(2 * BLOCK * padded);
        W* C = B + BLOCK * padded;
        pack(in.A, channels, entries, padded, first, end, rates, rate<W>);
        pack(in.state ? in.state + row * channels * entries : nullptr, channels, entries, padded, first, end, states,
             [](W z) { return z; });
        for (int64_t block = 0; block < blocks; block++) {
            int64_t t0 = block * BLOCK, token = row * time + t0;
            int length = int(std::min<int64_t>(BLOCK, time - t0));
            widen_rows(in.B + token * entries, length, entries, padded, B);
            widen_rows(in.C + token * entries, length, entries, padded, C);
            const bool* starts = in.starts ? in.starts + token : nullptr;
            if (kept) std::copy_n(states, width, kept + ((row * blocks + block) * tiles + first) * padded * L);
            for (int64_t tile = first; tile < end; tile++) {
                int64_t ahead = tile + 1 < end ? L : BLOCK * channels - (tile - first) * L;
                V delta[BLOCK], u[BLOCK], sums[BLOCK];
                enter(in, token, length, channels, tile * L, ahead, delta, u, sums);
                for_entries<FORWARD_ENTRIES>(padded, [&](auto N, int64_t n) {
                    int64_t at = ((tile - first) * padded + n) * L;
                    walk<N.value, W>(length, delta, u, rates + at, B + n, C + n, padded, starts, states + at, sums);
                });
                leave(in, token, length, channels, tile * L, sums, y);
            }
        }
        unpack(states, channels, entries, padded, first, end, last + row * channels * entries);
    });
}

// The same for a few tokens, as in decoding: the lanes are entries of the state, so that A and the state are read and
// written as they lie.
template <class T, class U>
void forward_short(int threads, Sizes sizes, Inputs<T, U> in, T* y, Wide<T>* last) {
    using W = Wide<T>;
    using V = Vec<W>;
    constexpr int L = LANES<T>;
    auto [batch, time, channels, entries] = sizes;
    int64_t tiles = tiles_of(channels, L), vectors = (entries + L - 1) / L, padded = vectors * L;
    // Waking a thread takes as long as several thousand entries.
    threads = int(std::min<int64_t>(threads, 1 + batch * channels * padded * time / 32768));
    int64_t parts = std::min<int64_t>(tiles, threads);
    parallel_for(threads, batch * parts, [&](int64_t task) {
        int64_t row = task / parts, first = task % parts * tiles / parts, end = (task % parts + 1) * tiles / parts;
        int64_t token = row * time;
        int length = int(time);
        W* B = workspace<2, W>(2 * SHORT * padded);
        W* C = B + SHORT * padded;
        widen_rows(in.B + token * entries, time, entries, padded, B);
        widen_rows(in.C + token * entries, time, entries, padded, C);
        for (int64_t tile = first; tile < end; tile++) {
            V delta[SHORT], u[SHORT], sums[SHORT];
            enter(in, token, length, channels, tile * L, 0, delta, u, sums);
            int lanes = int(std::min<int64_t>(L, channels - tile * L));
            for (int64_t n = 0; n < entries; n += L) {
                int count = int(std::min<int64_t>(L, entries - n));
                const W* A = in.A + tile * L * entries + n;
                int64_t at = (row * channels + tile * L) * entries + n;
                V S[L];
                for (int lane = 0; lane < L; lane++) {
                    S[lane] = in.state && lane < lanes ? load_up_to(in.state + at + lane * entries, count) : V{};
                }
                for (int t = 0; t < length; t++) {
                    bool begins = in.starts && in.starts[token + t];
                    V scaled = delta[t] * rate<W>(1), B_t = load(B + t * padded + n), C_t = load(C + t * padded + n);
                    sums[t] += sum_lanes<L>(
                        [&](int lane) __attribute__((always_inline)) {
                            V a = decay(load_up_to(A + std::min(lane, lanes - 1) * entries, count) * scaled[lane]);
                            S[lane] = fma(begins ? V{} : a, S[lane], B_t * u[t][lane]);
                            return S[lane] * C_t;
                        },
                        0);
                }
                for (int lane = 0; lane < lanes; lane++) store_up_to(last + at + lane * entries, S[lane], count);
            }
            leave(in, token, length, channels, tile * L, sums, y);
        }
    });
}

// Gradients of the inputs above, in the same order; those of A, D and dt_bias for each batch row.
template <class T, class U>
struct Gradients {
    using W = Wide<T>;
    T* x;
    U* dt;
    W* A;
    T* B;
    T* C;
    W* D;
    T* gate;
    W* dt_bias;
    W* state;
};

// What the backward of one block of one tile reads and writes, all but what depends on the entries of the state.
template <class V>
struct Block {
    int length;
    V delta[BLOCK], u[BLOCK], dy[BLOCK];
    V y[BLOCK], du[BLOCK], ddelta[BLOCK];
};

// N entries of the state of one block of one tile. On entry `carried` is the gradient of the state after the block, on
// return of the one before it. `sums` of B and C are [token][entry][lane], see sum_lanes.
template <int N, class W>
__attribute__((noinline)) void walk_back(Block<Vec<W>>& block, const W* rates, const W* B, const W* C, int64_t padded,
                                         const bool* starts, const W* entering, W* carried, W* dA, W* B_sums,
                                         W* C_sums) {
    using V = Vec<W>;
    constexpr int L = LANES<W>, GROUP = N < L ? N : L;
    V a[BLOCK][N], S[BLOCK + 1][N];
    int length = block.length;
    SEQZOO_UNROLL
    for (int n = 0; n < N; n++) S[0][n] = load(entering + n * L);
    V now[N];
    SEQZOO_UNROLL
    for (int n = 0; n < N; n++) now[n] = S[0][n];
    for (int t = 0; t < length; t++) {
        bool begins = starts && starts[t];
        V y = block.y[t];
        auto step = [&](int n) __attribute__((always_inline)) {
            V kept = begins ? V{} : decay(block.delta[t] * load(rates + n * L));
            a[t][n] = kept;
            now[n] = fma(kept, now[n], block.u[t] * broadcast<V>(B[t * padded + n]));
            S[t + 1][n] = now[n];
            y = fma(now[n], broadcast<V>(C[t * padded + n]), y);
            return block.dy[t] * now[n];
        };
        SEQZOO_UNROLL
        for (int n = 0; n < N; n += GROUP) {
            W* to = C_sums + (t * padded + n) * L;
            store(to, load(to) + sum_lanes<GROUP>(step, n));
        }
        block.y[t] = y;
    }
    V dS[N], dA_sums[N];
    SEQZOO_UNROLL
    for (int n = 0; n < N; n++) {
        dS[n] = load(carried + n * L);
        dA_sums[n] = V{};
    }
    for (int t = length - 1; t >= 0; t--) {
        V du = block.du[t], ddelta = block.ddelta[t];
        auto step = [&](int n) __attribute__((always_inline)) {
            V here = fma(block.dy[t], broadcast<V>(C[t * padded + n]), dS[n]);
            du = fma(here, broadcast<V>(B[t * padded + n]), du);
            dS[n] = here * a[t][n];
            // The gradient of delta A.
            V exponent = dS[n] * S[t][n];
            ddelta = fma(exponent, load(rates + n * L), ddelta);
            dA_sums[n] = fma(exponent, block.delta[t], dA_sums[n]);
            return here * block.u[t];
        };
        SEQZOO_UNROLL
        for (int n = 0; n < N; n += GROUP) {
            W* to = B_sums + (t * padded + n) * L;
            store(to, load(to) + sum_lanes<GROUP>(step, n));
        }
        block.du[t] = du;
        block.ddelta[t] = ddelta;
    }
    SEQZOO_UNROLL
    for (int n = 0; n < N; n++) {
        store(carried + n * L, dS[n]);
        store(dA + n * L, load(dA + n * L) + dA_sums[n]);
    }
}

// Sums of sum_lanes, [token][entry][lane], to rows [token][entry].
template <class W>
void fold_lanes(const W* sums, int length, int64_t entries, int64_t padded, W* rows) {
    constexpr int L = LANES<W>;
    for (int t = 0; t < length; t++) {
        for_entries<BACKWARD_ENTRIES>(padded, [&](auto N, int64_t first) {
            constexpr int GROUP = N.value < L ? N.value : L;
            for (int64_t n = first; n < std::min(first + N.value, entries); n++) {
                const W* group = sums + (t * padded + n / GROUP * GROUP) * L;
                W total = 0;
                for (int64_t lane = n % GROUP; lane < L; lane += GROUP) total += group[lane];
                rows[t * entries + n] = total;
            }
        });
    }
}

template <class T, class U>
void backward(int threads, int64_t parts, Sizes sizes, Inputs<T, U> in, const Wide<T>* kept, const T* y_gradient,
              const Wide<T>* last_gradient, Gradients<T, U> out) {
    using W = Wide<T>;
    using V = Vec<W>;
    constexpr int L = LANES<T>;
    auto [batch, time, channels, entries] = sizes;
    int64_t tiles = tiles_of(channels, L), padded = (entries + 3) / 4 * 4, blocks = (time + BLOCK - 1) / BLOCK;
    // [B or C][part][row][token][entry]
    int64_t rows = batch * time * entries;
    std::unique_ptr<W[]> partial(new W[2 * parts * rows]);
    parallel_for(threads, batch * parts, [&](int64_t task) {
        int64_t row = task / parts, part = task % parts, first = part * tiles / parts, end = (part + 1) * tiles / parts;
        int64_t width = (end - first) * padded * L;
        W* rates = workspace<0, W>(width);
        W* carried = workspace<1, W>(width);
        W* dA = workspace<4, W>(width);
        W* B = workspace<2, W>(2 * BLOCK * padded);
        W* C = B + BLOCK * padded;
        W* B_sums = workspace<5, W>(2 * BLOCK * padded * L);
        W* C_sums = B_sums + BLOCK * padded * L;
        auto same = [](W z) { return z; };
        pack(in.A, channels, entries, padded, first, end, rates, rate<W>);
        pack(last_gradient + row * channels * entries, channels, entries, padded, first, end, carried, same);
        std::fill_n(dA, width, W(0));
        W* dD = out.D ? out.D + row * channels : nullptr;
        W* dbias = out.dt_bias ? out.dt_bias + row * channels : nullptr;
        for (int64_t block = blocks - 1; block >= 0; block--) {
            int64_t t0 = block * BLOCK, token = row * time + t0;
            Block<V> tile_block;
            auto& [length, delta, u, dy, y, du, ddelta] = tile_block;
            length = int(std::min<int64_t>(BLOCK, time - t0));
            widen_rows(in.B + token * entries, length, entries, padded, B);
            widen_rows(in.C + token * entries, length, entries, padded, C);
            std::fill_n(B_sums, 2 * BLOCK * padded * L, W(0));
            const bool* starts = in.starts ? in.starts + token : nullptr;
            for (int64_t tile = first; tile < end; tile++) {
                int count = int(std::min<int64_t>(L, channels - tile * L));
                V bias = in.dt_bias ? load_up_to(in.dt_bias + tile * L, count) : V{};
                V skip = in.D ? load_up_to(in.D + tile * L, count) : V{};
                int64_t ahead = tile + 1 < end ? L : -BLOCK * channels - (tile - first) * L;
                V slope[BLOCK], dgate[BLOCK];
                for (int t = 0; t < length; t++) {
                    int64_t at = (token + t) * channels + tile * L;
                    __builtin_prefetch(in.x + at + ahead);
                    __builtin_prefetch(in.dt + at + ahead);
                    __builtin_prefetch(y_gradient + at + ahead);
                    if (in.gate) __builtin_prefetch(in.gate + at + ahead);
                    V x = load_up_to(in.x + at, count);
                    V step = load_up_to(in.dt + at, count) + bias;
                    delta[t] = softplus_here(step);
                    slope[t] = sigmoid_here(step);
                    u[t] = delta[t] * x;
                    dy[t] = load_up_to(y_gradient + at, count);
                    if (in.gate) {
                        V z = load_up_to(in.gate + at, count);
                        V open = sigmoid_here(z);
                        dgate[t] = dy[t] * open * (1 + z * (1 - open));
                        dy[t] = dy[t] * z * open;
                    }
                    y[t] = skip * x;
                    du[t] = ddelta[t] = V{};
                }
                const W* entering = kept + ((row * blocks + block) * tiles + tile) * padded * L;
                for_entries<BACKWARD_ENTRIES>(padded, [&](auto N, int64_t n) {
                    int64_t at = ((tile - first) * padded + n) * L;
                    walk_back<N.value, W>(tile_block, rates + at, B + n, C + n, padded, starts, entering + n * L,
                                          carried + at, dA + at, B_sums + n * L, C_sums + n * L);
                });
                V dD_sum{}, dbias_sum{};
                for (int t = 0; t < length; t++) {
                    int64_t at = (token + t) * channels + tile * L;
                    V x = load_up_to(in.x + at, count);
                    V ddt = fma(du[t], x, ddelta[t] * (1 / rate<W>(1))) * slope[t];
                    store_up_to(out.dt + at, ddt, count);
                    store_up_to(out.x + at, fma(du[t], delta[t], skip * dy[t]), count);
                    if (in.gate) store_up_to(out.gate + at, dgate[t] * y[t], count);
                    dbias_sum += ddt;
                    dD_sum = fma(dy[t], x, dD_sum);
                }
                auto add = [&](W* to, V sum) {
                    if (!to) return;
                    to += tile * L;
                    store_up_to(to, block == blocks - 1 ? sum : sum + load_up_to(to, count), count);
                };
                add(dD, dD_sum);
                add(dbias, dbias_sum);
            }
            W* to = partial.get() + part * rows + token * entries;
            fold_lanes(B_sums, length, entries, padded, to);
            fold_lanes(C_sums, length, entries, padded, to + parts * rows);
        }
        unpack(carried, channels, entries, padded, first, end, out.state + row * channels * entries);
        unpack(dA, channels, entries, padded, first, end, out.A + row * channels * entries);
    });
    parallel_for(threads, 2 * batch, [&](int64_t task) {
        T* to = (task % 2 ? out.C : out.B) + task / 2 * time * entries;
        const W* from = partial.get() + task % 2 * parts * rows + task / 2 * time * entries;
        for (int64_t i = 0; i < time * entries; i++) {
            W total = 0;
            for (int64_t part = 0; part < parts; part++) total += from[part * rows + i];
            to[i] = narrow<T>(total);
        }
    });
}

}  // namespace
}  // namespace seqzoo

using namespace seqzoo;

SEQZOO_EXPORT void selective_scan_forward(int64_t dtype, int64_t dt_dtype, int64_t threads, int64_t parts,
                                          const void* x, const void* dt, const void* A, const void* B, const void* C, const void* D,
                                          const void* gate, const void* dt_bias, const void* state, const void* starts,
                                          void* y, void* last, void* kept, int64_t batch, int64_t time,
                                          int64_t channels, int64_t entries) {
    with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto run = [&](auto dt_kind) {
            using U = decltype(dt_kind);
            Inputs<T, U> in{static_cast<const T*>(x),    static_cast<const U*>(dt),      static_cast<const W*>(A),
                            static_cast<const T*>(B),    static_cast<const T*>(C),       static_cast<const W*>(D),
                            static_cast<const T*>(gate), static_cast<const W*>(dt_bias), static_cast<const W*>(state),
                            static_cast<const bool*>(starts)};
            Sizes sizes{batch, time, channels, entries};
            if (time <= SHORT && !kept) {
                return forward_short(int(threads), sizes, in, static_cast<T*>(y), static_cast<W*>(last));
            }
            forward(int(threads), parts, sizes, in, static_cast<T*>(y), static_cast<W*>(last), static_cast<W*>(kept));
        };
        dt_dtype == dtype ? run(T()) : run(W());
    });
}

SEQZOO_EXPORT void selective_scan_backward(int64_t dtype, int64_t dt_dtype, int64_t threads, int64_t parts,
                                           const void* x, const void* dt, const void* A, const void* B, const void* C,
                                           const void* D, const void* gate, const void* dt_bias, const void* starts,
                                           const void* kept, const void* y_gradient, const void* last_gradient,
                                           void* dx, void* ddt, void* dA, void* dB, void* dC, void* dD, void* dgate,
                                           void* ddt_bias, void* dstate, int64_t batch, int64_t time, int64_t channels,
                                           int64_t entries) {
    with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto run = [&](auto dt_kind) {
            using U = decltype(dt_kind);
            Inputs<T, U> in{static_cast<const T*>(x),    static_cast<const U*>(dt),      static_cast<const W*>(A),
                            static_cast<const T*>(B),    static_cast<const T*>(C),       static_cast<const W*>(D),
                            static_cast<const T*>(gate), static_cast<const W*>(dt_bias), nullptr,
                            static_cast<const bool*>(starts)};
            Gradients<T, U> out{static_cast<T*>(dx), static_cast<U*>(ddt),   static_cast<W*>(dA),
                                static_cast<T*>(dB), static_cast<T*>(dC),    static_cast<W*>(dD),
                                static_cast<T*>(dgate), static_cast<W*>(ddt_bias), static_cast<W*>(dstate)};
            backward<T, U>(int(threads), parts, {batch, time, channels, entries}, in, static_cast<const W*>(kept),
                           static_cast<const T*>(y_gradient), static_cast<const W*>(last_gradient), out);
        };
        dt_dtype == dtype ? run(T()) : run(W());
    });
}
