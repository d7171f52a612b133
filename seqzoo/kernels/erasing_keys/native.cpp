// Decays and keys that erase: each token and head is read once and leaves as outputs or gradients.
//
// With d(written) the whole gradient of what is written, that through own included, and u = 1 / |k key_scale|,
//     gradient of a = d(written) k key_rate + d(a h) h,    gradient of h = d(a h) a - d(-h),
//     gradient of k key_scale = u (dh - h (h . dh)),
//     gradient of k = d(written) (1 + (a - 1) key_rate) + that times key_scale.
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens of one task of the forward; tasks of the backward, each of which sums gradients of what is learned by itself.
constexpr int64_t TOKENS = 16, TASKS = 64;
// decay_bias, rate_bias, key_scale, key_rate, bonus.
constexpr int LEARNED = 5;

template <class T>
struct Keys {
    const T *r, *k, *decay, *rate;  // [token][head][size]
    const Wide<T>*decay_bias, *rate_bias, *key_scale, *key_rate, *bonus;
    int64_t tokens, heads, size;
    Wide<T> fastest, eps;

    // 1 / |k key_scale| of one head.
    SEQZOO_INLINE Wide<T> inverse_length(int64_t at, int64_t place) const {
        Vec<Wide<T>> squares{};
        for_each_vector<T>(size, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
            auto scaled = load(k + at + i) * load(key_scale + place + i);
            squares = fma(scaled, scaled, squares);
        });
        return 1 / std::sqrt(sum(squares) + eps);
    }
};

template <class T>
struct Outputs {
    Wide<T>* log_decay;
    T *written, *erased, *restored;
    Wide<T>* own;
};

template <class T>
void forward(const Keys<T>& in, const Outputs<T>& out, int64_t threads) {
    using V = Vec<Wide<T>>;
    parallel_for(int(threads), (in.tokens + TOKENS - 1) / TOKENS, [&](int64_t task) {
        const int64_t end = std::min(in.tokens, (task + 1) * TOKENS) * in.heads;
        V one = broadcast<V>(1), slowest = broadcast<V>(-in.fastest);
        for (int64_t row = task * TOKENS * in.heads; row < end; row++) {
            const int64_t at = row * in.size, place = row % in.heads * in.size;
            V inverse = broadcast<V>(in.inverse_length(at, place)), own{};
            for_each_vector<T>(in.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                const int64_t n = at + i, p = place + i;
                V k = load(in.k + n), a = sigmoid(load(in.rate + n) + load(in.rate_bias + p));
                V h = k * load(in.key_scale + p) * inverse, written = k * fma(a - one, load(in.key_rate + p), one);
                own = fma(load(in.r + n) * load(in.bonus + p), written, own);
                store(out.log_decay + n, slowest * sigmoid(load(in.decay + n) + load(in.decay_bias + p)));
                store(out.written + n, written);
                store(out.erased + n, -h);
                store(out.restored + n, a * h);
            });
            out.own[row] = sum(own);
        }
    });
}

template <class T>
struct Given {
    const Wide<T>* log_decay;
    const T *written, *erased, *restored;
    const Wide<T>* own;
};

template <class T>
struct Gradients {
    T *r, *k, *decay, *rate;
    Wide<T>* learned[LEARNED];
};

