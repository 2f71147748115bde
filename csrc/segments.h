// The segments of a LoRA op's call: which of a batch's rows are whose, checked for memory safety, for the bindings of both libraries.
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "types_torch.h"

namespace hetlora {

// Integers that lie elsewhere.
struct Span {
    Span(const Integers& all) : data(all.data()), size(all.size()) {}
    Span(const int64_t* data, size_t size) : data(data), size(size) {}
    int64_t operator[](size_t i) const { return data[i]; }
    const int64_t* begin() const { return data; }
    const int64_t* end() const { return data + size; }

    const int64_t* data;
    size_t size;
};

// The arguments that every LoRA op takes (`_SEGMENT_ARGS` of the schemas).
struct Segments {
    const MaybeTensor &seeds, &row_keys, &index;
    Span ranks, starts, lengths;
    double dropout;
};

// The same arguments from one list: the number of rows of x, then K ranks, K first rows and K numbers of rows. One list instead of three saves 0.4 us a list in
// the dispatcher.
inline Segments segments_of(const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& all, double dropout) {
    STD_TORCH_CHECK(all.size() % 3 == 1, "segments: expected the rows of x and three integers for each client, got ", all.size());
    const size_t clients = all.size() / 3;
    const int64_t* data = all.data() + 1;
    return {seeds, row_keys, index, {data, clients}, {data + clients, clients}, {data + 2 * clients, clients}, dropout};
}

// A client that has rank and rows.
struct Segment {
    int64_t client, row, rank, start, length, flat;  // first rank row; first of the client's rows in x (or in the index); first element of its S
};

// The walk over the clients.
struct Walk {
    // x has `rows` rows.
    Walk(const Segments& given, int64_t rows) {
        const Span &ranks = given.ranks, &starts = given.starts, &lengths = given.lengths;
        STD_TORCH_CHECK(starts.size == lengths.size && lengths.size <= ranks.size, "starts, lengths: expected at most ", ranks.size, " integers each, got ",
                        starts.size, " and ", lengths.size);
        const int64_t limit = given.index ? given.index->numel() : rows;
        for (size_t k = 0; k < ranks.size; ++k) {
            const int64_t rank = ranks[k], length = k < lengths.size ? lengths[k] : 0;
            STD_TORCH_CHECK(rank >= 0 && rank < INT32_MAX && length >= 0, "ranks, lengths: expected integers >= 0, got ", rank, " and ", length);
            if (length > 0) {
                const int64_t start = starts[k];
                STD_TORCH_CHECK(start >= 0 && start <= limit - length, "starts: expected segments within ", limit, " rows, got ", start, " + ", length);
                last = std::max(last, start + length);
                if (rank > 0) {
                    segments.push_back({static_cast<int64_t>(k), rank_rows, rank, start, length, flat});
                    active_rows += length;
                    active_ranks += rank;
                }
                flat += rank * length;
            }
            rank_rows += rank;
        }
    }

    std::vector<Segment> segments;
    int64_t flat = 0;                           // elements of S
    int64_t last = 0;                           // rows of x, or entries of the index, that some client reaches to
    int64_t rank_rows = 0;                      // S, of all clients
    int64_t active_rows = 0, active_ranks = 0;  // of `segments`
};

// What dropout does to an element: its draw below `threshold` of 2^16 makes it zero, else it is multiplied by `inverse`.
struct Dropout {
    uint32_t threshold = 0;
    double inverse = 1;
};

inline Dropout dropout_of(const Segments& given) {
    if (!given.seeds) return {};
    STD_TORCH_CHECK(given.row_keys.has_value(), "row_keys: expected a tensor beside seeds");
    STD_TORCH_CHECK(given.dropout >= 0 && given.dropout < 1, "dropout: expected a probability in [0, 1), got ", given.dropout);
    const auto threshold = static_cast<uint32_t>(std::nearbyint(65536 * given.dropout));  // ties to even, as Python rounds
    return {threshold, 1 / (1 - threshold / 65536.0)};
}

}  // namespace hetlora
