// The framework's own matrix products on the device, past the dispatcher. tests/gpu/emulator has the same for the host.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#define HETLORA_ADDMM_OUT aoti_torch_cuda_addmm_out
#define HETLORA_MM_OUT aoti_torch_cuda_mm_out
