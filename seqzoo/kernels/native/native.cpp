// What the loader asks before it chooses a library.
#include "interface.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// The place in build.py's list of the best instruction set that this CPU and its operating system have.
SEQZOO_EXPORT int native_best_instruction_set() {
#if defined(__x86_64__)
    auto has = [](auto... each) { return (... && each); };
    if (!has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"))) return 0;
    if (!has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
             __builtin_cpu_supports("avx512vl"))) {
        return 1;
    }
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}

// Whether an OpenMP runtime was there when this library was loaded; without one a single thread serves.
SEQZOO_EXPORT bool native_has_threads() { return GOMP_parallel && omp_get_thread_num; }

// Ask for large pages under memory that nobody has written to yet; where there are none, nothing changes.
SEQZOO_EXPORT void native_prefer_large_pages(void* start, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t PAGE = 4096;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + PAGE - 1) / PAGE * PAGE;
    uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) / PAGE * PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}
