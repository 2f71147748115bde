// Twin of csrc/cuda/products.h, found before it: the host's products, counted as launches.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

extern "C" int emulator_launches(int more);

#define HETLORA_ADDMM_OUT(...) (emulator_launches(1), aoti_torch_cpu_addmm_out(__VA_ARGS__))
#define HETLORA_MM_OUT(...) (emulator_launches(1), aoti_torch_cpu_mm_out(__VA_ARGS__))
