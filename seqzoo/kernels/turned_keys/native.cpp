// Queries and keys of all heads, turned: chunks of tokens, each of which begins at angles that are summed beforehand.
//
// With y = rotate(x, phi) and dy its gradient, the gradient of x is dy turned back by phi, that of an angle
// dy_2 y_1 - dy_1 y_2 over its pair, and that of step_t turn_t the sum of the angles' from t to the document's end. A
// chunk sums from its own end on; what later chunks send back is added when all are done.
#include <algorithm>

#include "interface.h"

using namespace seqzoo;

namespace {

// Tokens of a chunk; tasks of the backward, each of which sums gradients of the biases by itself.
constexpr int64_t CHUNK = 32, TASKS = 64;
constexpr double PI = 3.14159265358979323846;

// To the nearest whole number, of numbers below 2^51: adding 3 2^51 leaves no bits for a fraction.
SEQZOO_INLINE double nearest(double x) { return (x + 6755399441055744.0) - 6755399441055744.0; }

// In [0, 2 pi), or near its ends.
SEQZOO_INLINE double wrap(double angle) {
    double r = angle - 2 * PI * nearest(angle / (2 * PI) - 0.5);
    // What is beyond whole turns of an angle past 2^51 is noise; it must not be large.
    r = r < 0 ? 0 : r;
    return r >= 2 * PI ? 0 : r;
}

void cos_sin(const double* angle, int64_t count, double* c, double* s) {
    for (int64_t i = 0; i < count; i++) c[i] = std::cos(angle[i]), s[i] = std::sin(angle[i]);
}

// By Taylor's series within an eighth of a turn around the nearest quarter, less than float's rounding off.
void cos_sin(const double* __restrict angle, int64_t count, float* __restrict c, float* __restrict s) {
    for (int64_t i = 0; i < count; i++) {
        double quarters = nearest(angle[i] * (2 / PI));
        float r = float(angle[i] - quarters * (PI / 2)), r2 = r * r;
        float sine = r + r * r2 * (-1.0f / 6 + r2 * (1.0f / 120 + r2 * (-1.0f / 5040 + r2 * (1.0f / 362880))));
        float cosine = r2 * (1.0f / 24 + r2 * (-1.0f / 720 + r2 * (1.0f / 40320 - r2 * (1.0f / 3628800))));
        cosine = 1 - r2 * (0.5f - cosine);
        int quarter = int(quarters);
        float first = quarter & 1 ? sine : cosine, second = quarter & 1 ? cosine : sine;
        c[i] = (quarter + 1) & 2 ? -first : first;
        s[i] = quarter & 2 ? -second : second;
    }
}

template <class W>
SEQZOO_INLINE void rotate(W* __restrict x, const W* __restrict c, const W* __restrict s, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        W first = x[2 * i], second = x[2 * i + 1];
        x[2 * i] = first * c[i] - second * s[i];
        x[2 * i + 1] = second * c[i] + first * s[i];
    }
}

template <class W>
SEQZOO_INLINE void rotate_back(W* __restrict x, const W* __restrict c, const W* __restrict s, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        W first = x[2 * i], second = x[2 * i + 1];
        x[2 * i] = first * c[i] + second * s[i];
        x[2 * i + 1] = second * c[i] - first * s[i];
    }
}

template <class T>
struct Sizes {
    int64_t batch, time, groups, size, heads, channels, pairs;

    int64_t chunks() const { return (time + CHUNK - 1) / CHUNK; }
    int64_t group(int64_t head) const { return head / (heads / groups); }
    int64_t angles() const { return heads * pairs; }
};

template <class T>
struct Inputs : Sizes<T> {
    using W = Wide<T>;
    const T *write, *read;             // [batch][time][group][size]
    const W *write_bias, *read_bias;   // [head][size]
    const W *turn, *step, *gain;       // [batch][time][pair], [batch][time][head] twice
    const W* key;                      // [batch][head][size], or null
    const bool* starts;

