// Vectors as wide as the machine that this file is compiled for, on the vector extensions of GCC and Clang.
//
// Vec<float> and Vec<double> are plain vector types: + - * / and comparisons work lane by lane, mask ? a : b selects.
// Data may be double, float or bfloat16; it is computed with as Wide<T>: double for double, else float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Loops over lanes and rows of registers must vanish: a register has no address.
#ifdef __clang__
#define SEQZOO_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEQZOO_UNROLL _Pragma("GCC unroll 64")
#endif
#define SEQZOO_INLINE inline __attribute__((always_inline))

namespace seqzoo {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_REGISTERS = 16;
#endif

struct bfloat16 {
    uint16_t bits;
};

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Lane, int BYTES = VECTOR_BYTES>
struct VectorOf {
    typedef Lane type __attribute__((vector_size(BYTES)));
};

template <class Lane>
using Vec = typename VectorOf<Lane>::type;
using Ints = Vec<int32_t>;
using Words = Vec<uint32_t>;
using Halves = typename VectorOf<uint16_t, VECTOR_BYTES / 2>::type;

template <class V>
using Lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])>>;

// How many numbers of data type T one vector holds once they are loaded.
template <class T>
constexpr int LANES = VECTOR_BYTES / int(sizeof(Wide<T>));

// So many numbers, up to whole vectors of them.
template <class T>
SEQZOO_INLINE int64_t padded(int64_t count) {
    return (count + LANES<T> - 1) / LANES<T> * LANES<T>;
}

template <class To, class From>
SEQZOO_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

namespace detail {
template <class V, size_t... I>
SEQZOO_INLINE V repeat(Lane<V> x, std::index_sequence<I...>) {
    return V{(static_cast<void>(I), x)...};
}
}  // namespace detail

// The vector of type V whose lanes are all x.
template <class V>
SEQZOO_INLINE V broadcast(Lane<V> x) {
    return detail::repeat<V>(x, std::make_index_sequence<sizeof(V) / sizeof(Lane<V>)>());
}

// a b + c, rounded once where the machine can.
template <class V>
SEQZOO_INLINE V fma(V a, V b, V c) {
    return a * b + c;
}

template <class V>
SEQZOO_INLINE V max(V a, V b) {
    return a > b ? a : b;
}

template <class V>
SEQZOO_INLINE V min(V a, V b) {
    return a < b ? a : b;
}

template <class V>
SEQZOO_INLINE V abs(V x) {
    return x < 0 ? -x : x;
}

namespace detail {
// Fold the upper half onto the lower one until one lane is left.
template <class L, int BYTES, class Fold>
SEQZOO_INLINE L fold(typename VectorOf<L, BYTES>::type x, Fold combine) {
    if constexpr (BYTES == sizeof(L) * 2) {
        return combine(x[0], x[1]);
    } else {
        typename VectorOf<L, BYTES / 2>::type low, high;
        std::memcpy(&low, &x, BYTES / 2);
        std::memcpy(&high, reinterpret_cast<const char*>(&x) + BYTES / 2, BYTES / 2);
        return fold<L, BYTES / 2>(combine(low, high), combine);
    }
}
}  // namespace detail

template <class V>
SEQZOO_INLINE Lane<V> sum(V x) {
    return detail::fold<Lane<V>, sizeof(V)>(x, [](auto a, auto b) { return a + b; });
}

template <class V>
SEQZOO_INLINE Lane<V> largest(V x) {
    return detail::fold<Lane<V>, sizeof(V)>(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Loading and storing. Addresses need no alignment.

SEQZOO_INLINE float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
SEQZOO_INLINE float widen(float x) { return x; }
SEQZOO_INLINE double widen(double x) { return x; }

// To the nearest number of T, ties to even; NaN stays NaN.
template <class T>
SEQZOO_INLINE T narrow(Wide<T> x) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        uint32_t bits = bit_cast<uint32_t>(x);
        if (x != x) return {uint16_t(bits >> 16 | 0x40)};
        return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    } else {
        return x;
    }
}

