#include "tile_products.h"

#if defined(HETLORA_TILES)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace hetlora::tiles {

bool permitted() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for all threads of the process
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

namespace {

// Sixteen floats as three bfloat16 numbers each, in the upper halves: their sum is the float, whose 24 bits they share. What is not finite stays in the first.
HETLORA_AMX HETLORA_INLINE void split(__m512 value, __m512i (&parts)[3]) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    const __mmask16 finite =
        _mm512_cmplt_epu32_mask(_mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF)), _mm512_set1_epi32(0x7F800000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    parts[0] = _mm512_and_si512(_mm512_castps_si512(value), upper);
    parts[0] = _mm512_mask_or_epi32(parts[0], nan, parts[0], _mm512_set1_epi32(0x00400000));
    const __m512 rest = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(parts[0]));
    parts[1] = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    parts[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(parts[1])));
}

// The tile's 16 x 16 pairs, transposed: between the left's form [row][pair of addends] and the right's [pair of addends][column].
HETLORA_AMX void turn(uint16_t* tile) {
    auto* pairs = reinterpret_cast<uint32_t*>(tile);
    __m512i rows[16], other[16];
    for (int i = 0; i < 16; ++i) {
        rows[i] = _mm512_load_si512(pairs + 16 * i);
    }
    for (int i = 0; i < 8; ++i) {
        other[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        other[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        rows[4 * i] = _mm512_unpacklo_epi64(other[4 * i], other[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(other[4 * i], other[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(other[4 * i + 1], other[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(other[4 * i + 1], other[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88), high = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xDD);
        const __m512i low2 = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88), high2 = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xDD);
        other[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        other[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xDD);
        other[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
        other[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xDD);
    }
    for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(pairs + 16 * i, other[i]);
    }
}

}  // namespace

HETLORA_AMX void pack_row(const Packed& to, uint16_t* data, int64_t side, const void* from, int64_t n) {
    for (int64_t d = 0; d < to.depths; ++d) {
        const int64_t left = n - d * kDepth;
        uint16_t* row = to.tile(data, side, d) + side % kSide * kDepth;
        if (to.parts == 1) {
            _mm512_store_si512(row, _mm512_maskz_loadu_epi16(first32(left), static_cast<const uint16_t*>(from) + d * kDepth));
            continue;
        }
        for (int64_t half = 0; half < 2; ++half) {
            __m512i parts[3];
            split(_mm512_maskz_loadu_ps(first(left - 16 * half), static_cast<const float*>(from) + d * kDepth + 16 * half), parts);
            for (int p = 0; p < 3; ++p) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(row + p * kTile + 16 * half), _mm512_cvtepi32_epi16(_mm512_srli_epi32(parts[p], 16)));
            }
        }
    }
}

HETLORA_AMX void pack_pair(const Packed& to, uint16_t* data, int64_t pair, const void* even, const void* odd, int64_t width) {
    for (int64_t side = 0; side < width; side += kSide) {
        const __mmask16 inside = first(width - side);
        uint16_t* row = to.tile(data, side, pair / 16) + pair % 16 * kDepth;
        if (to.parts == 1) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(even) + side));
            const __m512i high =
                odd == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(odd) + side));
            _mm512_store_si512(row, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            continue;
        }
        __m512i low[3], high[3];
        split(_mm512_maskz_loadu_ps(inside, static_cast<const float*>(even) + side), low);
        split(odd == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(inside, static_cast<const float*>(odd) + side), high);
        for (int p = 0; p < 3; ++p) {
            _mm512_store_si512(row + p * kTile,
                               _mm512_or_si512(_mm512_srli_epi32(low[p], 16), _mm512_and_si512(high[p], _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))));
        }
    }
}

void clear_rows(const Packed& to, uint16_t* data, int64_t side) {
    for (; side % kBlock != 0; ++side) {
        for (int64_t d = 0; d < to.depths; ++d) {
            for (int64_t p = 0; p < to.parts; ++p) {
                std::memset(to.tile(data, side, d) + p * kTile + side % kSide * kDepth, 0, 2 * kDepth);
            }
        }
    }
}

void clear_pairs(const Packed& to, uint16_t* data, int64_t pair, int64_t width) {
    for (; pair < 16 * to.depths; ++pair) {
        for (int64_t side = 0; side < width; side += kSide) {
            for (int64_t p = 0; p < to.parts; ++p) {
                std::memset(to.tile(data, side, pair / 16) + p * kTile + pair % 16 * kDepth, 0, 2 * kDepth);
            }
        }
    }
}

void turn_all(const Packed& of, uint16_t* data, int64_t side) {
    for (int64_t i = 0; i < of.depths * of.parts; ++i) {
        turn(of.tile(data, side, 0) + i * kTile);
    }
}

namespace {

// sums [32, 32] (+)= the addends of blocks [begin, end): J tiles of columns. The smallest products come first.
template <int I, int J>
HETLORA_AMX void multiply(const Packed& left, const uint16_t* l, const Packed& right, const uint16_t* r, int64_t begin, int64_t end, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t most = std::max(left.parts, right.parts) - 1, next_l = left.depths * left.parts * kTile, next_r = right.depths * right.parts * kTile;
    for (int64_t order = most; order >= 0; --order) {
        for (int64_t p = std::max<int64_t>(0, order - right.parts + 1); p <= std::min(order, left.parts - 1); ++p) {
            const uint16_t *own_l = l + (begin * left.parts + p) * kTile, *own_r = r + (begin * right.parts + order - p) * kTile;
            for (int64_t d = begin; d < end; ++d, own_l += left.parts * kTile, own_r += right.parts * kTile) {
                _tile_loadd(4, own_l, 64);
                _tile_loadd(6, own_r, 64);
                _tile_dpbf16ps(0, 4, 6);
                if constexpr (J == 2) {
                    _tile_loadd(7, own_r + next_r, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if constexpr (I == 2) {
                    _tile_loadd(5, own_l + next_l, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    if constexpr (J == 2) {
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
            }
        }
    }
    _tile_stored(0, sums, kBlock * 4);
    _tile_stored(1, sums + kSide, kBlock * 4);
    _tile_stored(2, sums + kSide * kBlock, kBlock * 4);
    _tile_stored(3, sums + kSide * kBlock + kSide, kBlock * 4);
}

}  // namespace

HETLORA_AMX void block(const Packed& left, const uint16_t* l, int64_t row, int64_t rows, const Packed& right, const uint16_t* r, int64_t column,
                       int64_t columns, float* sums) {
    constexpr int64_t chain = kPart / kDepth;
    const uint16_t *own_l = left.tile(l, row, 0), *own_r = right.tile(r, column, 0);
    alignas(64) float more[kBlock * kBlock];
    for (int64_t d = 0; d < left.depths; d += chain) {
        const int64_t end = std::min(d + chain, left.depths);
        float* to = d == 0 ? sums : more;
        const bool both_rows = rows > kSide, both_columns = columns > kSide;
        both_rows      ? both_columns ? multiply<2, 2>(left, own_l, right, own_r, d, end, to) : multiply<2, 1>(left, own_l, right, own_r, d, end, to)
        : both_columns ? multiply<1, 2>(left, own_l, right, own_r, d, end, to)
                       : multiply<1, 1>(left, own_l, right, own_r, d, end, to);
        for (int64_t i = 0; d > 0 && i < kBlock * kBlock; ++i) {
            sums[i] += more[i];
        }
    }
}

}  // namespace hetlora::tiles

#endif
