// What happens to rows of numbers between the products of a memory's network: gelu, and the norm with its gradients.
#pragma once

#include <cmath>
#include <cstdint>

#include "interface.h"
#include "simd.h"

namespace seqzoo {

// to += factor from
template <class W>
void add_scaled(int64_t count, W factor, const W* from, W* to) {
    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) {
        store(to + i, fma(broadcast<Vec<W>>(factor), load(from + i), load(to + i)));
    });
}

// The share of a normal distribution beyond z >= 0, given e^(-z^2 / 2): within 1e-8 of it for float.
template <class V>
SEQZOO_INLINE V normal_tail(V z, V density) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return detail::lane_by_lane(z, [](double x) { return 0.5 * std::erfc(x * 0.70710678118654752); });
    } else {
        // The tail over e^(-z^2 / 2), as a polynomial in 1 / (1 + 0.26 z) of least relative error.
        constexpr float FITTED[] = {-0.171328808f, 0.292859908f, -0.203277678f, 0.202136746f,   0.0301412338f,
                                    0.109844216f,  0.101638973f, 0.103915671f,  -7.62612348e-6f};
        V t = 1 / fma(broadcast<V>(0.26f), z, broadcast<V>(1.0f));
        V y = broadcast<V>(0.0340773669f);
        SEQZOO_UNROLL
        for (float coefficient : FITTED) y = fma(y, t, broadcast<V>(coefficient));
        return y * density;
    }
}

// gelu(x), its derivative and the derivative of that.
template <class V>
struct Gelu {
    V value, slope, bend;
};

template <bool TANH, class V>
SEQZOO_INLINE Gelu<V> gelu(V x) {
    using W = Lane<V>;
    // Farther out all of them are what they are here, to the last place; and what is computed stays finite.
    constexpr W FAR = TANH ? 10 : 40;
    V z = min(max(x, broadcast<V>(-FAR)), broadcast<V>(FAR));
    V square = z * z;
    if constexpr (TANH) {
        // (1 + tanh y) / 2 = 1 / (1 + e^(-2 y)), which loses nothing where it is small.
        constexpr W SCALE = W(0.79788456080286536), CUBIC = W(0.044715);
        V e = exp(W(-2) * SCALE * z * fma(broadcast<V>(CUBIC), square, broadcast<V>(W(1))));
        V share = 1 / (1 + e), rest = e * share;
        V inner = SCALE * fma(broadcast<V>(3 * CUBIC), square, broadcast<V>(W(1)));
        V rise = share * rest, half = 2 * rise * inner;
        V bent = half * (2 - 2 * z * (share - rest) * inner) + (12 * SCALE * CUBIC) * square * rise;
        return {x * share, fma(z, half, share), bent};
    } else {
        V density = exp(W(-0.5) * square), tail = normal_tail(abs(z), density);
        V share = z < 0 ? tail : 1 - tail;
        density *= W(0.39894228040143268);
        return {x * share, fma(z, density, share), density * (2 - square)};
    }
}

// gelu of a row, and its derivatives; `bend` may be null.
template <class W>
void activate(int64_t count, bool tanh, const W* x, W* value, W* slope, W* bend) {
    auto run = [&](auto kind) {
        for_each_vector<W>(count, [&](int64_t i, auto load, auto store) {
            Gelu<Vec<W>> y = gelu<kind.value>(load(x + i));
            store(value + i, y.value);
            store(slope + i, y.slope);
            if (bend) store(bend + i, y.bend);
        });
    };
    tanh ? run(std::true_type()) : run(std::false_type());
}

// unit = r (x - mean x), r^-2 = var x + eps; returns r. What the rounding of the mean leaves of it is taken away too: it
// may be large beside the deviations.
template <class W>
W normalize(int64_t count, W eps, const W* x, W* unit) {
    Vec<W> total{}, rest{}, squares{};
    for_each_vector<W>(count, [&](int64_t i, auto load, auto) { total += load(x + i); });
    const W mean = sum(total) / W(count);
    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) {
        store(unit + i, load(x + i) - mean);
        // Read again: zeros beyond a ragged end.
        Vec<W> centered = load(unit + i);
        rest += centered;
        squares = fma(centered, centered, squares);
    });
    const W left = sum(rest) / W(count);
    const W spread = 1 / std::sqrt(std::max(sum(squares) / W(count) - left * left, W(0)) + eps);
    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) {
        store(unit + i, spread * (load(unit + i) - left));
    });
    return spread;
}

// to = N(from) = r (from - mean from - unit mean(unit from)), the gradient of x given that of `unit`.
template <class W>
void normalize_back(int64_t count, W spread, const W* unit, const W* from, W* to) {
    Vec<W> total{}, along{};
    for_each_vector<W>(count, [&](int64_t i, auto load, auto) {
        Vec<W> w = load(from + i);
        total += w;
        along = fma(load(unit + i), w, along);
    });
    const W mean = sum(total) / W(count), share = sum(along) / W(count);
    for_each_vector<W>(count, [&](int64_t i, auto load, auto store) {
        store(to + i, spread * (load(from + i) - mean - share * load(unit + i)));
    });
}

}  // namespace seqzoo