    bool start(int64_t b, int64_t t) const { return starts && starts[b * this->time + t]; }
    const W* turn_of(int64_t b, int64_t t) const { return turn + (b * this->time + t) * this->pairs; }
    W step_of(int64_t b, int64_t t, int64_t head) const { return step[(b * this->time + t) * this->heads + head]; }

    // The angles of one head at tokens t0 .. t1 - 1, given those before, as cosines and sines of each token.
    void angles_of_head(int64_t b, int64_t t0, int64_t t1, int64_t head, double* angle, W* c, W* s) const {
        const int64_t pairs = this->pairs;
        for (int64_t t = t0; t < t1; t++) {
            if (start(b, t)) std::fill_n(angle, pairs, 0.0);
            const double step = step_of(b, t, head);
            const W* turn = turn_of(b, t);
            for (int64_t i = 0; i < pairs; i++) angle[i] = wrap(angle[i] + step * turn[i]);
            cos_sin(angle, pairs, c + (t - t0) * pairs, s + (t - t0) * pairs);
        }
    }

    // to = x + bias
    SEQZOO_INLINE void biased(const T* x, const W* bias, int64_t b, int64_t t, int64_t head, W* to) const {
        const T* from = x + ((b * this->time + t) * this->groups + this->group(head)) * this->size;
        bias += head * this->size;
        for_each_vector<T>(this->size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
            store(to + i, load(from + i) + load(bias + i));
        });
    }
};

// kept[batch][chunk] = the angles before each chunk.
template <class T>
void sum_angles(const Inputs<T>& in, const Wide<T>* angle, double* kept, int64_t threads) {
    const int64_t chunks = in.chunks(), angles = in.angles();
    parallel_for(int(threads), in.batch * (chunks - 1), [&](int64_t index) {
        const int64_t b = index / (chunks - 1), chunk = index % (chunks - 1);
        double* sums = kept + (b * chunks + chunk + 1) * angles;
        std::fill_n(sums, angles, 0.0);
        for (int64_t t = chunk * CHUNK; t < (chunk + 1) * CHUNK; t++) {
            if (in.start(b, t)) std::fill_n(sums, angles, 0.0);
            const Wide<T>* turn = in.turn_of(b, t);
            for (int64_t head = 0; head < in.heads; head++) {
                const double step = in.step_of(b, t, head);
                double* to = sums + head * in.pairs;
                for (int64_t i = 0; i < in.pairs; i++) to[i] = wrap(to[i] + step * turn[i]);
            }
        }
    });
    for (int64_t b = 0; b < in.batch; b++) {
        double* first = kept + b * chunks * angles;
        for (int64_t i = 0; i < angles; i++) first[i] = angle ? double(angle[b * angles + i]) : 0.0;
        for (int64_t chunk = 1; chunk < chunks; chunk++) {
            double *before = first + (chunk - 1) * angles, *sums = first + chunk * angles;
            bool cut = false;
            for (int64_t t = (chunk - 1) * CHUNK; t < chunk * CHUNK; t++) cut = cut || in.start(b, t);
            for (int64_t i = 0; i < angles && !cut; i++) sums[i] = wrap(before[i] + sums[i]);
        }
    }
}

template <class T>
struct Outputs {
    T *q, *k, *v;
    Wide<T>*own, *angle, *key;
    double* kept;
};