SEQZOO_INLINE Halves narrow(Vec<float> x) {
    Words bits = bit_cast<Words>(x);
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), Halves);
}

SEQZOO_INLINE Vec<float> widen(Halves x) { return bit_cast<Vec<float>>(__builtin_convertvector(x, Words) << 16); }

template <class T>
SEQZOO_INLINE Vec<Wide<T>> load(const T* from) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        Halves x;
        std::memcpy(&x, from, sizeof(x));
        return widen(x);
    } else {
        Vec<T> x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
}

template <class T>
SEQZOO_INLINE void store(T* to, Vec<Wide<T>> x) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        Halves rounded = narrow(x);
        std::memcpy(to, &rounded, sizeof(rounded));
    } else {
        std::memcpy(to, &x, sizeof(x));
    }
}

// The first `count` numbers, zeros after them; nothing beyond is read.
template <class T>
SEQZOO_INLINE Vec<Wide<T>> load_first(const T* from, int count) {
#ifdef __AVX512F__
    if constexpr (std::is_same_v<T, float>) return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps((1u << count) - 1, from));
    if constexpr (std::is_same_v<T, double>) {
        return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd((1u << count) - 1, from));
    }
#endif
    T numbers[LANES<T>] = {};
    std::memcpy(numbers, from, sizeof(T) * count);
    return load(numbers);
}

// Only the first `count` lanes; nothing beyond is written.
template <class T>
SEQZOO_INLINE void store_first(T* to, Vec<Wide<T>> x, int count) {
#ifdef __AVX512F__
    if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(to, (1u << count) - 1, bit_cast<__m512>(x));
    if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(to, (1u << count) - 1, bit_cast<__m512d>(x));
#endif
    T numbers[LANES<T>];
    store(numbers, x);
    std::memcpy(to, numbers, sizeof(T) * count);
}

// The same where `left` may also be more than a vector holds.
template <class T>
SEQZOO_INLINE Vec<Wide<T>> load_up_to(const T* from, int64_t left) {
    return left >= LANES<T> ? load(from) : load_first(from, int(left));
}

template <class T>
SEQZOO_INLINE void store_up_to(T* to, Vec<Wide<T>> x, int64_t left) {
    left >= LANES<T> ? store(to, x) : store_first(to, x, int(left));
}

// Call body(offset, load, store) for every vector of a row of `count` numbers: full vectors, then a ragged last one.
template <class T, class Body>
SEQZOO_INLINE void for_each_vector(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) {
        body(
            i, [](auto* from) __attribute__((always_inline)) { return load(from); },
            [](auto* to, auto x) __attribute__((always_inline)) { store(to, x); });
    }
    if (int rest = int(count - i)) {
        body(
            i, [rest](auto* from) __attribute__((always_inline)) { return load_first(from, rest); },
            [rest](auto* to, auto x) __attribute__((always_inline)) { store_first(to, x, rest); });
    }
}

// Rows of `count` numbers. What is read and what is written may differ in type, if not once loaded; `to` may be `from`.

template <class From, class To>
SEQZOO_INLINE void copy_row(int64_t count, const From* from, To* to) {
    for_each_vector<From>(count, [&](int64_t i, auto load, auto store) { store(to + i, load(from + i)); });
}

// With zeros after it, up to `width`.
template <class From, class To>
void copy_padded(int64_t count, const From* from, int64_t width, To* to) {
    copy_row(count, from, to);
    for (int64_t i = count; i < width; i++) to[i] = To{};
}

// to = factor from
template <class From, class To>
SEQZOO_INLINE void scaled(int64_t count, Wide<To> factor, const From* from, To* to) {
    for_each_vector<From>(count, [&](int64_t i, auto load, auto store) { store(to + i, load(from + i) * factor); });
}

// to += factor from
template <class From, class To>
SEQZOO_INLINE void add_scaled(int64_t count, Wide<To> factor, const From* from, To* to) {
    auto by = broadcast<Vec<Wide<To>>>(factor);
    for_each_vector<From>(count, [&](int64_t i, auto load, auto store) {
        store(to + i, fma(by, load(from + i), load(to + i)));
    });
}

