// A simulated CUDA device for a torch that was built without CUDA: the dispatch key CUDA, with memory of the host behind
// it. Every operator that CUDA has runs the CPU's kernel on the same memory, after checks that CUDA would make.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <cstring>
#include <fstream>
#include <set>
#include <string>

#include "generators.h"
#include "guard.h"
#include "host_views.h"
#include "memory.h"
#include "reports.h"

namespace simulated {

using c10::IValue;

// ---- which operators CUDA has, written by build.py from torch's own table -----------------------------------------
enum OperatorFlags { HAS_CUDA = 1, NO_DEVICE_CHECK = 2 };

static std::unordered_map<std::string, int> read_operators() {
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator);
  std::unordered_map<std::string, int> flags;
  std::ifstream table(std::getenv("SIMULATED_DEVICE_OPERATORS"));
  std::string name;
  for (int flag; table >> name >> flag;) flags[name] = flag;
  return flags;
}
static const std::unordered_map<std::string, int> operators = read_operators();

static int flags_of(const std::string& name) {
  const auto known = operators.find(name);
  return known == operators.end() ? 0 : known->second;
}

// The host learns a size or a value.
static const std::set<std::string> waiting = {
    "aten::_local_scalar_dense", "aten::nonzero",       "aten::masked_select",      "aten::_unique",
    "aten::_unique2",            "aten::unique_dim",    "aten::unique_consecutive", "aten::equal",
    "aten::is_nonzero",          "aten::bincount",      "aten::repeat_interleave",  "aten::nonzero_numpy",
    "aten::masked_select.out",   "aten::nonzero.out"};
static const std::set<std::string> taking_host_indices = {
    "aten::index",     "aten::index_put_",     "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::index_put", "aten::_unsafe_index_put"};

// ---- the arguments of a call --------------------------------------------------------------------------------------
struct Arguments {
  std::vector<at::Tensor> tensors;
  std::optional<c10::Device> device;  // of the first tensor on a device, else of an argument "device"

  explicit Arguments(c10::ArrayRef<IValue> values) {
    std::optional<c10::Device> asked;
    for (const IValue& value : values) {
      if (value.isDevice() && value.toDevice().is_cuda()) asked = device_at(value.toDevice().index());
      collect(value);
    }
    for (const auto& tensor : tensors) {
      if (!device && tensor.defined() && tensor.device().is_cuda()) device = tensor.device();
    }
    if (!device) device = asked;
  }

 private:
  void collect(const IValue& value) {
    if (value.isTensor()) {
      tensors.push_back(value.toTensor());
    } else if (value.isList()) {
      for (const IValue& element : value.toListRef()) collect(element);
    }
  }
};

static void refuse_several_devices(const std::string& name, const std::string& base, const Arguments& arguments) {
  if (!arguments.device) return;
  bool is_first = true;
  for (const auto& tensor : arguments.tensors) {
    const bool first = std::exchange(is_first, false);
    if (!tensor.defined() || tensor.device() == *arguments.device || tensor.device().is_meta()) continue;
    if (!tensor.device().is_cuda()) {
      if (taking_host_indices.count(base) && !first) {
        // "index" has already copied it to the device before this
        if (base != "aten::index") report_wait(name + " with an index on the CPU", tensor.nbytes());
        continue;
      }
      if (tensor.dim() == 0 && (flags_of(name) & NO_DEVICE_CHECK)) continue;
    }
    report_fault(name + " mixes devices");
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ",
                *arguments.device, " and ", tensor.device(), "! (in ", name, ")");
  }
}

// ---- a call on the host -------------------------------------------------------------------------------------------
static bool holds_tensors(const IValue& value) {  // optional ones, or lists of tensors
  if (!value.isList()) return false;
  const auto kind = value.toList().elementType()->kind();
  return kind == c10::TypeKind::OptionalType || kind == c10::TypeKind::ListType;
}

static IValue on_host(HostViews& views, const IValue& value) {
  if (value.isTensor()) return views.on_host(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& tensor : value.toTensorList()) made.push_back(views.on_host(tensor));
    return made;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::DeviceType::CPU);
  if (holds_tensors(value)) {
    auto made = value.toList().copy();
    for (size_t i = 0; i < made.size(); i++) made.set(i, on_host(views, made.get(i)));
    return made;
  }
  return value;
}

static IValue on_device(HostViews& views, const IValue& value) {
  if (value.isTensor()) return views.on_device(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& tensor : value.toTensorList()) made.push_back(views.on_device(tensor));
    return made;
  }
  if (holds_tensors(value)) {
    auto made = value.toList().copy();
    for (size_t i = 0; i < made.size(); i++) made.set(i, on_device(views, made.get(i)));
    return made;
  }
  return value;
}

static IValue host_generator(const IValue& value, const std::string& name, c10::Device device) {
  const at::Generator generator = value.isNone() ? default_generator(device.index()) : value.toGenerator();
  if (generator.device() != device) {
    report_fault(name + " with a generator of " + generator.device().str());
    TORCH_CHECK(false, "Expected a '", device, "' generator device but found '", generator.device(), "' (in ", name, ")");
  }
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

static bool takes_generator(const c10::Argument& argument) {
  return argument.type()->str().find("Generator") != std::string::npos;
}

static void run_on_host(
    const c10::OperatorHandle& op, const std::string& name, const Arguments& arguments, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t begin = stack->size() - schema.arguments().size();
  const c10::OptionalDeviceGuard guard(arguments.device);
  HostViews views(arguments.device.value_or(device_at(current_index)));
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    IValue& value = (*stack)[begin + i];
    const bool draws = arguments.device && takes_generator(schema.arguments()[i]);
    value = draws ? host_generator(value, name, *arguments.device) : on_host(views, value);
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  views.take_over_sizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) {
    (*stack)[i] = on_device(views, (*stack)[i]);
  }
  views.resize_arguments();
}

