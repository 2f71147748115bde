// From a type known at run time to a kernel's template argument, and the grid of one warp per item.
#pragma once
#include "common.cuh"
#include "launch.h"

namespace hetlora {

// body(T{}) with the type named by `type`.
template <class Body>
cudaError_t with_type(Type type, Body body) {
    switch (type) {
        case Type::f32: return body(float{});
        case Type::bf16: return body(__nv_bfloat16{});
        case Type::f16: return body(__half{});
        case Type::f64: return body(double{});
    }
    return cudaErrorInvalidValue;
}

// Grid of a kernel that gives each warp one item; an empty one (nothing to launch) has x = 0.
inline dim3 item_grid(const HetloraCall& call, unsigned z = 1) { return dim3(static_cast<unsigned>((call.items + WARPS - 1) / WARPS), call.modules, z); }

inline bool is_empty(const dim3& grid) { return grid.x == 0 || grid.y == 0 || grid.z == 0; }

}  // namespace hetlora
