// Products of small matrices (sides of 16 to 256) and inverses of small triangular ones, on one thread.
//
//     gemm<Precision::full>({M, N, K}, a, b, c)        C = A B
//
// A matrix is a Matrix{pointer, stride}: row-major, `stride` numbers from row to row; `.transposed()` reads it the
// other way round. Precision::bf16 rounds both operands to bfloat16 and sums in float32: with AVX-512's bf16 dot
// products it is almost twice as fast, elsewhere it gives the same numbers (up to the order of sums) at float's speed.
// Operands may be bfloat16 themselves there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "interface.h"
#include "simd.h"

namespace seqzoo {

enum class Precision { full, bf16 };

template <class T>
struct Matrix {
    T* data;
    int64_t stride;
    bool flipped = false;

    Matrix transposed() const { return {data, stride, !flipped}; }
    Matrix block(int64_t row, int64_t column) const {
        return {data + (flipped ? column * stride + row : row * stride + column), stride, flipped};
    }
    operator Matrix<const T>() const { return {data, stride, flipped}; }
};
template <class T>
Matrix(T*, int64_t) -> Matrix<T>;
template <class T>
Matrix(T*, int64_t, bool) -> Matrix<T>;

struct Sizes {
    int64_t rows, columns, depth;
};

namespace detail {

// The registers that one tile of C fills: rows times vectors.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = VECTOR_REGISTERS == 32 ? 4 : 2;

// One step of a tile's sum: Left is what is broadcast from A, Right what is loaded from B.
template <class T>
struct Full {
    using Number = T;
    using Left = T;
    using Right = T;
    static SEQZOO_INLINE Vec<T> add(Vec<T> sum, Left a, const Right* b) {
        return fma(broadcast<Vec<T>>(a), load(b), sum);
    }
};

#ifdef __AVX512BF16__
// Two neighbours along the depth at once, in the halves of one 32-bit word.
struct Pairs {
    using Number = float;
    using Left = uint32_t;
    using Right = uint32_t;
    static SEQZOO_INLINE Vec<float> add(Vec<float> sum, Left a, const Right* b) {
        __m512i right = _mm512_loadu_si512(b);
        __m512i left = _mm512_set1_epi32(int(a));
        return bit_cast<Vec<float>>(
            _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(left), bit_cast<__m512bh>(right)));
    }
};
#endif

// Left's element (row, k) stands at data[row * row_step + k * step].
template <class T>
struct LeftPanel {
    const T* data;
    int64_t row_step, step;
};

template <class Product, int ROWS, int VECTORS, class T>
SEQZOO_INLINE void tile(int64_t depth, LeftPanel<typename Product::Left> a, const typename Product::Right* b,
                        int64_t b_stride, T alpha, bool accumulate, T* c, int64_t c_stride, int last) {
    constexpr int WIDTH = LANES<T>;
    Vec<T> sums[ROWS][VECTORS];
    SEQZOO_UNROLL
    for (int i = 0; i < ROWS; i++) {
        SEQZOO_UNROLL
        for (int j = 0; j < VECTORS; j++) sums[i][j] = Vec<T>{};
    }
    for (int64_t k = 0; k < depth; k++) {
        SEQZOO_UNROLL
        for (int i = 0; i < ROWS; i++) {
            SEQZOO_UNROLL
            for (int j = 0; j < VECTORS; j++) {
                sums[i][j] = Product::add(sums[i][j], a.data[i * a.row_step], b + j * WIDTH);
            }
        }
        a.data += a.step;
        b += b_stride;
    }
    Vec<T> scale = broadcast<Vec<T>>(alpha);
    SEQZOO_UNROLL
    for (int i = 0; i < ROWS; i++) {
        SEQZOO_UNROLL
        for (int j = 0; j < VECTORS; j++) {
            T* to = c + i * c_stride + j * WIDTH;
            Vec<T> y = sums[i][j] * scale;
            if (j == VECTORS - 1 && last < WIDTH) {
                store_first(to, accumulate ? y + load_first(to, last) : y, last);
            } else {
                store(to, accumulate ? y + load(to) : y);
            }
        }
    }
}

// All tiles of one panel of C, VECTORS vectors wide, `last` numbers in the last of them.
template <class Product, int VECTORS, class T>
__attribute__((noinline)) void panel(int64_t rows, int64_t depth, LeftPanel<typename Product::Left> a,
                                     const typename Product::Right* b, int64_t b_stride, T alpha, bool accumulate, T* c,
                                     int64_t c_stride, int last) {
    auto run = [&](auto count) __attribute__((always_inline)) {
        tile<Product, count.value, VECTORS>(depth, a, b, b_stride, alpha, accumulate, c, c_stride, last);
        a.data += count.value * a.row_step;
        c += count.value * c_stride;
    };
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS) run(std::integral_constant<int, TILE_ROWS>());
    switch (rows - row) {
        case 1: return run(std::integral_constant<int, 1>());
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        case 4: return run(std::integral_constant<int, 4>());
        case 5: return run(std::integral_constant<int, 5>());
    }
}