template <class A, class B>
SEQZOO_INLINE Wide<A> dot(int64_t count, const A* a, const B* b) {
    Vec<Wide<A>> total{};
    for_each_vector<A>(count, [&](int64_t i, auto load, auto) { total = fma(load(a + i), load(b + i), total); });
    return sum(total);
}

// to = the sum of `parts` rows, each `stride` numbers after the one before.
template <class W>
void sum_rows(int64_t parts, int64_t stride, int64_t count, const W* from, W* to) {
    for (int64_t i = 0; i < count; i++) to[i] = W(0);
    for (int64_t part = 0; part < parts; part++, from += stride) {
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    }
}

// Functions: within about two units in the last place for float; doubles go lane by lane through the C library.

namespace detail {
template <class V, class Function>
SEQZOO_INLINE V lane_by_lane(V x, Function function) {
    for (size_t i = 0; i < sizeof(V) / sizeof(Lane<V>); i++) x[i] = function(x[i]);
    return x;
}

constexpr float LOG2_E = 1.4426950408889634f;
// ln 2 in two parts: products of the first with small whole numbers are exact.
constexpr float LN2_HIGH = 0.693359375f;
constexpr float LN2_LOW = -2.12194440e-4f;
// Adding it to a small float rounds that to a whole number, which then stands in the low bits.
constexpr float ROUNDER = 12582912.0f;

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, fitted at Chebyshev nodes: e^r is off by less than 3e-10.
SEQZOO_INLINE Vec<float> exp_tail(Vec<float> r) {
    Vec<float> y = broadcast<Vec<float>>(1.9900444e-4f);
    y = fma(y, r, broadcast<Vec<float>>(1.39345445e-3f));
    y = fma(y, r, broadcast<Vec<float>>(8.33329706e-3f));
    y = fma(y, r, broadcast<Vec<float>>(4.16664568e-2f));
    y = fma(y, r, broadcast<Vec<float>>(1.66666667e-1f));
    return fma(y, r, broadcast<Vec<float>>(0.5f));
}

// 2^n for whole -126 <= n <= 127.
SEQZOO_INLINE Vec<float> power_of_two(Ints n) { return bit_cast<Vec<float>>((n + 127) << 23); }

// e^x = 2^n (1 + rest) for |x| < 150.
struct Reduced {
    Vec<float> n, rest;
    Ints whole;  // n
};

SEQZOO_INLINE Reduced reduce(Vec<float> x) {
    using V = Vec<float>;
    V shifted = fma(x, broadcast<V>(LOG2_E), broadcast<V>(ROUNDER));
    V n = shifted - ROUNDER;
    V r = fma(n, broadcast<V>(-LN2_LOW), fma(n, broadcast<V>(-LN2_HIGH), x));
    return {n, fma(exp_tail(r), r * r, r), bit_cast<Ints>(shifted) - bit_cast<Ints>(broadcast<V>(ROUNDER))};
}
}  // namespace detail

// 0 below the smallest float, inf above the largest, NaN for NaN.
template <class V>
SEQZOO_INLINE V exp(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return detail::lane_by_lane(x, [](double y) { return std::exp(y); });
    } else {
        using namespace detail;
        V high = broadcast<V>(129.0f / LOG2_E), low = broadcast<V>(-151.0f / LOG2_E);
        x = x > high ? high : x;
        x = x < low ? low : x;
        auto [n, rest, whole] = reduce(x);
        V y = rest + 1.0f;
#ifdef __AVX512F__
        return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
        // Two factors, because 2^n alone may pass the ends of the range where the result does not.
        Ints half = whole >> 1;
        return y * power_of_two(half) * power_of_two(whole - half);
#endif
    }
}

