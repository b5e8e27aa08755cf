// SPDX-License-Identifier: MIT
// From an op to a kernel: outputs, device guard, current stream, and a status that becomes a Python
// exception naming the op and its sizes.
#pragma once
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "checks.h"
#ifdef QG_WITH_CUDA
#include <dlfcn.h>

#include "../cuda/launch.h"
#endif

namespace quantgemm {

#ifdef QG_WITH_CUDA
// torch's current stream. The symbol lives in libtorch_cuda, which a CPU torch does not have: it is
// looked up in the running process instead of being linked.
inline cudaStream_t current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = reinterpret_cast<GetStream>(
      dlsym(dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY), "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(device, &stream) != 0)
    raise(PyExc_RuntimeError, "quantgemm: this torch has no CUDA stream to launch on");
  return static_cast<cudaStream_t>(stream);
}

template <class Launch, class Args>
void run_on_gpu(const char* op, const Tensor& on, Launch launch, const Args& args) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device());
  const cudaError_t status = launch(args, current_stream(on.get_device()));
  if (status != cudaSuccess) {
    raise(PyExc_RuntimeError,
          concat("quantgemm::", op, " on a tensor of shape ", shape_of(on), ", cuda:", on.get_device(), ": ",
                 cudaGetErrorName(status), ": ", cudaGetErrorString(status)));
  }
}
#define QG_RUN_ON_GPU(op, on, args) run_on_gpu(#op, on, launch_##op, args)
#else
#define QG_RUN_ON_GPU(op, on, args)                                               \
  check_implemented(false, "quantgemm::" #op                                      \
                           ": this build has no CUDA kernels (no nvcc was found " \
                           "when it was built); reinstall where the CUDA toolkit is installed")
#endif

// 10 · compute capability of the device that t is on; 0 = the CPU.
inline int architecture_of([[maybe_unused]] const Tensor& t) {
#ifdef QG_WITH_CUDA
  int major = 0, minor = 0;
  if (t.is_cuda() &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device()) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device()) == cudaSuccess)
    return 10 * major + minor;
#endif
  return t.is_cuda() ? 10 : 0;
}

inline PyObject* out_of_memory_error() {
  pybind11::gil_scoped_acquire lock;
  return pybind11::object(pybind11::module_::import("torch").attr("OutOfMemoryError")).release().ptr();
}

// Fresh memory arrives page by page, and asking for 2 MiB at a time instead of 4 KiB is several times
// faster than the decoding that fills it.
inline void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice only
#endif
}

// An uninitialised contiguous tensor on the device of `like`. The allocation goes through the C shim,
// whose status tells a failure; running out of GPU memory stays torch's own exception type, with the
// sizes that matter.
inline Tensor new_output(const char* op, const Tensor& like, const std::vector<int64_t>& sizes,
                         ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = std::max<int64_t>(count, 1);
  AtenTensorHandle handle = nullptr;
  const auto status = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), like.get_device(),
      &handle);
  if (status == 0) {
    Tensor out(handle);
    if (out.is_cpu())
      use_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
    return out;
  }

  std::string message = concat("quantgemm::", op, ": cannot allocate an output of ", count, " ",
                               dtype_name(dtype), " elements");
#ifdef QG_WITH_CUDA
  size_t free_bytes = 0, total_bytes = 0;
  if (like.is_cuda() && cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess) {
    const auto mebibytes = [](size_t bytes) { return static_cast<int64_t>(bytes >> 20); };
    raise(out_of_memory_error(),
          concat(message, ": CUDA out of memory on cuda:", like.get_device(), ", ", mebibytes(free_bytes),
                 " of ", mebibytes(total_bytes), " MiB free outside torch's pool"));
  }
#endif
  raise(PyExc_MemoryError, message);
}

}  // namespace quantgemm
