// The framework's products, past the dispatcher: a call of 16 rows of 64 columns takes 0.87 to 0.91 of the time that it takes with F.linear and mm called from
// Python.
//
// 16-bit types are multiplied fast where the processor has instructions for them (bfloat16: AVX-512; float16: AVX512-FP16), which oneDNN uses. Elsewhere the
// framework has plain loops: 1 to 9 GFLOP/s with AVX2, where its float32 product has 60. There both operands are converted to float32. The weight is converted
// a part at a time, and the part stays in L2 until the product has read it. The sum is rounded once. Bytes beside the framework's: x and y once more as
// float32, and the part of W from L2.
#include "base_product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace hetlora {
namespace {

// Elements of the weight that are converted at a time: 1 MiB of float32. Of x or y: 16 MiB.
constexpr int64_t kWeightPart = int64_t{1} << 18, kRowsPart = int64_t{1} << 22, kFewestRows = 64;

// A matrix over the memory of `tensor`, past the dispatcher.
Tensor view(const Tensor& tensor, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) {
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes.data(), strides.data(), 0, &handle));
    return Tensor(handle);
}

Tensor as_matrix(const Tensor& dense, int64_t rows, int64_t width) { return dense.dim() == 2 ? dense : view(dense, {rows, width}, {width, 1}); }

Tensor transposed(const Tensor& matrix) { return view(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)}); }

// out = left right (+ added, a matrix or a row of one)
void product(const Tensor& out, const Tensor& left, const Tensor& right, const MaybeTensor& added) {
    const AOTITorchError error = added ? aoti_torch_cpu_addmm_out(out.get(), added->get(), left.get(), right.get(), 1.0, 1.0)
                                       : aoti_torch_cpu_mm_out(out.get(), left.get(), right.get());
    STD_TORCH_CHECK(error == 0, "hetlora: the base product failed");
}

// A part of a dense 16-bit matrix, seen as [rows, width] of another one whose rows are `ld` apart.
struct Part {
    Type type;
    char* data;
    int64_t rows, width, ld;
    char* row(int64_t i) const { return data + i * ld * size_of(type); }
};

Part part_of(const Matrix& whole, int64_t row, int64_t rows, int64_t column, int64_t width) {
    return {whole.type, whole.at(row * whole.width + column), rows, width, whole.width};
}

template <class Body>
void for_rows(const Part& part, const Body& body) {
    for_tasks(part_count(part.rows, part.rows * part.width * 4), part.rows, [&](int64_t, int64_t row) { body(row); });
}

Tensor widened(const Part& part) {
    const Tensor out = empty({part.rows, part.width}, ScalarType::Float);
    auto* to = static_cast<float*>(const_cast<void*>(out.const_data_ptr()));
    for_rows(part, [&](int64_t row) { load_block(part.type, part.row(row), to + row * part.width, part.width); });
    return out;
}

MaybeTensor widened_bias(const MaybeTensor& bias, int64_t first, int64_t count) {
    MaybeTensor out;
    if (bias) {
        out = widened(part_of(Matrix::flat("bias", *bias), 0, 1, first, count));
    }
    return out;
}

void narrowed(const Part& part, const Tensor& from) {
    const auto* sums = static_cast<const float*>(from.const_data_ptr());
    for_rows(part, [&](int64_t row) { store_block(part.type, part.row(row), sums + row * part.width, part.width); });
}

// width: of the widest matrix that is held as float32 for them.
int64_t rows_at_a_time(int64_t width) { return std::max(kFewestRows, kRowsPart / width); }

// out [rows, R] = left [rows, C] memory [R, C]^T (+ bias [R])
void widened_product_of_rows(const Matrix& out, const Matrix& left, const Matrix& memory, const MaybeTensor& bias) {
    const int64_t columns = memory.width, height = std::min(std::max<int64_t>(1, kWeightPart / columns), memory.rows);
    const int64_t step = rows_at_a_time(std::max(columns, height));
    for (int64_t row = 0; row < left.rows; row += step) {
        const int64_t rows = std::min(step, left.rows - row);
        const Tensor own = widened(part_of(left, row, rows, 0, columns));
        for (int64_t first = 0; first < memory.rows; first += height) {
            const int64_t count = std::min(height, memory.rows - first);
            const Tensor sums = empty({rows, count}, ScalarType::Float);
            product(sums, own, transposed(widened(part_of(memory, first, count, 0, columns))), widened_bias(bias, first, count));
            narrowed(part_of(out, row, rows, first, count), sums);
        }
    }
}

// out [rows, C] = left [rows, R] memory [R, C] (+ bias [C])
void widened_product_of_columns(const Matrix& out, const Matrix& left, const Matrix& memory, const MaybeTensor& bias) {
    const int64_t columns = memory.width, height = std::min(std::max<int64_t>(1, kWeightPart / columns), memory.rows);
    const int64_t step = rows_at_a_time(std::max(columns, height));
    const MaybeTensor shift = widened_bias(bias, 0, columns);
    for (int64_t row = 0; row < left.rows; row += step) {
        const int64_t rows = std::min(step, left.rows - row);
        const Tensor sums = empty({rows, columns}, ScalarType::Float);
        for (int64_t first = 0; first < memory.rows; first += height) {
            const int64_t count = std::min(height, memory.rows - first);
            product(sums, widened(part_of(left, row, rows, first, count)), widened(part_of(memory, first, count, 0, columns)),
                    first > 0 ? MaybeTensor(sums) : shift);
        }
        narrowed(part_of(out, row, rows, 0, columns), sums);
    }
}

// out = left weight^T (by_rows) or left weight. The weight is read as it lies: of its transpose in memory the other product is made.
void widened_product(const Tensor& out, const Tensor& left, const Tensor& weight, const MaybeTensor& bias, bool by_rows) {
    const bool lies_transposed = is_transposed(weight);
    const Matrix to = Matrix::flat("out", out), from = Matrix::flat("left", left), memory("weight", weight, lies_transposed);
    by_rows != lies_transposed ? widened_product_of_rows(to, from, memory, bias) : widened_product_of_columns(to, from, memory, bias);
}

// Without the op, as in a torch without oneDNN: yes, as `_torch.multiplies_fast` has it.
bool says_so(const char* op) {
    std::array<StableIValue, 1> stack{};
    return torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != 0 || torch::stable::detail::to<bool>(stack[0]);
}

}  // namespace

bool multiplies_fast(Type type) {
    static const bool bf16 = says_so("mkldnn::_is_mkldnn_bf16_supported"), f16 = says_so("mkldnn::_is_mkldnn_fp16_supported");
    return type == Type::bf16 ? bf16 : type == Type::f16 ? f16 : true;
}

void base_forward(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t rows, bool widened) {
    if (widened && y.numel() > 0 && x.numel() > 0) {
        widened_product(y, x, weight, bias, true);
    } else {
        product(as_matrix(y, rows, weight.size(0)), as_matrix(x, rows, weight.size(1)), transposed(weight), bias);
    }
}

void base_backward(const Tensor& d_x, const Tensor& d_y, const Tensor& weight, int64_t rows, bool widened) {
    if (widened && d_x.numel() > 0 && d_y.numel() > 0) {
        widened_product(d_x, d_y, weight, std::nullopt, false);
    } else {
        product(as_matrix(d_x, rows, weight.size(1)), as_matrix(d_y, rows, weight.size(0)), weight, std::nullopt);
    }
}

}  // namespace hetlora