// e^x - 1, exact to the last places near 0.
template <class V>
SEQZOO_INLINE V expm1(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return detail::lane_by_lane(x, [](double y) { return std::expm1(y); });
    } else {
        using namespace detail;
        V high = broadcast<V>(88.8f), low = broadcast<V>(-30.0f);
        V clamped = x > high ? high : x;
        clamped = clamped < low ? low : clamped;
        auto [n, rest, whole] = reduce(clamped);
        // Half of 2^n, for 2^128 is no float.
        V half = power_of_two(whole - 1);
        V result = 2.0f * fma(half, rest, half - 0.5f);
        return x == 0 ? x : result;
    }
}

// e^x and e^x - 1, as exact as exp and expm1 have them, at the cost of one.
template <class V>
struct Exponentials {
    V whole, less_one;
};

// Of x <= 0; e^x is 0 below the normal numbers.
template <class V>
SEQZOO_INLINE Exponentials<V> exponentials_below_zero(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return {exp(x), expm1(x)};
    } else {
        V low = broadcast<V>(-126.0f / detail::LOG2_E);
        auto [n, rest, whole] = detail::reduce(x < low ? low : x);
        V power = detail::power_of_two(whole);
        return {x < low ? V{} : fma(power, rest, power), fma(power, rest, power - 1.0f)};
    }
}

// log(1 + x) for x >= 0 (and down to about -0.5), exact to the last places near 0; inf for inf, NaN for NaN.
template <class V>
SEQZOO_INLINE V log1p(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return detail::lane_by_lane(x, [](double y) { return std::log1p(y); });
    } else {
        using namespace detail;
        V y = x + 1.0f;
        // What the rounding of 1 + x lost, relative to it.
        V lost = (x - (y - 1.0f)) / y;
        // y = 2^n m with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) mark where n goes up.
        Ints bits = bit_cast<Ints>(y) - 0x3f3504f3;
        Ints whole = bits >> 23;
        V n = __builtin_convertvector(whole, V);
        V f = bit_cast<V>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
        // log(1 + f) = 2 atanh(s) = f - (f^2/2 - s (f^2/2 + R)), s = f / (2 + f), R = 2 (s^2/3 + s^4/5 + ...).
        V s = f / (f + 2.0f);
        V z = s * s;
        V tail = fma(z, broadcast<V>(2.0f / 9), broadcast<V>(2.0f / 7));
        tail = fma(z, tail, broadcast<V>(2.0f / 5));
        tail = fma(z, tail, broadcast<V>(2.0f / 3)) * z;
        V square = 0.5f * f * f;
        V small = fma(s, square + tail, fma(n, broadcast<V>(LN2_LOW), lost));
        V result = fma(n, broadcast<V>(LN2_HIGH), f - (square - small));
        return x < std::numeric_limits<float>::infinity() ? result : x;
    }
}

template <class V>
SEQZOO_INLINE V softplus(V x) {
    V positive = x < 0 ? V{} : x;
    return positive + log1p(exp(-abs(x)));
}

template <class V>
SEQZOO_INLINE V sigmoid(V x) {
    return 1 / (exp(-x) + 1);
}

template <class V>
SEQZOO_INLINE V silu(V x) {
    return x / (exp(-x) + 1);
}

template <class V>
SEQZOO_INLINE V tanh(V x) {
    if constexpr (std::is_same_v<Lane<V>, double>) {
        return detail::lane_by_lane(x, [](double y) { return std::tanh(y); });
    } else {
        V e = expm1(-2 * abs(x));
        V y = -e / (e + 2);
        return x < 0 ? -y : y;
    }
}

template <class V>
SEQZOO_INLINE V log(V x) {
    return detail::lane_by_lane(x, [](auto y) { return std::log(y); });
}

template <class V>
SEQZOO_INLINE V sqrt(V x) {
    return detail::lane_by_lane(x, [](auto y) { return std::sqrt(y); });
}

template <class V>
SEQZOO_INLINE V sin(V x) {
    return detail::lane_by_lane(x, [](auto y) { return std::sin(y); });
}

template <class V>
SEQZOO_INLINE V cos(V x) {
    return detail::lane_by_lane(x, [](auto y) { return std::cos(y); });
}

}  // namespace seqzoo