template <class T>
void forward(const Inputs<T>& in, const T* values, int64_t stride, const Wide<T>* angle, const T* value,
             const Outputs<T>& out, int64_t threads) {
    using W = Wide<T>;
    const int64_t chunks = in.chunks(), size = in.size, pairs = in.pairs, width = in.heads * in.channels;
    sum_angles(in, angle, out.kept, threads);
    parallel_for(int(threads), in.batch * chunks, [&](int64_t index) {
        const int64_t b = index / chunks, t0 = index % chunks * CHUNK, t1 = std::min(in.time, t0 + CHUNK);
        W *c = workspace<0, W>(CHUNK * pairs), *s = workspace<1, W>(CHUNK * pairs);
        W *x = workspace<2, W>(size), *y = workspace<3, W>(size);
        double* now = workspace<4, double>(pairs);
        for (int64_t head = 0; head < in.heads; head++) {
            auto row = [&](int64_t t) { return ((b * in.time + t) * in.heads + head) * size; };
            auto gain = [&](int64_t t) { return in.gain[(b * in.time + t) * in.heads + head]; };
            std::copy_n(out.kept + index * in.angles() + head * pairs, pairs, now);
            in.angles_of_head(b, t0, t1, head, now, c, s);
            if (t0 == 0) {
                if (in.key && !in.start(b, 0)) {
                    scaled(size, gain(0), in.key + (b * in.heads + head) * size, out.k + row(0));
                } else {
                    std::fill_n(out.k + row(0), size, T{});
                }
            }
            for (int64_t t = t0; t < t1; t++) {
                in.biased(in.write, in.write_bias, b, t, head, x);
                in.biased(in.read, in.read_bias, b, t, head, y);
                out.own[(b * in.time + t) * in.heads + head] = dot(size, x, y);
                rotate(x, c + (t - t0) * pairs, s + (t - t0) * pairs, pairs);
                rotate(y, c + (t - t0) * pairs, s + (t - t0) * pairs, pairs);
                copy_row(size, y, out.q + row(t));
                if (t + 1 == in.time) {
                    std::copy_n(x, size, out.key + (b * in.heads + head) * size);
                } else if (in.start(b, t + 1)) {
                    std::fill_n(out.k + row(t + 1), size, T{});
                } else {
                    scaled(size, gain(t + 1), x, out.k + row(t + 1));
                }
            }
            if (t1 == in.time) {
                for (int64_t i = 0; i < pairs; i++) out.angle[(b * in.heads + head) * pairs + i] = W(now[i]);
            }
        }
        for (int64_t t = t0; t < t1; t++) {
            T* to = out.v + (b * in.time + t) * width;
            const T* before = t ? values + (b * in.time + t - 1) * stride : value ? value + b * width : nullptr;
            if (before && !in.start(b, t)) {
                std::copy_n(before, width, to);
            } else {
                std::fill_n(to, width, T{});
            }
        }
    });
}

template <class T>
struct Given {
    const T *q, *k, *v;
    const Wide<T>*own, *angle, *key;
    const double* kept;
};

template <class T>
struct Gradients {
    T *write, *read;
    Wide<T>*write_bias, *read_bias, *turn, *step, *gain;
    T* values;
    Wide<T>*angle, *key;  // null where these are, as value's
    T* value;
};

// Add what both a turned pair's gradients say of its angle.
template <class W>
SEQZOO_INLINE void add_angle(const W* __restrict y, const W* __restrict dy, double* __restrict to, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) to[i] += double(dy[2 * i + 1] * y[2 * i] - dy[2 * i] * y[2 * i + 1]);
}

