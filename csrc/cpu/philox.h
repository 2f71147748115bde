// Dropout draws: Philox4x32 with 7 rounds (Salmon et al., SC 2011), 64 columns at a time.
//
// Key = the client's seed; counter = (row key low, row key high, column / 8, 0); the 128 output bits are the 16-bit draws of columns 8 c .. 8 c + 7, low half
// of each word first. With AVX-512 a counter word sits in the low half of a 64-bit lane: the multiplication reads that half only, so the high halves hold
// anything, and a round is 2 multiplications, 2 shifts and 2 three-way xors for 64 draws.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says both of its own _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#include "simd.h"

namespace hetlora {

constexpr uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

// draws[j] of column 8 * block + j for 64 columns; eight counters side by side, for the compiler to vectorise.
HETLORA_INLINE void philox_draws(uint64_t seed, uint64_t key, uint32_t block, uint16_t* draws) {
    uint32_t c0[8], c1[8], c2[8], c3[8];
    for (int i = 0; i < 8; ++i) {
        c0[i] = static_cast<uint32_t>(key);
        c1[i] = static_cast<uint32_t>(key >> 32);
        c2[i] = block + static_cast<uint32_t>(i);
        c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        for (int i = 0; i < 8; ++i) {
            const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kPhilox0, p1 = static_cast<uint64_t>(c2[i]) * kPhilox1;
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(p1);
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    for (int i = 0; i < 8; ++i) {
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        for (int w = 0; w < 4; ++w) {
            draws[8 * i + 2 * w] = static_cast<uint16_t>(words[w]);
            draws[8 * i + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
        }
    }
}

#if defined(__x86_64__) && defined(__GNUC__)

// Bit j set where column 8 * block + j is kept.
HETLORA_AVX512 inline __attribute__((always_inline)) uint64_t philox_keep_avx512(uint64_t seed, uint64_t key, uint32_t block, __m512i threshold) {
    const __m512i m0 = _mm512_set1_epi64(kPhilox0), m1 = _mm512_set1_epi64(kPhilox1);
    __m512i c0 = _mm512_set1_epi64(static_cast<long long>(key)), c1 = _mm512_srli_epi64(c0, 32), c3 = _mm512_setzero_si512();
    // In this order the interleaving below leaves the draws in the order of the columns.
    __m512i c2 = _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
        c1 = p1;
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
        c3 = p0;
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32)), high = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    const uint64_t first = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(low, high), threshold);
    const uint64_t second = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(low, high), threshold);
    return first | second << 32;
}
#endif

}  // namespace hetlora
