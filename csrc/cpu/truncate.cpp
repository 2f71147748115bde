// truncate_: rows of client k = the leading r_k rows of the bank, for all modules and clients in one call.
//
// A task owns kTile consecutive elements of one module's bank: it reads them once, converts them once into a buffer in L1, and writes the buffer to every
// client that has these rows. Bytes: the bank once, the clients' rows once. Client by client instead, the bank is read K times and converted K times.
// Large results are written past the cache: the store then does not read its target first (3 bytes moved for 2 otherwise).
#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kTile = 4096;
constexpr int64_t kStreamBytes = 8 << 20;  // results below this may still be in the cache when they are used

struct Tile {
    int64_t module, begin;
};

alignas(64) const char kZeros[kTile * 8] = {};

// The tile's elements in the type of the result: the bank itself when the types agree, else converted into `buffer`.
const char* converted(const Matrix& bank, const Matrix& out, int64_t begin, int64_t n, char* buffer) {
    if (bank.type == out.type) {
        return bank.at(begin);
    }
    alignas(64) float sums[kTile];
    alignas(64) double wide[kTile];
    if (bank.type == Type::f64) {
        load_block(bank.type, bank.at(begin), wide, n);
        store_block(out.type, buffer, wide, n);
    } else {
        load_block(bank.type, bank.at(begin), sums, n);
        store_block(out.type, buffer, sums, n);
    }
    return buffer;
}

void truncate(const Tensors& out_list, const Tensors& bank_list, const Integers& rank_list, bool dense) {
    std::vector<Matrix> banks = matrices("bank", bank_list, bank_list.size());
    std::vector<Matrix> outs = matrices("out", out_list, banks.size(), dense ? 3 : 2);
    const Integers ranks = expanded("ranks", rank_list, banks.size());
    const Layout layout(ranks, banks.size(), dense ? Integers(banks.size(), -1) : rows_of(outs));
    std::vector<Tile> tiles;
    int64_t bytes = 0;
    for (int64_t m = 0; m < layout.modules(); ++m) {
        const Matrix &bank = banks[m], &out = outs[m];
        STD_TORCH_CHECK(out.width == bank.width, "out: expected width ", bank.width, ", got ", out.width);
        STD_TORCH_CHECK(layout.largest(m) <= bank.rows, "ranks: expected at most ", bank.rows, " (the bank's rows), got ", layout.largest(m));
        STD_TORCH_CHECK(!dense || (out.planes() == layout.clients() && out.rows == bank.rows), "out: expected shape [", layout.clients(), ", ", bank.rows, ", ",
                        bank.width, "]");
        for (int64_t begin = 0; begin < (dense ? bank.rows : layout.largest(m)) * bank.width; begin += kTile) {
            tiles.push_back({m, begin});
        }
        bytes += out.planes() * out.rows * out.width * size_of(out.type);
    }
    const bool stream = bytes > kStreamBytes;
    const int64_t count = static_cast<int64_t>(tiles.size()), parts = part_count(count, bytes);
    for_tasks(parts, count, [&](int64_t, int64_t task) {
        const Tile tile = tiles[task];
        const Matrix &bank = banks[tile.module], &out = outs[tile.module];
        const int64_t size = size_of(out.type), width = bank.width;
        const int64_t end = std::min(tile.begin + kTile, bank.rows * width);
        alignas(64) char buffer[kTile * 8];
        const char* source = converted(bank, out, tile.begin, end - tile.begin, buffer);
        for (int64_t k = 0; k < layout.clients(); ++k) {
            const int64_t owned = std::min(layout.rank(tile.module, k) * width, end) - tile.begin;  // elements of the tile that the client has
            char* target = out.at(tile.begin + (dense ? k * bank.rows : layout.first_row(tile.module, k)) * width);
            if (owned > 0) {
                copy_block(target, source, owned * size, stream);
            }
            if (dense) {
                const int64_t kept = std::max<int64_t>(owned, 0);
                copy_block(target + kept * size, kZeros, (end - tile.begin - kept) * size, stream);
            }
        }
        stream_fence();
    });
    for (Matrix& out : outs) {
        out.write_back();
    }
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) { library.impl("truncate_", TORCH_BOX(&hetlora::truncate)); }