// Gradients of one chunk, as if none came from the angles of later ones; begun[head][pair] is what goes to earlier ones.
template <class T>
void backward_chunk(const Inputs<T>& in, const Given<T>& given, const Gradients<T>& grad, int64_t b, int64_t chunk,
                    double* begun, Wide<T>* write_sums, Wide<T>* read_sums) {
    using W = Wide<T>;
    using V = Vec<W>;
    const int64_t size = in.size, pairs = in.pairs, heads = in.heads, shared = in.groups * size;
    const int64_t t0 = chunk * CHUNK, t1 = std::min(in.time, t0 + CHUNK);
    W *c = workspace<0, W>(CHUNK * pairs), *s = workspace<1, W>(CHUNK * pairs);
    double* now = workspace<4, double>(pairs);
    W* rows = workspace<5, W>(6 * size);
    W *x = rows, *y = rows + size, *turned = rows + 2 * size, *q = rows + 3 * size, *dturned = rows + 4 * size,
      *dq = rows + 5 * size;
    W *dwrite = workspace<6, W>(CHUNK * shared), *dread = workspace<7, W>(CHUNK * shared);
    double* dturn = workspace<8, double>(CHUNK * pairs);
    std::fill_n(dwrite, CHUNK * shared, W(0));
    std::fill_n(dread, CHUNK * shared, W(0));
    std::fill_n(dturn, CHUNK * pairs, 0.0);
    for (int64_t head = 0; head < heads; head++) {
        auto at = [&](int64_t t) { return (b * in.time + t) * heads + head; };
        std::copy_n(given.kept + (b * in.chunks() + chunk) * in.angles() + head * pairs, pairs, now);
        in.angles_of_head(b, t0, t1, head, now, c, s);
        double* angle = begun + head * pairs;  // the gradient of this token's angle, of all from it on
        for (int64_t i = 0; i < pairs; i++) {
            angle[i] = t1 == in.time ? double(given.angle[(b * heads + head) * pairs + i]) : 0.0;
        }
        for (int64_t t = t1 - 1; t >= t0; t--) {
            const W *cosines = c + (t - t0) * pairs, *sines = s + (t - t0) * pairs;
            in.biased(in.write, in.write_bias, b, t, head, x);
            in.biased(in.read, in.read_bias, b, t, head, y);
            std::copy_n(x, size, turned);
            std::copy_n(y, size, q);
            rotate(turned, cosines, sines, pairs);
            rotate(q, cosines, sines, pairs);
            copy_row(size, given.q + at(t) * size, dq);
            if (t + 1 == in.time) {
                std::copy_n(given.key + (b * heads + head) * size, size, dturned);
            } else if (in.start(b, t + 1)) {
                std::fill_n(dturned, size, W(0));
                grad.gain[at(t + 1)] = 0;
                std::fill_n(angle, pairs, 0.0);
            } else {
                const T* dk = given.k + at(t + 1) * size;
                scaled(size, in.gain[at(t + 1)], dk, dturned);
                grad.gain[at(t + 1)] = dot(size, turned, dk);
            }
            add_angle(turned, dturned, angle, pairs);
            add_angle(q, dq, angle, pairs);
            rotate_back(dturned, cosines, sines, pairs);
            rotate_back(dq, cosines, sines, pairs);
            V own = broadcast<V>(given.own[at(t)]);
            W *to_write = dwrite + (t - t0) * shared + in.group(head) * size,
              *to_read = dread + (t - t0) * shared + in.group(head) * size, *to_write_bias = write_sums + head * size,
              *to_read_bias = read_sums + head * size;
            for_each_vector<T>(size, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
                V dx = fma(own, load(y + i), load(dturned + i)), dy = fma(own, load(x + i), load(dq + i));
                store(to_write + i, load(to_write + i) + dx);
                store(to_read + i, load(to_read + i) + dy);
                store(to_write_bias + i, load(to_write_bias + i) + dx);
                store(to_read_bias + i, load(to_read_bias + i) + dy);
            });
            const W* turn = in.turn_of(b, t);
            const double step = in.step[at(t)];
            double total = 0, *to_turn = dturn + (t - t0) * pairs;
            for (int64_t i = 0; i < pairs; i++) to_turn[i] += angle[i] * step;
            for (int64_t i = 0; i < pairs; i++) total += angle[i] * turn[i];
            grad.step[at(t)] = W(total);
        }
        if (in.start(b, t0)) std::fill_n(angle, pairs, 0.0);
        if (t0) continue;
        grad.gain[at(0)] = 0;
        if (!in.key) continue;
        const T* dk = given.k + at(0) * size;
        const W* key = in.key + (b * heads + head) * size;
        const bool open = !in.start(b, 0);
        if (open) grad.gain[at(0)] = dot(size, key, dk);
        scaled(size, open ? in.gain[at(0)] : W(0), dk, grad.key + (b * heads + head) * size);
    }
    const int64_t first = (b * in.time + t0);
    for (int64_t n = 0; n < t1 - t0; n++) {
        copy_row(shared, dwrite + n * shared, grad.write + (first + n) * shared);
        copy_row(shared, dread + n * shared, grad.read + (first + n) * shared);
    }
    for (int64_t i = 0; i < (t1 - t0) * pairs; i++) grad.turn[first * pairs + i] = W(dturn[i]);
    const int64_t width = heads * in.channels;
    for (int64_t t = t0; t < t1; t++) {
        T* to = grad.values + (b * in.time + t) * width;
        if (t + 1 < in.time && !in.start(b, t + 1)) {
            std::copy_n(given.v + (b * in.time + t + 1) * width, width, to);
        } else {
            std::fill_n(to, width, T{});
        }
    }
    if (t0 == 0 && grad.value) {
        if (in.start(b, 0)) {
            std::fill_n(grad.value + b * width, width, T{});
        } else {
            std::copy_n(given.v + b * in.time * width, width, grad.value + b * width);
        }
    }
}

