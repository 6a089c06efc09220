// The devices of this process, and their memory: pages of the host behind the device type CUDA.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdlib>
#include <map>
#include <mutex>

namespace simulated {

inline c10::DeviceIndex device_count() {
  static const char* wanted = std::getenv("SIMULATED_DEVICES");
  static const int count = wanted ? std::atoi(wanted) : 1;
  return static_cast<c10::DeviceIndex>(count);
}

inline thread_local c10::DeviceIndex current_index = 0;  // as CUDA has it: each thread has a device of its own
inline c10::Device device_at(c10::DeviceIndex index) {
  return c10::Device(c10::DeviceType::CUDA, index < 0 ? current_index : index);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &c10::free_cpu, device_at(current_index)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

inline std::mutex pinned_lock;
inline std::map<const char*, size_t> pinned;  // where each pinned range begins, and its bytes

inline bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_lock);
  auto range = pinned.upper_bound(static_cast<const char*>(data));
  if (range == pinned.begin()) return false;
  --range;
  return static_cast<const char*>(data) < range->first + range->second;
}

struct PinnedAllocator final : c10::Allocator {
  static void free(void* memory) {
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned.erase(static_cast<const char*>(memory));
    c10::free_cpu(memory);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = bytes ? bytes : 1;
    void* memory = c10::alloc_cpu(size);
    std::lock_guard<std::mutex> lock(pinned_lock);
    pinned[static_cast<const char*>(memory)] = size;
    return {memory, memory, &free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

inline DeviceAllocator device_allocator;
inline PinnedAllocator pinned_allocator;

}  // namespace simulated
