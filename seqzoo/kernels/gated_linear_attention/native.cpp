// Gated linear attention on the CPU: S_t = e^{g_t} S_{t-1} + k_t v_t^T, o_t = S_t^T q_t.
#include "chunks.h"
#include "walk.h"

using namespace linear_attention;

// `kept`, if any, takes the states that enter every SPAN steps (Problem::at_kept); the backward needs them.
// With `blocks` the chunked products run, each group's heads cut into so many blocks; with 0 all goes token by token.
SEQZOO_EXPORT void gated_linear_attention_forward(int64_t dtype, int64_t threads, int64_t blocks, int64_t batch,
                                                  int64_t time, int64_t groups, int64_t heads, int64_t key,
                                                  int64_t value, const void* q, const void* k, const void* v,
                                                  const void* log_decay, int64_t per_channel, const void* bonus,
                                                  const void* state, const void* starts, const void* write,
                                                  const void* skip, void* o, void* last, void* kept) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto p = problem<T>(batch, time, groups, heads, key, value, q, k, v, log_decay, per_channel, bonus, state,
                            starts, write, skip);
        if (blocks) {
            chunks_forward(threads, p, blocks, static_cast<T*>(o), static_cast<W*>(last), static_cast<W*>(kept));
        } else {
            walk_forward(threads, p, static_cast<T*>(o), static_cast<W*>(last), static_cast<W*>(kept));
        }
    });
}

// `parts` as in chunks_backward; without blocks, log_decay_grad and bonus_grad as in walk_backward.
SEQZOO_EXPORT void gated_linear_attention_backward(int64_t dtype, int64_t threads, int64_t blocks, int64_t batch,
                                                   int64_t time, int64_t groups, int64_t heads, int64_t key,
                                                   int64_t value, const void* q, const void* k, const void* v,
                                                   const void* log_decay, int64_t per_channel, const void* bonus,
                                                   const void* state, const void* starts, const void* write,
                                                   const void* skip, const void* o_grad, const void* last_grad,
                                                   const void* kept, void* q_grad, void* k_grad, void* v_grad,
                                                   void* log_decay_grad, void* bonus_grad, void* state_grad,
                                                   void* write_grad, void* skip_grad, void* parts) {
    with_dtype(int(dtype), [&](auto kind) {
        using T = decltype(kind);
        using W = Wide<T>;
        auto p = problem<T>(batch, time, groups, heads, key, value, q, k, v, log_decay, per_channel, bonus, state,
                            starts, write, skip);
        auto data = [](void* x) { return static_cast<T*>(x); };
        auto wide = [](void* x) { return static_cast<W*>(x); };
        Gradients<T> to{data(q_grad),     data(k_grad),     data(v_grad),     wide(log_decay_grad),
                        wide(bonus_grad), wide(state_grad), wide(write_grad), wide(skip_grad)};
        if (blocks) {
            chunks_backward(threads, p, blocks, static_cast<const T*>(o_grad), static_cast<const W*>(last_grad),
                            static_cast<const W*>(kept), to, static_cast<W*>(parts));
        } else {
            walk_backward(threads, p, static_cast<const T*>(o_grad), static_cast<const W*>(last_grad),
                          static_cast<const W*>(kept), to);
        }
    });
}