template <class T>
void backward(const Inputs<T>& in, const Given<T>& given, const Gradients<T>& grad, int64_t threads) {
    using W = Wide<T>;
    const int64_t chunks = in.chunks(), angles = in.angles(), pairs = in.pairs, learned = in.heads * in.size;
    const int64_t all = in.batch * chunks, tasks = std::min(TASKS, all);
    double* begun = workspace<9, double>(all * angles);
    W* sums = workspace<10, W>(tasks * 2 * learned);
    parallel_for(int(threads), tasks, [&](int64_t task) {
        W* own = sums + task * 2 * learned;
        std::fill_n(own, 2 * learned, W(0));
        for (int64_t index = task * all / tasks; index < (task + 1) * all / tasks; index++) {
            backward_chunk(in, given, grad, index / chunks, index % chunks, begun + index * angles, own,
                           own + learned);
        }
    });
    sum_rows(tasks, 2 * learned, learned, sums, grad.write_bias);
    sum_rows(tasks, 2 * learned, learned, sums + learned, grad.read_bias);

    // begun becomes what each chunk sends back with what all later ones do; then that goes to the tokens before it.
    for (int64_t b = 0; b < in.batch; b++) {
        double* first = begun + b * chunks * angles;
        for (int64_t chunk = chunks - 2; chunk >= 0; chunk--) {
            bool cut = false;
            for (int64_t t = chunk * CHUNK; t < (chunk + 1) * CHUNK; t++) cut = cut || in.start(b, t);
            double *to = first + chunk * angles, *later = to + angles;
            for (int64_t i = 0; i < angles && !cut; i++) to[i] += later[i];
        }
        for (int64_t i = 0; i < angles && grad.angle; i++) grad.angle[b * angles + i] = W(first[i]);
    }
    parallel_for(int(threads), in.batch * (chunks - 1), [&](int64_t index) {
        const int64_t b = index / (chunks - 1), chunk = index % (chunks - 1), t0 = chunk * CHUNK;
        const double* later = begun + (b * chunks + chunk + 1) * angles;
        double* dturn = workspace<8, double>(pairs);
        for (int64_t t = t0 + CHUNK - 1; t >= t0; t--) {
            const W* turn = in.turn_of(b, t);
            W *to_turn = grad.turn + (b * in.time + t) * pairs, *to_step = grad.step + (b * in.time + t) * in.heads;
            std::fill_n(dturn, pairs, 0.0);
            for (int64_t head = 0; head < in.heads; head++) {
                const double* angle = later + head * pairs;
                const double step = in.step_of(b, t, head);
                double total = 0;
                for (int64_t i = 0; i < pairs; i++) dturn[i] += angle[i] * step;
                for (int64_t i = 0; i < pairs; i++) total += angle[i] * turn[i];
                to_step[head] += W(total);
            }
            for (int64_t i = 0; i < pairs; i++) to_turn[i] += W(dturn[i]);
            if (in.start(b, t)) break;
        }
    });
}

