// Random generators of the device: a generator of the CPU behind the device type CUDA.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <c10/core/GeneratorImpl.h>

#include <vector>

#include "memory.h"

namespace simulated {

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner;

  DeviceGenerator(uint64_t seed, c10::Device device)
      : c10::GeneratorImpl(device, c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        inner(at::detail::createCPUGenerator(seed)) {}
  static c10::DeviceType device_type() { return c10::DeviceType::CUDA; }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    auto* copied = new DeviceGenerator(0, device());
    copied->inner = inner.clone();
    return copied;
  }
};

inline at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<DeviceGenerator>(c10::default_rng_seed_val, device_at(index));
}

inline const at::Generator& default_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex number = 0; number < device_count(); number++) made.push_back(new_generator(number));
    return made;
  }();
  return generators.at(static_cast<size_t>(index < 0 ? current_index : index));
}

}  // namespace simulated