template <class Product, class T>
void multiply(Sizes sizes, LeftPanel<typename Product::Left> a, const typename Product::Right* b, int64_t b_stride,
              T alpha, bool accumulate, T* c, int64_t c_stride) {
    for (int64_t column = 0; column < sizes.columns; column += TILE_VECTORS * LANES<T>) {
        int64_t width = std::min<int64_t>(sizes.columns - column, TILE_VECTORS * LANES<T>);
        int vectors = int((width + LANES<T> - 1) / LANES<T>), last = int(width - (vectors - 1) * LANES<T>);
        auto run = [&](auto count) {
            if constexpr (count.value <= TILE_VECTORS) {
                panel<Product, count.value>(sizes.rows, sizes.depth, a, b + column, b_stride, alpha, accumulate,
                                            c + column, c_stride, last);
            }
        };
        switch (vectors) {
            case 1: run(std::integral_constant<int, 1>()); break;
            case 2: run(std::integral_constant<int, 2>()); break;
            case 3: run(std::integral_constant<int, 3>()); break;
            case 4: run(std::integral_constant<int, 4>()); break;
        }
    }
}

// One square of LANES x LANES numbers across, by interleaving rows log2(LANES) times.
template <class V, size_t... I>
SEQZOO_INLINE V interleave_low(V a, V b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * sizeof...(I))...);
#else
    return V{(I % 2 ? b[I / 2] : a[I / 2])...};
#endif
}

template <class V, size_t... I>
SEQZOO_INLINE V interleave_high(V a, V b, std::index_sequence<I...>) {
    constexpr size_t half = sizeof...(I) / 2;
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (half + I / 2 + (I % 2) * sizeof...(I))...);
#else
    return V{(I % 2 ? b[half + I / 2] : a[half + I / 2])...};
#endif
}

template <class V>
SEQZOO_INLINE void transpose_square(V* rows) {
    constexpr int N = sizeof(V) / sizeof(Lane<V>);
    constexpr auto all = std::make_index_sequence<N>();
    SEQZOO_UNROLL
    for (int step = 1; step < N; step *= 2) {
        V mixed[N];
        SEQZOO_UNROLL
        for (int i = 0; i < N / 2; i++) {
            mixed[2 * i] = interleave_low(rows[i], rows[i + N / 2], all);
            mixed[2 * i + 1] = interleave_high(rows[i], rows[i + N / 2], all);
        }
        SEQZOO_UNROLL
        for (int i = 0; i < N; i++) rows[i] = mixed[i];
    }
}

// to[j][i] = from(i, j), where row(i, j) gives the vector that begins at (i, j); rows up to a multiple of the width are
// written, whatever stands in them beyond `rows` is never used.
template <class V, class Row>
void transpose(int64_t rows, int64_t columns, Row row, Lane<V>* to, int64_t stride) {
    constexpr int N = sizeof(V) / sizeof(Lane<V>);
    for (int64_t i = 0; i < rows; i += N) {
        for (int64_t j = 0; j < columns; j += N) {
            V square[N];
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) square[n] = i + n < rows ? row(i + n, j) : V{};
            transpose_square(square);
            SEQZOO_UNROLL
            for (int n = 0; n < N; n++) {
                if (j + n < columns) std::memcpy(to + (j + n) * stride + i, &square[n], sizeof(V));
            }
        }
    }
}

#ifdef __AVX512BF16__
SEQZOO_INLINE __m256i rounded(const float* from, int64_t left) {
    return bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(load_up_to(from, left))));
}