static void any_operator(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string base = schema.name();
  const std::string name = schema.overload_name().empty() ? base : base + "." + schema.overload_name();
  const bool copies = base == "aten::_copy_from" || base == "aten::_copy_from_and_resize";
  if (!copies && !(flags_of(name) & HAS_CUDA)) {
    report_fault(name + " has no CUDA kernel");
    TORCH_CHECK_NOT_IMPLEMENTED(false, "Could not run '", name, "' with arguments from the 'CUDA' backend.");
  }
  const Arguments arguments(torch::jit::last(*stack, schema.arguments().size()));
  if (!copies) refuse_several_devices(name, base, arguments);
  if (waiting.count(base)) report_wait(name);
  run_on_host(op, name, arguments, stack);
}

// ---- kernels that are not the CPU's -------------------------------------------------------------------------------
static at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device> device, std::optional<bool>,
                        std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device_at(device ? device->index() : -1));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

static at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                                std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                                std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device_at(device ? device->index() : -1));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

static void report_transfer(const at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  const bool to_device = to.device().is_cuda();
  const bool pinned_memory = is_pinned((to_device ? from : to).storage().data());
  std::string event = to_device ? "host to device" : "device to host";
  event += pinned_memory ? ", pinned" : ", pageable";
  event += non_blocking ? ", non_blocking" : "";
  if (!to_device && non_blocking) report_fault("non_blocking copy to the host, which may read before it has ended");
  if (non_blocking && pinned_memory) {
    report_copy(event, to.nbytes());
  } else {
    report_wait(event, to.nbytes());
  }
}

static at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking) {
  const bool between = from.device().is_cuda() != self.device().is_cuda();
  if (self.numel() > 0 && between) report_transfer(self, from, non_blocking);
  HostViews views(self.device());
  at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor to = views.on_host(self);
  to.copy_(views.on_host(from));
  return self;
}

static at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                               c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset.expect_int());
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !size.empty()) {
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride));
  }
  return self;
}

static at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const c10::SymInt size(static_cast<int64_t>(source.nbytes() / self.itemsize()));
  return set_storage(self, source, 0, c10::SymIntArrayRef(&size, 1), {});
}

static at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_storage_offset(source.storage_offset());
  impl->set_sizes_and_strides(source.sizes(), source.strides());
  return self;
}

static int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // the composite "math" path: the others have no kernels here
}

static void record_stream(at::Tensor&, c10::Stream) {}

}  // namespace simulated

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::any_operator>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", simulated::empty);
  m.impl("empty_strided", simulated::empty_strided);
  m.impl("copy_", simulated::copy_);
  m.impl("set_.source_Storage", simulated::set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", simulated::set_storage);
  m.impl("set_.source_Tensor", simulated::set_tensor);
  m.impl("_fused_sdp_choice", simulated::fused_sdp_choice);
  m.impl("record_stream", simulated::record_stream);
}

// ---- collective operations: those of the CPU, on the same memory ---------------------------------------------------
namespace simulated {

static void collective(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const Arguments arguments(torch::jit::last(*stack, op.schema().arguments().size()));
  refuse_several_devices(op.schema().name(), op.schema().name(), arguments);
  run_on_host(op, op.schema().name(), arguments, stack);
}

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

static void replace_collectives() {
  static torch::Library library(torch::Library::IMPL, "c10d", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  Silent silent;  // torch warns that a kernel is replaced, which is what we want
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "broadcast_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "send", "recv_",
        "recv_any_source_", "barrier"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
  }
}

class ReducerTimer final : public c10d::Timer {  // which data-parallel training asks for by device
 public:
  explicit ReducerTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};

}  // namespace simulated

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, ::simulated::ReducerTimer);
}

// ---- what Python calls (library.py) -------------------------------------------------------------------------------
extern "C" {
void simulated_listen(simulated::Listener listener) { simulated::listener = listener; }
void simulated_set_device(int index) { simulated::current_index = static_cast<c10::DeviceIndex>(index); }
int simulated_current_device() { return simulated::current_index; }
void simulated_replace_collectives() { simulated::replace_collectives(); }

void simulated_seed(int index, unsigned long long seed) {
  at::Generator generator = simulated::default_generator(static_cast<c10::DeviceIndex>(index));
  generator.set_current_seed(seed);
}
long long simulated_state_bytes() { return simulated::default_generator(0).get_state().numel(); }
void simulated_get_state(int index, void* to) {
  const auto state = simulated::default_generator(static_cast<c10::DeviceIndex>(index)).get_state();
  std::memcpy(to, state.const_data_ptr(), state.numel());
}
void simulated_set_state(int index, const void* from, long long bytes) {
  at::Generator generator = simulated::default_generator(static_cast<c10::DeviceIndex>(index));
  auto state = generator.get_state();
  TORCH_CHECK(state.numel() == bytes, "a state of a generator has ", state.numel(), " bytes");
  std::memcpy(state.mutable_data_ptr(), from, static_cast<size_t>(bytes));
  generator.set_state(state);
}
}