template <class T>
void backward(const Keys<T>& in, const Given<T>& given, const Gradients<T>& grad, int64_t threads) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t width = in.heads * in.size, tasks = std::min(TASKS, (in.tokens + TOKENS - 1) / TOKENS);
    W* all_sums = workspace<0, W>(tasks * LEARNED * width);
    parallel_for(int(threads), tasks, [&](int64_t task) {
        W *dh = workspace<1, W>(in.size), *dk = workspace<2, W>(in.size), *sums = all_sums + task * LEARNED * width;
        std::fill_n(sums, LEARNED * width, W(0));
        V one = broadcast<V>(1), slowest = broadcast<V>(-in.fastest);
        const int64_t end = (task + 1) * in.tokens / tasks * in.heads;
        for (int64_t row = task * in.tokens / tasks * in.heads; row < end; row++) {
            const int64_t at = row * in.size, place = row % in.heads * in.size;
            V inverse = broadcast<V>(in.inverse_length(at, place)), own = broadcast<V>(given.own[row]), along{};
            auto add = [&](int which, int64_t p, V x, auto load, auto store) __attribute__((always_inline)) {
                W* to = sums + which * width + p;
                store(to, load(to) + x);
            };
            for_each_vector<T>(in.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                const int64_t n = at + i, p = place + i;
                V k = load(in.k + n), r = load(in.r + n), bonus = load(in.bonus + p), key_rate = load(in.key_rate + p);
                V a = sigmoid(load(in.rate + n) + load(in.rate_bias + p)), h = k * load(in.key_scale + p) * inverse;
                V factor = fma(a - one, key_rate, one), written = k * factor, restored = load(given.restored + n);
                V dwritten = fma(own * r, bonus, load(given.written + n));
                V drate = fma(dwritten * k, key_rate, restored * h) * a * (one - a);
                V s = sigmoid(load(in.decay + n) + load(in.decay_bias + p));
                V ddecay = load(given.log_decay + n) * slowest * s * (one - s);
                V dunit = restored * a - load(given.erased + n);
                along = fma(dunit, h, along);
                store(dh + i, dunit);
                store(dk + i, dwritten * factor);
                store(grad.r + n, own * bonus * written);
                store(grad.decay + n, ddecay);
                store(grad.rate + n, drate);
                add(0, p, ddecay, load, store);
                add(1, p, drate, load, store);
                add(3, p, dwritten * k * (a - one), load, store);
                add(4, p, own * r * written, load, store);
            });
            V slope = broadcast<V>(sum(along));
            for_each_vector<T>(in.size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                const int64_t p = place + i;
                V k = load(in.k + at + i), key_scale = load(in.key_scale + p);
                V dscaled = inverse * (load(dh + i) - k * key_scale * inverse * slope);
                store(grad.k + at + i, fma(dscaled, key_scale, load(dk + i)));
                add(2, p, dscaled * k, load, store);
            });
        }
    });
    for (int which = 0; which < LEARNED; which++) {
        sum_rows(tasks, LEARNED * width, width, all_sums + which * width, grad.learned[which]);
    }
}

template <class T>
Keys<T> make(int64_t tokens, int64_t heads, int64_t size, double fastest, double eps, const void* r, const void* k,
             const void* decay, const void* rate, const void* decay_bias, const void* rate_bias, const void* key_scale,
             const void* key_rate, const void* bonus) {
    auto data = [](const void* z) { return static_cast<const T*>(z); };
    auto wide = [](const void* z) { return static_cast<const Wide<T>*>(z); };
    return {data(r),         data(k),        data(decay), data(rate), wide(decay_bias), wide(rate_bias),
            wide(key_scale), wide(key_rate), wide(bonus), tokens,     heads,            size,
            Wide<T>(fastest), Wide<T>(eps)};
}

}  // namespace

SEQZOO_EXPORT void erasing_keys_forward(int64_t threads, int64_t dtype, int64_t tokens, int64_t heads, int64_t size,
                                        double fastest, double eps, const void* r, const void* k, const void* decay,
                                        const void* rate, const void* decay_bias, const void* rate_bias,
                                        const void* key_scale, const void* key_rate, const void* bonus,
                                        void* log_decay, void* written, void* erased, void* restored, void* own) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto in = make<T>(tokens, heads, size, fastest, eps, r, k, decay, rate, decay_bias, rate_bias, key_scale,
                          key_rate, bonus);
        Outputs<T> out{static_cast<W*>(log_decay), static_cast<T*>(written), static_cast<T*>(erased),
                       static_cast<T*>(restored), static_cast<W*>(own)};
        forward(in, out, threads);
    });
}

SEQZOO_EXPORT void erasing_keys_backward(int64_t threads, int64_t dtype, int64_t tokens, int64_t heads, int64_t size,
                                         double fastest, double eps, const void* dlog_decay, const void* dwritten,
                                         const void* derased, const void* drestored, const void* down, const void* r,
                                         const void* k, const void* decay, const void* rate, const void* decay_bias,
                                         const void* rate_bias, const void* key_scale, const void* key_rate,
                                         const void* bonus, void* dr, void* dk, void* ddecay, void* drate,
                                         void* ddecay_bias, void* drate_bias, void* dkey_scale, void* dkey_rate,
                                         void* dbonus) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto in = make<T>(tokens, heads, size, fastest, eps, r, k, decay, rate, decay_bias, rate_bias, key_scale,
                          key_rate, bonus);
        Given<T> given{static_cast<const W*>(dlog_decay), static_cast<const T*>(dwritten),
                       static_cast<const T*>(derased), static_cast<const T*>(drestored), static_cast<const W*>(down)};
        auto to = [](void* z) { return static_cast<T*>(z); };
        auto wide = [](void* z) { return static_cast<W*>(z); };
        Gradients<T> grad{to(dr),
                          to(dk),
                          to(ddecay),
                          to(drate),
                          {wide(ddecay_bias), wide(drate_bias), wide(dkey_scale), wide(dkey_rate), wide(dbonus)}};
        backward(in, given, grad, threads);
    });
}
