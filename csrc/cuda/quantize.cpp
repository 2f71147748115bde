// quantize_rows_ and dequantize_rows_: checks and tables; the kernels are in quantize.cu.
#include "calls.h"

namespace {

// The codes and scales of a module beside its rows of floats; whether every row of all three starts where one access of `type` may.
int check_codes(const Tensor& rows, const Tensor& codes, const Tensor& scales, int64_t bits, Type type) {
    const int64_t width = rows.size(1), stored = bits == 8 ? width : (width + 1) / 2;
    STD_TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.scalar_type() == (bits == 8 ? ScalarType::Char : ScalarType::Byte) &&
                        codes.size(0) == rows.size(0) && codes.size(1) == stored,
                    "codes: expected contiguous [rows, bytes] of int8 for 8 bits, uint8 for 4");
    STD_TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == ScalarType::Float && scales.numel() == rows.size(0), "scales: expected float32 [rows]");
    return aligned(type, width, rows, codes);
}

void quantize_rows_(const Tensors& codes, const Tensors& scales, const Tensors& rows_in, int64_t bits) {
    STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
    const Tensors rows = contiguous(rows_in);
    clients_of({}, rows.size());
    check_count(codes.size(), rows.size(), "codes");
    check_count(scales.size(), rows.size(), "scales");
    check_rows(rows, rows[0], "rows");
    const Type type = type_of(rows[0]);
    Launch launch(rows[0], 0, "quantize_rows_");
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t count = rows[m].size(0), width = rows[m].size(1);
        const int is_aligned = check_codes(rows[m], codes[m], scales[m], bits, type);
        launch.module({{rows[m].const_data_ptr(), codes[m].mutable_data_ptr(), scales[m].mutable_data_ptr(), nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(count),
                       0,
                       is_aligned},
                      count);
    }
    check(hetlora_quantize(launch.start(), type, static_cast<int>(bits)), "quantize_rows_");
}

void dequantize_rows_(const Tensors& out, const Tensors& codes_in, const Tensors& scales_in, int64_t bits) {
    STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
    const Tensors codes = contiguous(codes_in), scales = contiguous(scales_in);
    clients_of({}, out.size());
    check_count(codes.size(), out.size(), "codes");
    check_count(scales.size(), out.size(), "scales");
    check_rows(out, out[0], "out");
    const Type type = type_of(out[0]);
    Launch launch(out[0], 0, "dequantize_rows_");
    for (size_t m = 0; m < out.size(); ++m) {
        const int64_t count = out[m].size(0), width = out[m].size(1);
        const int is_aligned = check_codes(out[m], codes[m], scales[m], bits, type);
        launch.module({{out[m].mutable_data_ptr(), codes[m].const_data_ptr(), scales[m].const_data_ptr(), nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(count),
                       0,
                       is_aligned},
                      items_of(count, width, type));
    }
    check(hetlora_dequantize(launch.start(), type, static_cast<int>(bits)), "dequantize_rows_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("quantize_rows_", TORCH_BOX(&quantize_rows_));
    m.impl("dequantize_rows_", TORCH_BOX(&dequantize_rows_));
}