template <class T>
Inputs<T> make(const Sizes<T>& sizes, const void* write, const void* read, const void* write_bias,
               const void* read_bias, const void* turn, const void* step, const void* gain, const void* key,
               const void* starts) {
    auto wide = [](const void* x) { return static_cast<const Wide<T>*>(x); };
    return {sizes,      static_cast<const T*>(write), static_cast<const T*>(read),      wide(write_bias),
            wide(read_bias), wide(turn), wide(step), wide(gain), wide(key), static_cast<const bool*>(starts)};
}

}  // namespace

SEQZOO_EXPORT void turned_keys_forward(int64_t threads, int64_t dtype, int64_t batch, int64_t time, int64_t groups,
                                       int64_t size, int64_t heads, int64_t channels, int64_t pairs, int64_t stride,
                                       const void* write, const void* read, const void* write_bias,
                                       const void* read_bias, const void* turn, const void* step, const void* gain,
                                       const void* values, const void* angle, const void* key, const void* value,
                                       const void* starts, void* q, void* k, void* v, void* own, void* last_angle,
                                       void* last_key, void* kept) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        Sizes<T> sizes{batch, time, groups, size, heads, channels, pairs};
        auto in = make(sizes, write, read, write_bias, read_bias, turn, step, gain, key, starts);
        Outputs<T> out{static_cast<T*>(q),          static_cast<T*>(k),        static_cast<T*>(v), static_cast<W*>(own),
                       static_cast<W*>(last_angle), static_cast<W*>(last_key), static_cast<double*>(kept)};
        forward(in, static_cast<const T*>(values), stride, static_cast<const W*>(angle), static_cast<const T*>(value),
                out, threads);
    });
}

// The gradients of angle, key and value may be null where these are.
SEQZOO_EXPORT void turned_keys_backward(int64_t threads, int64_t dtype, int64_t batch, int64_t time, int64_t groups,
                                        int64_t size, int64_t heads, int64_t channels, int64_t pairs, const void* dq,
                                        const void* dk, const void* dv, const void* down, const void* dlast_angle,
                                        const void* dlast_key, const void* kept, const void* write, const void* read,
                                        const void* write_bias, const void* read_bias, const void* turn,
                                        const void* step, const void* gain, const void* key, const void* starts,
                                        void* dwrite, void* dread, void* dwrite_bias, void* dread_bias, void* dturn,
                                        void* dstep, void* dgain, void* dvalues, void* dangle, void* dkey,
                                        void* dvalue) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        auto from = [](const void* x) { return static_cast<const T*>(x); };
        auto wide_from = [](const void* x) { return static_cast<const Wide<T>*>(x); };
        auto to = [](void* x) { return static_cast<T*>(x); };
        auto wide_to = [](void* x) { return static_cast<Wide<T>*>(x); };
        Sizes<T> sizes{batch, time, groups, size, heads, channels, pairs};
        auto in = make(sizes, write, read, write_bias, read_bias, turn, step, gain, key, starts);
        Given<T> given{from(dq), from(dk), from(dv), wide_from(down), wide_from(dlast_angle), wide_from(dlast_key),
                       static_cast<const double*>(kept)};
        Gradients<T> grad{to(dwrite), to(dread), wide_to(dwrite_bias), wide_to(dread_bias), wide_to(dturn),
                          wide_to(dstep), wide_to(dgain), to(dvalues), wide_to(dangle), wide_to(dkey), to(dvalue)};
        backward(in, given, grad, threads);
    });
}
