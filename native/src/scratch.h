// Memory for what lives as long as one call, kept from call to call by each thread that calls.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace whimbrel::WHIMBREL_ISA {

// Bytes after each array that is cut from a larger piece; builds that check addresses forbid them to all.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t fence = 128;
#else
constexpr int64_t fence = 0;
#endif

// Cuts `count` things from memory on a cache line, and moves it on to the next one.
template <typename T>
T* take(char*& memory, int64_t count) {
    T* taken = reinterpret_cast<T*>(memory);
    const size_t bytes = count * sizeof(T), all = (bytes + 63) / 64 * 64 + fence;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory + bytes, all - bytes);
#endif
    memory += all;
    return taken;
}

// What a thread keeps. A type of its own: the destructor of a standard one would be one function for all instruction sets,
// and the linker free to keep the widest, which not every processor has.
struct Kept {
    char* begin = nullptr;
    size_t size = 0;
    ~Kept() { delete[] begin; }
};

// At least `bytes` bytes on a cache line. What a call before this one got is lost.
inline char* scratch(size_t bytes) {
    static thread_local Kept kept;
    if (bytes > kept.size || fence) {
        delete[] kept.begin;
        kept.begin = nullptr, kept.size = 0;  // should there be no memory for more
        kept.begin = new char[bytes + 64];
        kept.size = bytes;
    }
    return reinterpret_cast<char*>((reinterpret_cast<size_t>(kept.begin) + 63) / 64 * 64);
}

}  // namespace whimbrel::WHIMBREL_ISA
