// cross_entropy_: checks; the kernel is in cross_entropy.cu.
#include "calls.h"

namespace {

Tensor cross_entropy_(const Tensor& logits, const Tensor& labels, const MaybeTensor& weights, double scale, double softcap, double smoothing, double z_loss,
                      bool slopes) {
    check_rows({logits}, logits, "logits");
    const Type type = type_of(logits);
    const int64_t rows = logits.size(0), words = logits.size(1);
    STD_TORCH_CHECK(labels.is_contiguous() && labels.scalar_type() == ScalarType::Long && labels.numel() == rows && labels.device() == logits.device(),
                    "labels: expected int64 [", rows, "] beside the logits");
    STD_TORCH_CHECK(
        !weights || (weights->is_contiguous() && weights->scalar_type() == scalar_of(type) && weights->numel() == rows && weights->device() == logits.device()),
        "weights: expected [", rows, "] in the type of the losses, beside the logits");
    const OnDevice device(logits);
    Tensor losses = torch::stable::new_empty(logits, {rows}, scalar_of(type));
    const hetlora::LossCall call{const_cast<void*>(logits.const_data_ptr()),
                                 static_cast<const int64_t*>(labels.const_data_ptr()),
                                 weights ? weights->const_data_ptr() : nullptr,
                                 losses.mutable_data_ptr(),
                                 static_cast<int>(words),
                                 slopes,
                                 aligned(type, words, logits),
                                 {scale, softcap, smoothing, z_loss}};
    check(hetlora_cross_entropy(&call, type, rows, device.stream), "cross_entropy_");
    return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) { m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_)); }
