// The elementwise recurrence on the CPU: one pass over memory forward, one back.
//
// Rows of channels are walked token after token with their states in the cache; threads share out batch rows and ranges
// of channels. Complex numbers are rows of twice as many reals, parts side by side, with another product.
#include <algorithm>

#include "interface.h"

namespace seqzoo {
namespace {

// Tokens whose gradients of a constant a are summed before they are added to the total.
constexpr int BLOCK = 64;

// `width` counts reals.
struct Sizes {
    int64_t batch, time, width;
};

template <class V, size_t... I>
SEQZOO_INLINE V multiply_pairs(V a, V x, Lane<V> sign, std::index_sequence<I...>) {
    V signs{(I % 2 ? sign : -sign)...};
#if defined(__clang__) || __GNUC__ >= 12
    V real = __builtin_shufflevector(a, a, (I / 2 * 2)...), imaginary = __builtin_shufflevector(a, a, (I | 1)...);
    V swapped = __builtin_shufflevector(x, x, (I ^ 1)...);
#else
    V real{a[I / 2 * 2]...}, imaginary{a[I | 1]...}, swapped{x[I ^ 1]...};
#endif
    return fma(real, x, imaginary * signs * swapped);
}

// a x, or a* x.
template <bool COMPLEX, bool CONJUGATE = false, class V>
SEQZOO_INLINE V multiply(V a, V x) {
    if constexpr (COMPLEX) {
        return multiply_pairs(a, x, CONJUGATE ? -1 : 1, std::make_index_sequence<sizeof(V) / sizeof(Lane<V>)>());
    } else {
        return a * x;
    }
}

// Call body(offset, count) for vectors from `first` to `end`, of which the last may be ragged.
template <class T, class Body>
SEQZOO_INLINE void for_vectors(int64_t first, int64_t end, Body body) {
    int64_t i = first;
    for (; i + LANES<T> <= end; i += LANES<T>) body(i, LANES<T>);
    if (i < end) body(i, int(end - i));
}

// Call body(row, first, end) for each batch row and range of channels, whole vectors but for the last.
template <class T, class Body>
void for_ranges(int threads, int64_t parts, Sizes sizes, Body body) {
    int64_t vectors = (sizes.width + LANES<T> - 1) / LANES<T>;
    parallel_for(threads, sizes.batch * parts, [&](int64_t task) {
        int64_t part = task % parts, first = part * vectors / parts, end = (part + 1) * vectors / parts;
        body(task / parts, first * LANES<T>, std::min(end * LANES<T>, sizes.width));
    });
}

// `a_step` is what lies between the a's of two tokens: the width, or 0 where a is constant.
template <bool COMPLEX, class T, class U>
void forward(int threads, int64_t parts, Sizes sizes, int64_t a_step, const U* a, const T* b, const Wide<T>* state,
             const bool* starts, T* h, Wide<T>* last) {
    auto [batch, time, width] = sizes;
    for_ranges<T>(threads, parts, sizes, [&](int64_t row, int64_t first, int64_t end) {
        Wide<T>* now = last + row * width;
        if (state) {
            std::copy(state + row * width + first, state + row * width + end, now + first);
        } else {
            std::fill(now + first, now + end, Wide<T>(0));
        }
        for (int64_t token = row * time; token < (row + 1) * time; token++) {
            const U* a_t = a + token * a_step;
            const T* b_t = b + token * width;
            T* h_t = h + token * width;
            bool begins = starts && starts[token];
            for_vectors<T>(first, end, [&](int64_t i, int count) __attribute__((always_inline)) {
                auto x = load_up_to(b_t + i, count);
                if (!begins) x = x + multiply<COMPLEX>(load_up_to(a_t + i, count), load_up_to(now + i, count));
                store_up_to(now + i, x, count);
                store_up_to(h_t + i, x, count);
            });
        }
    });
}

// `da` has a row for each token, or for each batch row where a is constant, and then it is Wide<T>.
template <bool COMPLEX, class T, class U>
void backward(int threads, int64_t parts, Sizes sizes, int64_t a_step, const U* a, const T* h, const Wide<T>* state,
              const bool* starts, const T* h_gradient, const Wide<T>* last_gradient, void* da, T* db,
              Wide<T>* dstate) {
    using W = Wide<T>;
    using V = Vec<W>;
    auto [batch, time, width] = sizes;
    for_ranges<T>(threads, parts, sizes, [&](int64_t row, int64_t first, int64_t end) {
        // What the tokens behind have sent: the last state's gradient at first, the first state's in the end.
        W* carried = dstate + row * width;
        std::copy(last_gradient + row * width + first, last_gradient + row * width + end, carried + first);
        W* total = nullptr;
        W* sums = nullptr;
        if (a_step == 0) {
            total = static_cast<W*>(da) + row * width;
            sums = workspace<0, W>(width);
            std::fill(total + first, total + end, W(0));
            std::fill(sums + first, sums + end, W(0));
        }
        for (int64_t t = time - 1; t >= 0; t--) {
            int64_t token = row * time + t;
            const U* a_t = a + token * a_step;
            const T* dh_t = h_gradient + token * width;
            T* db_t = db + token * width;
            // At a start nothing is read of what came before.
            bool begins = starts && starts[token];
            auto walk = [&](auto before) __attribute__((always_inline)) {
                for_vectors<T>(first, end, [&](int64_t i, int count) __attribute__((always_inline)) {
                    V d = load_up_to(dh_t + i, count) + load_up_to(carried + i, count);
                    V back = begins ? V{} : multiply<COMPLEX, true>(load_up_to(a_t + i, count), d);
                    V a_gradient = begins ? V{} : multiply<COMPLEX, true>(before(i, count), d);
                    store_up_to(db_t + i, d, count);
                    store_up_to(carried + i, back, count);
                    if (a_step) {
                        store_up_to(static_cast<U*>(da) + token * width + i, a_gradient, count);
                    } else {
                        store_up_to(sums + i, load_up_to(sums + i, count) + a_gradient, count);
                    }
                });
            };
            if (t > 0) {
                walk([&](int64_t i, int count) { return load_up_to(h + (token - 1) * width + i, count); });
            } else {
                walk([&](int64_t i, int count) { return state ? load_up_to(state + row * width + i, count) : V{}; });
            }
            if (a_step == 0 && t % BLOCK == 0) {
                for (int64_t i = first; i < end; i++) {
                    total[i] += sums[i];
                    sums[i] = 0;
                }
            }
        }
    });
}

// Call body(complex, T(), U()): bfloat16 is never complex, and a may be as wide as the state.
template <class Body>
void with_kinds(int64_t dtype, int64_t a_dtype, bool complex, Body body) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        if constexpr (!std::is_same_v<T, bfloat16>) {
            if (complex) return body(std::true_type(), T(), T());
        }
        if (a_dtype == dtype) return body(std::false_type(), T(), T());
        body(std::false_type(), T(), Wide<T>());
    });
}

}  // namespace
}  // namespace seqzoo

