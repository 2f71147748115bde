// Dropout draws: Philox4x32 with 7 rounds (Salmon et al., SC 2011); reference.keep_mask says how its bits name the columns to drop.
#pragma once
#include <cstdint>

namespace hetlora {

constexpr int PHILOX_ROUNDS = 7, DRAWS = 8;  // 16-bit draws, so columns, of one counter

struct Counter {
    uint32_t word[4];
    // Draw e: low half of each word first.
    __device__ __forceinline__ uint32_t draw(int e) const { return e % 2 ? word[e / 2] >> 16 : word[e / 2] & 0xffffu; }
};

__device__ __forceinline__ Counter philox(Counter c, uint64_t key) {
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint64_t left = uint64_t(0xD2511F53u) * c.word[0], right = uint64_t(0xCD9E8D57u) * c.word[2];
        c = {static_cast<uint32_t>(right >> 32) ^ c.word[1] ^ low, static_cast<uint32_t>(right), static_cast<uint32_t>(left >> 32) ^ c.word[3] ^ high,
             static_cast<uint32_t>(left)};
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return c;
}

// The draws of columns `column` .. `column` + 7 of the row with this key.
__device__ __forceinline__ Counter draws(int64_t seed, int64_t row_key, int column) {
    return philox({static_cast<uint32_t>(row_key), static_cast<uint32_t>(row_key >> 32), static_cast<uint32_t>(column / DRAWS), 0u}, seed);
}

}  // namespace hetlora
