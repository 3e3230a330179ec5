// A device of its own for PyTorch, made of the host's memory and the CPU's kernels: see __init__.py.
//
// Every operator that has no kernel of its own at the end of this file goes through `by_cpu`: it
// looks for what CUDA would refuse, and lets the CPU's kernel work on the same memory.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr auto kKind = c10::DeviceType::PrivateUse1;
constexpr int kMostDevices = 8;
int num_devices = 1;
thread_local c10::DeviceIndex current = 0;  // of a thread, as CUDA's is

// -- what is counted

struct Count {
  std::atomic<int64_t> now{0}, peak{0};
  void add(int64_t bytes) {
    const int64_t sum = now += bytes;
    for (int64_t old = peak; old < sum && !peak.compare_exchange_weak(old, sum);) {
    }
  }
};
std::array<Count, kMostDevices> on_device;
Count pinned;

// Called with the reason whenever a GPU's host would have to wait for it; set from Python.
PyObject* when_host_waits = nullptr;

void host_waits(const std::string& why) {
  if (when_host_waits == nullptr) return;
  const py::gil_scoped_acquire gil;
  const py::handle call(when_host_waits);
  call(py::str(why));
}

// -- memory

struct Block {
  void* data;
  int64_t size;
  Count* count;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  block->count->add(-block->size);
  c10::free_cpu(block->data);
  delete block;
}

c10::DataPtr take(int64_t size, Count& count, c10::Device device) {
  auto* block = new Block{size ? c10::alloc_cpu(size) : nullptr, size, &count};
  count.add(size);
  return {block->data, block, &release, device};
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const size_t rounded = (n + 511) / 512 * 512;  // as CUDACachingAllocator counts
    return take(static_cast<int64_t>(rounded), on_device[current], {kKind, current});
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} device_memory;

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned_blocks;

void release_pinned(void* context) {
  {
    const std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned_blocks.erase(static_cast<const char*>(static_cast<Block*>(context)->data));
  }
  release(context);
}

bool is_pinned(const void* data) {
  const auto* at = static_cast<const char*>(data);
  const std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned_blocks.upper_bound(at);
  return after != pinned_blocks.begin() && at < (--after)->first + after->second;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    size_t rounded = n ? 1 : 0;  // to a power of two, as CachingHostAllocator does
    while (rounded < n) rounded *= 2;
    auto plain = take(static_cast<int64_t>(rounded), pinned, {c10::DeviceType::CPU});
    if (n) {
      const std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned_blocks[static_cast<const char*>(plain.get())] = rounded;
    }
    return {plain.get(), plain.release_context(), n ? &release_pinned : &release, plain.device()};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} pinned_memory;

// -- random numbers: a device's own, by a generator of the CPU's kind inside

struct Generator final : c10::GeneratorImpl {
  Generator(c10::DeviceIndex index, at::Generator of_cpu)
      : GeneratorImpl({kKind, index}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(std::move(of_cpu)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.device().is_cpu(), "RNG state must be a torch.ByteTensor of the CPU");
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device().index(), inner.clone()); }
  at::Generator inner;
};

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<Generator>(index < 0 ? current : index, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int i = 0; i < kMostDevices; ++i) made->push_back(new_generator(i));
    return made;
  }();
  return all->at(index < 0 ? current : index);
}

