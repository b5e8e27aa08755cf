// SPDX-License-Identifier: MIT
// The one door: every op checks its arguments here and nowhere else. A message names the argument,
// what was expected and what came. Python sees ValueError, TypeError or NotImplementedError.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../args.h"
#include "../formats/gguf_formats.h"
#include "torch_abi.h"

namespace quantgemm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(const std::string& part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }

template <class... Parts>
std::string concat(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

// A Python exception of a chosen type. Ops run without the interpreter lock, so nothing of Python is
// touched here: pybind11 calls set_error() once it holds the lock again. (Its error_already_set could
// carry the same, but its layout differs between the pybind11 versions of torch and of this module.)
class PythonError : public pybind11::builtin_exception {
 public:
  PythonError(PyObject* type, const std::string& message) : builtin_exception(message.c_str()), type_(type) {}
  void set_error() const override { PyErr_SetString(type_, what()); }

 private:
  PyObject* type_;
};

[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  throw PythonError(type, message);
}

template <class... Parts>
void check_value(bool ok, const Parts&... message) {
  if (!ok) raise(PyExc_ValueError, concat(message...));
}
template <class... Parts>
void check_type(bool ok, const Parts&... message) {
  if (!ok) raise(PyExc_TypeError, concat(message...));
}
template <class... Parts>
void check_implemented(bool ok, const Parts&... message) {
  if (!ok) raise(PyExc_NotImplementedError, concat(message...));
}

template <class... Parts>
void check_index(bool ok, const Parts&... message) {
  if (!ok) raise(PyExc_IndexError, concat(message...));
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// As Python spells it.
inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Bool: return "torch.bool";
    default: return concat("torch dtype ", torch::headeronly::toString(type));
  }
}

inline std::optional<Real> real_of(ScalarType type) {
  if (type == ScalarType::Float) return Real::kFloat32;
  if (type == ScalarType::Half) return Real::kFloat16;
  if (type == ScalarType::BFloat16) return Real::kBFloat16;
  return std::nullopt;
}

inline Real check_real(const char* name, ScalarType type) {
  const auto real = real_of(type);
  check_type(real.has_value(), name, ": expected torch.float32, torch.float16 or torch.bfloat16, got ",
             dtype_name(type));
  return *real;
}

inline void check_device(const char* name, const Tensor& t) {
  check_implemented(t.is_cpu() || t.is_cuda(), name, ": expected a CPU or CUDA tensor");
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device()) : "cpu";
}

// Rows of a format: what a type id means for sizes.
struct RowFormat {
  std::string name;
  int64_t elems, bytes;
  bool plain;
};

template <class... Lists, class Fn>
bool visit_formats(int64_t qtype, Fn&& f) {
  return PlainFormats::visit(qtype, f) || BlockFormats::visit(qtype, f);
}

inline RowFormat check_qtype(int64_t qtype) {
  RowFormat row;
  const bool found =
      visit_formats(qtype, [&](auto f) { row = {f.kName, f.kElems, f.kBytes, PlainFormat<decltype(f)>}; });
  if (!found) {
    std::string known;
    const auto list = [&](auto f) { known += concat(known.empty() ? "" : ", ", f.kName, " = ", f.kType); };
    PlainFormats::for_each(list);
    BlockFormats::for_each(list);
    check_value(false, "qtype: ", qtype, " is not a GGUF type (or no longer one); known types: ", known);
  }
  return row;
}

// The last dimension of sizes replaced.
inline std::vector<int64_t> with_last_dim(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) sizes.push_back(t.size(i));
  sizes.push_back(last);
  return sizes;
}

// Kernels take rows back to back from a 16-byte boundary; anything else is copied once.
inline Tensor packed(const Tensor& t) {
  Tensor rows = torch::stable::contiguous(t);
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  return aligned ? rows : torch::stable::clone(rows);
}

}  // namespace quantgemm