using namespace seqzoo;

SEQZOO_EXPORT void linear_scan_forward(int64_t dtype, int64_t a_dtype, int64_t complex, int64_t threads, int64_t parts,
                                       int64_t a_step, const void* a, const void* b, const void* state,
                                       const void* starts, void* h, void* last, int64_t batch, int64_t time,
                                       int64_t width) {
    with_kinds(dtype, a_dtype, complex, [&](auto is_complex, auto kind, auto a_kind) {
        using T = decltype(kind);
        using U = decltype(a_kind);
        using W = Wide<T>;
        forward<is_complex.value>(int(threads), parts, {batch, time, width}, a_step, static_cast<const U*>(a),
                                  static_cast<const T*>(b), static_cast<const W*>(state),
                                  static_cast<const bool*>(starts), static_cast<T*>(h), static_cast<W*>(last));
    });
}

SEQZOO_EXPORT void linear_scan_backward(int64_t dtype, int64_t a_dtype, int64_t complex, int64_t threads, int64_t parts,
                                        int64_t a_step, const void* a, const void* h, const void* state,
                                        const void* starts, const void* h_gradient, const void* last_gradient, void* da,
                                        void* db, void* dstate, int64_t batch, int64_t time, int64_t width) {
    with_kinds(dtype, a_dtype, complex, [&](auto is_complex, auto kind, auto a_kind) {
        using T = decltype(kind);
        using U = decltype(a_kind);
        using W = Wide<T>;
        backward<is_complex.value>(int(threads), parts, {batch, time, width}, a_step, static_cast<const U*>(a),
                                   static_cast<const T*>(h), static_cast<const W*>(state),
                                   static_cast<const bool*>(starts), static_cast<const T*>(h_gradient),
                                   static_cast<const W*>(last_gradient), da, static_cast<T*>(db),
                                   static_cast<W*>(dstate));
    });
}
