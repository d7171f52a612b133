// What the loader asks before it chooses a library.
#include "interface.h"

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