SEQZOO_INLINE __m256i rounded(const bfloat16* from, int64_t left) {
    if (left >= 16) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), from);
}

// Thirty-two neighbours of one row as sixteen pairs.
template <class T>
SEQZOO_INLINE Words pairs_along(const T* from, int64_t left) {
    __m256i high = left > 16 ? rounded(from + 16, left - 16) : _mm256_setzero_si256();
    return bit_cast<Words>(_mm512_inserti64x4(_mm512_castsi256_si512(rounded(from, left)), high, 1));
}

// Sixteen pairs of neighbours down two rows; `second` may be null.
template <class T>
SEQZOO_INLINE Words pairs_down(const T* first, const T* second, int64_t left) {
    __m512i low = _mm512_cvtepu16_epi32(rounded(first, left));
    if (!second) return bit_cast<Words>(low);
    return bit_cast<Words>(_mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(second, left)), 16)));
}

// Rows of pairs, [pair][column]: what a left operand that is transposed, and a right one that is not, are packed into.
template <class T>
void pack_pairs_down(int64_t depth, int64_t columns, Matrix<const T> from, uint32_t* to, int64_t stride) {
    for (int64_t k = 0; k < depth; k += 2) {
        const T* first = from.data + k * from.stride;
        const T* second = k + 1 < depth ? first + from.stride : nullptr;
        for (int64_t j = 0; j < columns; j += 16) {
            Words pairs = pairs_down(first + j, second ? second + j : nullptr, columns - j);
            std::memcpy(to + k / 2 * stride + j, &pairs, sizeof(pairs));
        }
    }
}

template <class A, class B>
void gemm_pairs(Sizes sizes, Matrix<const A> a, Matrix<const B> b, Matrix<float> c, float alpha, bool accumulate) {
    int64_t pairs = (sizes.depth + 1) / 2, row_pairs = padded<float>(pairs), width = padded<float>(sizes.columns);
    LeftPanel<uint32_t> left;
    if (a.flipped) {
        int64_t stride = padded<float>(sizes.rows);
        uint32_t* packed = workspace<100, uint32_t>(pairs * stride);
        pack_pairs_down(sizes.depth, sizes.rows, a, packed, stride);
        left = {packed, 1, stride};
    } else {
        uint32_t* packed = workspace<100, uint32_t>(sizes.rows * row_pairs);
        for (int64_t i = 0; i < sizes.rows; i++) {
            for (int64_t k = 0; k < sizes.depth; k += 32) {
                Words row = pairs_along(a.data + i * a.stride + k, sizes.depth - k);
                std::memcpy(packed + i * row_pairs + k / 2, &row, sizeof(row));
            }
        }
        left = {packed, row_pairs, 1};
    }
    uint32_t* right = workspace<101, uint32_t>(pairs * width);
    if (b.flipped) {
        auto row = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
            return pairs_along(b.data + i * b.stride + 2 * j, sizes.depth - 2 * j);
        };
        transpose<Words>(sizes.columns, pairs, row, right, width);
    } else {
        pack_pairs_down(sizes.depth, sizes.columns, b, right, width);
    }
    multiply<Pairs>({sizes.rows, sizes.columns, pairs}, left, right, width, alpha, accumulate, c.data, c.stride);
}
#endif

// A copy of `from` as it lies, rounded to bfloat16 and widened again.
template <int SLOT, class T>
Matrix<const float> rounded_copy(int64_t rows, int64_t columns, Matrix<const T> from) {
    if (from.flipped) std::swap(rows, columns);
    int64_t stride = padded<float>(columns);
    float* copy = workspace<SLOT, float>(rows * stride);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j += LANES<float>) {
            store(copy + i * stride + j, widen(narrow(load_up_to(from.data + i * from.stride + j, columns - j))));
        }
    }
    return {copy, stride, from.flipped};
}

