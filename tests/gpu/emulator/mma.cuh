// Host twins of csrc/cuda/mma.cuh, found before it: copies that arrive when they are waited for, and the warp's matrix products by their definition.
#pragma once
#include <cmath>

#include "cuda_on_cpu.h"

namespace hetlora {

inline void copy_async(void* to, const void* from, int bytes) { emulator::start_copy(to, from, bytes); }
inline void close_copies() { emulator::close_copies(); }

template <int PENDING>
void await_copies() {
    emulator::await_copies(PENDING);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&out)[4], const void* row) {
    const int lane = emulator::here().lane, across = lane % 4 * 2, down = lane / 4;
    emulator::offer(lane) = row;
    emulator::meet(0xffffffffu, emulator::Collective::matrices);
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; ++e) {
            const int r = TRANSPOSED ? across + e : down, c = TRANSPOSED ? down : across + e;
            pair |= static_cast<uint32_t>(static_cast<const uint16_t*>(emulator::offer(8 * matrix + r))[c]) << 16 * e;
        }
        out[matrix] = pair;
    }
    emulator::meet(0xffffffffu, emulator::Collective::matrices);
}

template <class T>
float element(uint32_t pair, int e) {
    const uint16_t bits = static_cast<uint16_t>(pair >> 16 * e);
    T value;
    memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return static_cast<float>(value);
}

// Towards zero: tensor cores cut sums off, so that a long chain of them drifts (Fasi, Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores,
// PeerJ Computer Science 7, 2021). Here once a product; an A100 may do so twice.
inline float cut(double value) {
    const float rounded = static_cast<float>(value);
    return std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value) ? std::nextafterf(rounded, 0.0f) : rounded;
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int lane = emulator::here().lane;
    const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    emulator::offer(lane) = own;
    emulator::meet(0xffffffffu, emulator::Collective::product);
    const auto registers = [](int of) { return static_cast<const uint32_t*>(emulator::offer(of)); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double total = c[i];
        for (int k = 0; k < 16; ++k) {
            const double left = element<T>(registers(row % 8 * 4 + k % 8 / 2)[row / 8 + k / 8 * 2], k % 2);
            const double right = element<T>(registers(column * 4 + k % 8 / 2)[4 + k / 8], k % 2);
            total += left * right;
        }
        c[i] = cut(total);
    }
    emulator::meet(0xffffffffu, emulator::Collective::product);
}

}  // namespace hetlora