at::Generator of_cpu(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kKind, "Expected a 'pretend' device type for generator but found '",
              generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// -- what torch asks of a device

using Clock = std::chrono::steady_clock;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kKind; }
  c10::Device getDevice() const override { return {kKind, current}; }
  void setDevice(c10::Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.index() >= 0) current = d.index();
  }
  c10::Device exchangeDevice(c10::Device d) const override {
    const auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d.index() < 0 ? getDevice() : d);
  }
  c10::Stream getNewStream(c10::Device d, int) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return num_devices; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    const auto passed = *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_waits("synchronize"); }
  void synchronizeEvent(void*) const override { host_waits("synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { host_waits("synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return num_devices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex d) const override { current = d; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex d) const override { return std::exchange(current, d); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex d) const override { return exchangeDevice(d); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Device getDeviceFromPtr(void*) const override { return {kKind, current}; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return default_generator(i); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override { return new_generator(i); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto fresh = device_memory.allocate(size);
    if (size && storage.nbytes()) std::memcpy(fresh.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.set_nbytes(size);
  }
};

// -- operators

bool is_here(const at::Tensor& t) { return t.defined() && t.device().type() == kKind; }

// The same memory as a tensor of the CPU's.
at::Tensor seen_by_cpu(const at::Tensor& t) {
  if (!is_here(t)) return t;
  const auto at = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  TORCH_CHECK(at % t.element_size() == 0, "misaligned address: ", t.scalar_type(), " at ", at % 512, " (mod 512)");
  const auto options = at::TensorOptions().dtype(t.scalar_type()).device(at::kCPU);
  auto seen = at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), options);
  if (t.is_conj()) seen._set_conj(true);
  if (t.is_neg()) seen._set_neg(true);
  return seen;
}

// A result of the CPU's kernel, in memory that the device counts.
at::Tensor seen_by_device(const at::Tensor& t, c10::Device device) {
  if (!t.defined() || is_here(t)) return t;
  auto here = at::empty_strided(t.sizes(), t.strides(), t.options().device(device).pinned_memory(false));
  if (t.numel()) seen_by_cpu(here).copy_(t);
  return here;
}

// Applies a function to every tensor in an operator's argument or result, lists included.
template <typename F>
void replace_tensors(c10::IValue& value, F&& replaced) {
  if (value.isTensor()) {
    value = replaced(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(replaced(t));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional<at::Tensor>(replaced(*t)) : std::nullopt);
    value = list;
  }
}

bool any_of(const std::string& name, const std::set<std::string>& names) { return names.count(name) > 0; }

// Operators whose result's shape or status the host reads on CUDA before it goes on.
bool waits_on_cuda(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
      "aten::equal", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::repeat_interleave", "aten::bincount"};
  return any_of(name, names);
}

// Rules of single operators on CUDA (aten/src/ATen/native/cuda/Blas.cpp).
void check_rules(const std::string& name, const std::vector<at::Tensor>& in) {
  if (name != "aten::_int_mm") return;
  TORCH_CHECK(in[0].size(0) > 16, "self.size(0) needs to be greater than 16, but got ", in[0].size(0));
  TORCH_CHECK(in[0].size(1) > 0 && in[0].size(1) % 8 == 0, "self.size(1) needs to be a multiple of 8, but got ", in[0].size(1));
  TORCH_CHECK(in[1].size(1) > 0 && in[1].size(1) % 8 == 0, "mat2.size(1) needs to be a multiple of 8, but got ", in[1].size(1));
}

// Whether CUDA takes a tensor of the CPU beside the device's: a number, or indices.
bool may_mix(const std::string& name, const at::Tensor& t, const c10::Argument& argument, bool in_optional_list) {
  static const std::set<std::string> by_indices = {"aten::index", "aten::index_put", "aten::index_put_",
                                                   "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"};
  if (!t.device().is_cpu()) return false;
  if (in_optional_list && any_of(name, by_indices)) return true;
  const bool is_written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  return t.dim() == 0 && !is_written;
}

bool takes_generator(const c10::Argument& argument) {
  const auto type = argument.type()->cast<c10::OptionalType>();
  return type && type->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();

  // What CUDA would refuse.
  std::optional<c10::Device> device;
  std::vector<at::Tensor> inputs;
  bool has_mask = false, has_index_of_cpu = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isDevice() && value.toDevice().type() == kKind) device = value.toDevice();
    replace_tensors(value, [&](const at::Tensor& t) {
      if (t.defined()) inputs.push_back(t);
      if (is_here(t) && !device) device = t.device();
      return t;
    });
  }
  if (!device || !device->has_index()) device = c10::Device(kKind, current);
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    const bool in_list = value.isOptionalTensorList();
    replace_tensors(value, [&](const at::Tensor& t) {
      if (!t.defined()) return t;
      has_mask |= in_list && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
      has_index_of_cpu |= in_list && t.device().is_cpu();
      TORCH_CHECK(t.device() == *device || may_mix(name, t, arguments[i], in_list),
                  "Expected all tensors to be on the same device, but found at least two devices, ", *device,
                  " and ", t.device(), "! (", name, ", shape ", t.sizes(), ")");
      return t;
    });
  }
  check_rules(name, inputs);
  if (waits_on_cuda(name) || has_mask) host_waits(name);
  if (has_index_of_cpu) host_waits("copy from the host");

  // To the CPU's kernel.
  const torch::jit::Stack given(stack->begin() + first, stack->end());
  std::vector<std::pair<at::Tensor, at::Tensor>> outs;  // ours, and what the CPU writes to
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isDevice()) value = c10::Device(at::kCPU);
    else if (value.isGenerator()) value = of_cpu(value.toGenerator());
    else if (value.isNone() && takes_generator(arguments[i])) value = of_cpu(default_generator(device->index()));
    replace_tensors(value, [&](const at::Tensor& t) {
      const bool is_empty_out = arguments[i].is_out() && is_here(t) && t.numel() == 0;
      auto seen = is_empty_out ? at::empty({0}, t.options().device(at::kCPU)) : seen_by_cpu(t);
      if (arguments[i].is_out() && is_here(t)) outs.emplace_back(t, seen);
      return seen;
    });
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  // And back.
  for (auto& [ours, written] : outs) {
    if (written.sizes() != ours.sizes()) ours.resize_(written.sizes());
    if (ours.numel() && written.const_data_ptr() != ours.const_data_ptr()) seen_by_cpu(ours).copy_(written);
  }
  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); ++i) {
    auto& value = (*stack)[stack->size() - returns.size() + i];
    const auto* alias = returns[i].alias_info();
    if (alias == nullptr) {
      replace_tensors(value, [&](const at::Tensor& t) { return seen_by_device(t, *device); });
      continue;
    }
    TORCH_CHECK(alias->isWrite(), name, " returns a view: it needs a kernel of its own here");
    for (size_t j = 0; j < arguments.size(); ++j) {  // it returns what it has written to
      const auto* of = arguments[j].alias_info();
      if (of != nullptr && of->isWrite() && of->beforeSets() == alias->beforeSets()) value = given[j];
    }
  }
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device> device, std::optional<bool> pin, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.numel() == 0) return to;
  // Blocking copies wait for the stream either way (Copy.cu), and so may those of pageable memory
  // (cudaMemcpyAsync, "API synchronization behavior").
  const auto& on_host = is_here(to) ? from : to;
  if (!is_here(on_host) && !(non_blocking && is_pinned(on_host.const_data_ptr())))
    host_waits(is_here(to) ? "copy from the host" : "copy to the host");
  seen_by_cpu(to).copy_(seen_by_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& t) {
  host_waits("item");
  return seen_by_cpu(t).item();
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}
at::Tensor& set_source(at::Tensor& self, c10::Storage source) { return at::native::set_(self, std::move(source)); }

void record_stream(at::Tensor&, c10::Stream) {}  // kernels run in order

int64_t attention_by_products(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                              double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_source);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("record_stream", record_stream);
  m.impl("_fused_sdp_choice", attention_by_products);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  c10::SetAllocator(kKind, &device_memory);
  m.def("set_count", [](int count) {
    TORCH_CHECK(count <= kMostDevices, "at most ", kMostDevices, " devices, not ", count);
    num_devices = count;
  });
  m.def("count", [] { return num_devices; });
  m.def("set_device", [](int index) { current = static_cast<c10::DeviceIndex>(index); });
  m.def("current_device", [] { return static_cast<int>(current); });
  m.def("default_generator", &default_generator);
  m.def("in_use", [](int index) { return on_device.at(index).now.load(); });
  m.def("peak", [](int index) { return on_device.at(index).peak.load(); });
  m.def("reset_peak", [](int index) { on_device.at(index).peak = on_device.at(index).now.load(); });
  m.def("pinned_peak", [] { return pinned.peak.load(); });
  m.def("reset_pinned_peak", [] { pinned.peak = pinned.now.load(); });
  m.def("when_host_waits", [](py::function call) { when_host_waits = call.release().ptr(); });
  m.def("on_host", &seen_by_cpu);
}