template <class T>
void gemm_full(Sizes sizes, Matrix<const T> a, Matrix<const T> b, Matrix<T> c, T alpha, bool accumulate) {
    const T* right = b.data;
    int64_t width = b.stride;
    if (b.flipped || sizes.columns % LANES<T>) {
        width = padded<T>(sizes.columns);
        T* packed = workspace<100, T>(sizes.depth * width);
        right = packed;
        if (b.flipped) {
            auto row = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
                return load_up_to(b.data + i * b.stride + j, sizes.depth - j);
            };
            transpose<Vec<T>>(sizes.columns, sizes.depth, row, packed, width);
        } else {
            for (int64_t k = 0; k < sizes.depth; k++) {
                for (int64_t j = 0; j < sizes.columns; j += LANES<T>) {
                    store(packed + k * width + j, load_up_to(b.data + k * b.stride + j, sizes.columns - j));
                }
            }
        }
    }
    LeftPanel<T> left{a.data, a.flipped ? 1 : a.stride, a.flipped ? a.stride : 1};
    multiply<Full<T>>(sizes, left, right, width, alpha, accumulate, c.data, c.stride);
}

}  // namespace detail

// C = alpha A B, or C += alpha A B. C must be row-major as it is (not flipped) and overlap neither A nor B.
template <Precision PRECISION = Precision::full, class A, class B, class T>
void gemm(Sizes sizes, Matrix<A> a, Matrix<B> b, Matrix<T> c, std::common_type_t<T> alpha = 1,
          bool accumulate = false) {
    using Left = std::remove_const_t<A>;
    using Right = std::remove_const_t<B>;
    if constexpr (PRECISION == Precision::full) {
        static_assert(std::is_same_v<Left, T> && std::is_same_v<Right, T>, "full precision takes one type");
        detail::gemm_full<T>(sizes, a, b, c, alpha, accumulate);
    } else {
        static_assert(std::is_same_v<T, float>, "bf16 sums in float");
#ifdef __AVX512BF16__
        detail::gemm_pairs<Left, Right>(sizes, a, b, c, alpha, accumulate);
#else
        Matrix<const float> left = detail::rounded_copy<101, Left>(sizes.rows, sizes.depth, a);
        Matrix<const float> right = detail::rounded_copy<102, Right>(sizes.depth, sizes.columns, b);
        detail::gemm_full<float>(sizes, left, right, c, alpha, accumulate);
#endif
    }
}

namespace detail {

// Rows i of X = (I + M)^-1 one after the other: X_i = e_i - sum_{j < i} M_ij X_j.
template <class T>
void invert_small(int64_t size, Matrix<const T> m, Matrix<T> x) {
    constexpr int VECTORS = 16 / LANES<T> > 0 ? 16 / LANES<T> : 1;
    alignas(64) T rows[16][VECTORS * LANES<T>] = {};
    for (int64_t i = 0; i < size; i++) {
        Vec<T> row[VECTORS] = {};
        for (int64_t j = 0; j < i; j++) {
            Vec<T> factor = broadcast<Vec<T>>(m.data[i * m.stride + j]);
            SEQZOO_UNROLL
            for (int n = 0; n < VECTORS; n++) row[n] -= factor * load(rows[j] + n * LANES<T>);
        }
        SEQZOO_UNROLL
        for (int n = 0; n < VECTORS; n++) store(rows[i] + n * LANES<T>, row[n]);
        rows[i][i] = 1;
        std::memcpy(x.data + i * x.stride, rows[i], sizeof(T) * size);
    }
}

template <class T>
void invert_blocks(int64_t size, Matrix<const T> m, Matrix<T> x) {
    if (size <= 16) return invert_small(size, m, x);
    int64_t half = 16;
    while (half * 2 < size) half *= 2;
    int64_t rest = size - half;
    invert_blocks(half, m, x);
    invert_blocks(rest, m.block(half, half), x.block(half, half));
    for (int64_t i = 0; i < half; i++) std::fill_n(x.data + i * x.stride + half, rest, T(0));
    // The corner below the diagonal: -X_22 M_21 X_11.
    Matrix<T> product{workspace<103, T>(rest * half), half};
    gemm({rest, half, half}, m.block(half, 0), Matrix<const T>(x), product);
    gemm({rest, half, rest}, Matrix<const T>(x.block(half, half)), Matrix<const T>(product), x.block(half, 0), T(-1));
}

}  // namespace detail

// X = (I + M)^-1 for a strictly lower triangular M: what stands on and above M's diagonal is not read. X's upper half
// is zeros. X must not overlap M. By blocks: inverses of 16 x 16, then products that double their size.
template <class T, class U>
void unit_lower_inverse(int64_t size, Matrix<U> m, Matrix<T> x) {
    detail::invert_blocks<T>(size, m, x);
}

}  // namespace seqzoo
