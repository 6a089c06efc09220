// Tensors of the device as tensors of the CPU with the same memory, and back, for the time of one operator.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.h"

namespace simulated {

class HostViews {
 public:
  explicit HostViews(c10::Device device) : device_(device) {}

  at::Tensor on_host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cuda()) return tensor;
    TORCH_CHECK(tensor.layout() == at::kStrided, "the simulated device has strided tensors only");
    const at::Tensor view = like(host_storage(tensor.storage()), c10::DispatchKey::CPU, tensor);
    originals_.emplace(view.unsafeGetTensorImpl(), tensor);
    alive_.push_back(view);
    return view;
  }

  at::Tensor on_device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().is_cuda()) return tensor;
    const auto original = originals_.find(tensor.unsafeGetTensorImpl());
    if (original != originals_.end()) {
      auto* impl = original->second.unsafeGetTensorImpl();
      if (impl->sizes() != tensor.sizes() || impl->strides() != tensor.strides()) {
        impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
        impl->set_storage_offset(tensor.storage_offset());
      }
      return original->second;
    }
    const auto aliased = device_storages_.find(tensor.storage().unsafeGetStorageImpl());
    if (aliased != device_storages_.end()) return like(aliased->second.storage, c10::DispatchKey::CUDA, tensor);
    const c10::Storage& own = tensor.storage();
    c10::Storage made(c10::Storage::use_byte_size_t(), own.nbytes(), holding(own, device_), &device_allocator, true);
    return like(made, c10::DispatchKey::CUDA, tensor);
  }

  // Storages that the operator reallocated, and arguments that it resized without returning them.
  void take_over_sizes() {
    for (auto& [host, device] : device_storages_) {
      if (host->data() == device.began && host->nbytes() == device.storage.nbytes()) continue;
      auto* impl = device.storage.unsafeGetStorageImpl();
      impl->set_data_ptr_noswap(holding(host_storages_.at(impl), device.storage.device()));
      impl->set_nbytes(host->nbytes());
    }
  }
  void resize_arguments() {
    for (auto& [view, original] : originals_) {
      if (view->sizes() == original.sizes()) continue;
      original.unsafeGetTensorImpl()->set_sizes_and_strides(view->sizes(), view->strides());
    }
  }

 private:
  struct DeviceStorage {
    c10::Storage storage;
    const void* began;
  };

  static void release(void* holder) { delete static_cast<c10::Storage*>(holder); }
  static c10::DataPtr holding(const c10::Storage& storage, c10::Device device) {
    return {storage.mutable_data(), new c10::Storage(storage), &release, device};
  }
  static at::Tensor like(const c10::Storage& storage, c10::DispatchKey key, const at::Tensor& tensor) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), tensor.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_storage_offset(tensor.storage_offset());
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
    if (tensor.is_conj()) made._set_conj(true);
    if (tensor.is_neg()) made._set_neg(true);
    return made;
  }
  const c10::Storage& host_storage(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    const auto known = host_storages_.find(key);
    if (known != host_storages_.end()) return known->second;
    c10::Storage made(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      holding(storage, c10::Device(c10::DeviceType::CPU)), c10::GetCPUAllocator(), true);
    device_storages_.emplace(made.unsafeGetStorageImpl(), DeviceStorage{storage, storage.data()});
    return host_storages_.emplace(key, std::move(made)).first->second;
  }

  c10::Device device_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> host_storages_;     // by storages of the device
  std::unordered_map<c10::StorageImpl*, DeviceStorage> device_storages_;  // by storages of the host
  std::unordered_map<c10::TensorImpl*, at::Tensor> originals_;            // by views
  std::vector<at::Tensor> alive_;                                         // the views, which are keys above
};

}  // namespace simulated
