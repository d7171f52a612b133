// What every native.cpp needs at its boundary: exported functions, data types, threads and workspaces.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "simd.h"

// Functions that ctypes finds; all else stays inside the library. Exported names begin with their operator's.
#define SEQZOO_EXPORT extern "C" __attribute__((visibility("default")))

// OpenMP's runtime is the one that torch has loaded: its entry point is called by name, because a pragma would link
// the compiler's own runtime, and differently with each compiler. Where there is none the work runs on one thread.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_thread_num();

namespace seqzoo {

// Call body(T()) for the data type of that code: 0 double, 1 float, 2 bfloat16 (tensors.py has the same).
template <class Body>
void with_dtype(int code, Body body) {
    if (code == 0) return body(double());
    if (code == 1) return body(float());
    return body(bfloat16());
}

// Call body(thread) on at most `threads` threads, thread 0 among them; OpenMP may have fewer to give.
template <class Body>
void parallel(int threads, Body body) {
    if (threads <= 1 || !GOMP_parallel || !omp_get_thread_num) return body(0);
    GOMP_parallel([](void* data) { (*static_cast<Body*>(data))(omp_get_thread_num()); }, &body, unsigned(threads), 0);
}

// Call body(index) for 0 <= index < count; each thread takes the next index as soon as it is free.
template <class Body>
void parallel_for(int threads, int64_t count, Body body) {
    if (count < threads) threads = int(count);
    std::atomic<int64_t> next{0};
    parallel(threads, [&](int) {
        for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(index);
    });
}

// Memory of this thread that stays allocated from call to call: fresh pages cost more than the arithmetic in them. Each
// SLOT and type is one buffer, of which the last request holds: a larger one forgets what stood there. Slots from 100
// are gemm.h's.
template <int SLOT, class T>
T* workspace(size_t count) {
    struct Free {
        void operator()(void* pointer) const { std::free(pointer); }
    };
    static thread_local std::unique_ptr<void, Free> memory;
    static thread_local size_t size = 0;
    size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
    if (wanted > size) {
        memory.reset();
        memory.reset(std::aligned_alloc(64, wanted));
        size = wanted;
    }
    return static_cast<T*>(memory.get());
}

}  // namespace seqzoo
