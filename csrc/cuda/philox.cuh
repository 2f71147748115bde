// Dropout draws: Philox4x32 with 7 rounds (Salmon et al., SC 2011); reference.keep_mask says how its bits name the columns to drop.
#pragma once
#include <cstdint>

namespace hetlora {

constexpr int PHILOX_ROUNDS = 7, DRAWS = 8;  // 16-bit draws, so columns, of one counter

// What drops an element, from the number of the 65536 draws that do: draws are compared as they lie in a word, without taking its halves apart.
__device__ __forceinline__ uint32_t drop_limit(unsigned threshold) { return threshold < 0x10000u ? threshold << 16 : 0xffffffffu; }

struct Counter {
    uint32_t word[4];
    // Whether element e is dropped: its draw, the low half of each word first, is below the limit. What lies under a high half does not change the answer.
    __device__ __forceinline__ bool drops(int e, uint32_t limit) const { return (e % 2 ? word[e / 2] : word[e / 2] << 16) < limit; }
};

__device__ __forceinline__ Counter philox(Counter c, uint64_t key) {
    constexpr uint32_t LEFT = 0xD2511F53u, RIGHT = 0xCD9E8D57u;
    uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        // Not as 64-bit products: nvcc 13 then adds zero to each half.
        c = {__umulhi(RIGHT, c.word[2]) ^ c.word[1] ^ low, RIGHT * c.word[2], __umulhi(LEFT, c.word[0]) ^ c.word[3] ^ high, LEFT * c.word[0]};
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
