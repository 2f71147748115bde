// The element types of every compiled kernel.
#pragma once
#include <cstdint>

namespace hetlora {

enum class Type : int { f32, bf16, f16, f64 };

constexpr int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// The type that sums are kept in.
constexpr Type sums_of(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

}  // namespace hetlora
