// Taylor features: each key is read once and leaves as features or as a gradient.
//
// With z = x / dim^(1/4), features f = 1, z_i, z_i^2 / sqrt(2), z_i z_j for i < j, row by row:
//     gradient of z_i = d(z_i) + sqrt(2) z_i d(z_i^2) + sum_{j > i} z_j d(z_i z_j) + sum_{j < i} z_j d(z_j z_i)
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Keys of one task.
constexpr int64_t ROWS = 64;

template <class T>
struct Keys {
    const T* x;  // [row][dim]
    int64_t rows, dim;

    int64_t features() const { return 1 + dim + dim * (dim + 1) / 2; }
    Wide<T> scale() const { return 1 / std::sqrt(std::sqrt(Wide<T>(dim))); }
};

// Call body(row, z, free) for each key: z has zeros after it for one vector, and `free` is room for `extra` numbers.
template <class T, class Body>
void for_each_key(const Keys<T>& in, int64_t extra, int64_t threads, Body body) {
    using W = Wide<T>;
    parallel_for(int(threads), (in.rows + ROWS - 1) / ROWS, [&](int64_t task) {
        const int64_t padded = in.dim + LANES<T>;
        W* z = workspace<0, W>(padded + extra);
        std::fill_n(z, padded, W(0));
        for (int64_t row = task * ROWS; row < std::min(in.rows, (task + 1) * ROWS); row++) {
            scaled(in.dim, in.scale(), in.x + row * in.dim, z);
            body(row, z, z + padded);
        }
    });
}

template <class T>
void forward(const Keys<T>& in, T* y, int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t dim = in.dim, features = in.features();
    for_each_key(in, features + LANES<T>, threads, [&](int64_t row, const W* z, W* f) {
        // Whole vectors, from left to right: what one writes too far the next writes over.
        f[0] = 1;
        for (int64_t i = 0; i < dim; i += LANES<T>) store(f + 1 + i, load(z + i));
        const V half = broadcast<V>(W(0.70710678118654752440));
        for (int64_t i = 0; i < dim; i += LANES<T>) {
            V part = load(z + i);
            store(f + 1 + dim + i, part * part * half);
        }
        W* to = f + 1 + 2 * dim;
        for (int64_t i = 0; i + 1 < dim; to += dim - 1 - i, i++) {
            V factor = broadcast<V>(z[i]);
            for (int64_t j = 0; j < dim - 1 - i; j += LANES<T>) store(to + j, factor * load(z + i + 1 + j));
        }
        copy_row(features, f, y + row * features);
    });
}

// The first `count` lanes of x, zeros after them.
template <class T>
SEQZOO_INLINE Vec<Wide<T>> first(Vec<Wide<T>> x, int64_t count) {
    using W = Wide<T>;
    alignas(64) static constexpr auto places = [] {
        struct { W at[LANES<T>]; } made{};
        for (int i = 0; i < LANES<T>; i++) made.at[i] = W(i);
        return made;
    }();
    return load(places.at) < W(count) ? x : Vec<W>{};
}

template <class T>
void backward(const Keys<T>& in, const T* dy, T* dx, int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t dim = in.dim, features = in.features(), wide = features + LANES<T>;
    const V root = broadcast<V>(W(1.41421356237309504880));
    for_each_key(in, wide + dim + LANES<T>, threads, [&](int64_t row, const W* z, W* df) {
        W* dz = df + wide;
        copy_row(features, dy + row * features, df);
        for (int64_t i = 0; i < dim; i += LANES<T>) {
            store(dz + i, fma(root * load(z + i), load(df + 1 + dim + i), load(df + 1 + i)));
        }
        const W* from = df + 1 + 2 * dim;
        for (int64_t i = 0; i + 1 < dim; from += dim - 1 - i, i++) {
            V factor = broadcast<V>(z[i]), total{};
            for (int64_t j = 0; j < dim - 1 - i; j += LANES<T>) {
                V given = first<T>(load(from + j), dim - 1 - i - j);
                total = fma(given, load(z + i + 1 + j), total);
                store(dz + i + 1 + j, fma(given, factor, load(dz + i + 1 + j)));
            }
            dz[i] += sum(total);
        }
        scaled(dim, in.scale(), dz, dx + row * dim);
    });
}

}  // namespace

SEQZOO_EXPORT void taylor_features_forward(int64_t threads, int64_t dtype, int64_t rows, int64_t dim, const void* x,
                                           void* y) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        forward(Keys<T>{static_cast<const T*>(x), rows, dim}, static_cast<T*>(y), threads);
    });
}

SEQZOO_EXPORT void taylor_features_backward(int64_t threads, int64_t dtype, int64_t rows, int64_t dim, const void* dy,
                                            const void* x, void* dx) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        backward(Keys<T>{static_cast<const T*>(x), rows, dim}, static_cast<const T*>(dy), static_cast<T*>(dx), threads);
    });
}
