// Memory for what lives as long as one call, kept from call to call by each thread that calls.
#pragma once

#include <cstddef>

#include <memory>

namespace whimbrel::WHIMBREL_ISA {

// At least `bytes` bytes on a cache line. What a call before this one got is lost.
inline char* scratch(size_t bytes) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local size_t size = 0;
    if (bytes > size) {
        memory.reset(new char[bytes + 64]);
        size = bytes;
    }
    return reinterpret_cast<char*>((reinterpret_cast<size_t>(memory.get()) + 63) / 64 * 64);
}

}  // namespace whimbrel::WHIMBREL_ISA
