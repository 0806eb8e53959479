#include "modules.h"

#include <cxxabi.h>
#include <elf.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "control.h"
#include "devices.h"
#include "graphs.h"

namespace simulated_gpu {
namespace {

struct Kernels {
  std::unordered_map<const void*, const char*> names;  // of host functions, as the compiler registered them
  std::unordered_map<const void*, std::unique_ptr<Kernel>> by_function;
  std::set<const void*> handles;    // kernels that are their own handle
  cudaError_t error = cudaSuccess;  // of a call to come, once so many others have passed
  int before_error = 0;
  int errors = 0;
};
Kernels& kernels() {
  static auto* instance = new Kernels;
  return *instance;
}

const std::string& text_of(const std::string& path) {
  static auto* texts = new std::unordered_map<std::string, std::string>;
  const auto known = texts->find(path);
  if (known != texts->end()) return known->second;
  std::ifstream file(path);
  if (!file) fail(cudaErrorNotSupported, "the PTX file " + path + " cannot be read");
  std::ostringstream text;
  text << file.rdbuf();
  return (*texts)[path] = text.str();
}

// Behind the kernel's name, or npos.
std::size_t find_entry(const std::string& ptx, const std::string& name) {
  for (std::size_t at = ptx.find(".entry " + name); at != std::string::npos; at = ptx.find(".entry " + name, at + 1)) {
    const std::size_t behind = at + 7 + name.size();
    if (behind < ptx.size() && (std::isspace(static_cast<unsigned char>(ptx[behind])) || ptx[behind] == '('))
      return behind;
  }
  return std::string::npos;
}

std::string path_with(const std::string& name) {
  const char* paths = std::getenv("SIMULATED_GPU_PTX");
  std::istringstream list(paths == nullptr ? "" : paths);
  for (std::string path; std::getline(list, path, ':');)
    if (!path.empty() && find_entry(text_of(path), name) != std::string::npos) return path;
  return {};
}

// Of one declaration, ".param .align 4 .b8 name[4096]" or ".shared .b64 name": its bytes.
std::size_t bytes_of(const std::string& declaration) {
  std::istringstream words(declaration);
  std::size_t bytes = 0;
  for (std::string word; words >> word;) {
    if (word == ".align") {
      words >> word;
      continue;
    }
    const bool is_type = word.size() > 2 && word[0] == '.' && std::strchr("bsuf", word[1]) != nullptr;
    if (is_type && std::isdigit(static_cast<unsigned char>(word[2])))
      bytes = std::strtoul(word.c_str() + 2, nullptr, 10) / 8;
  }
  const std::size_t bracket = declaration.find('[');
  if (bracket != std::string::npos) bytes *= std::strtoul(declaration.c_str() + bracket + 1, nullptr, 10);
  return bytes;
}

std::size_t alignment_of(const std::string& declaration, std::size_t bytes) {
  const std::size_t at = declaration.find(".align");
  const std::size_t pointee = declaration.find(".ptr");  // its .align is that of what it points to
  return at == std::string::npos || pointee != std::string::npos
             ? bytes
             : std::strtoul(declaration.c_str() + at + 6, nullptr, 10);
}

void read_head(Kernel& kernel) {
  const std::string& ptx = text_of(kernel.ptx_path);
  const std::size_t begin = find_entry(ptx, kernel.name);
  if (begin == std::string::npos) fail(cudaErrorInvalidDeviceFunction, kernel.name + " is not in " + kernel.ptx_path);
  const std::size_t body = ptx.find("\n{", begin), end = ptx.find("\n}", body);
  std::istringstream head(ptx.substr(begin, body - begin));
  for (std::string line; std::getline(head, line);) {
    if (line.find(".param") != std::string::npos) {
      const std::size_t bytes = bytes_of(line), alignment = std::max<std::size_t>(alignment_of(line, bytes), 1);
      const std::size_t offset = (kernel.parameter_bytes + alignment - 1) / alignment * alignment;
      kernel.parameters.push_back({offset, bytes});
      kernel.parameter_bytes = offset + bytes;
    }
    for (const char* directive : {".maxntid", ".reqntid"}) {
      const std::size_t at = line.find(directive);
      if (at == std::string::npos) continue;
      std::istringstream sizes(line.substr(at + 8));
      kernel.max_threads = 1;
      for (std::string size; std::getline(sizes, size, ',');)
        kernel.max_threads *= static_cast<unsigned>(std::strtoul(size.c_str(), nullptr, 10));
    }
  }
  for (std::size_t at = ptx.find(".shared ", body); at < end; at = ptx.find(".shared ", at + 1)) {
    const std::size_t line = ptx.rfind('\n', at) + 1;
    if (ptx.find_first_not_of(" \t", line) == at)
      kernel.static_shared_bytes += bytes_of(ptx.substr(at, ptx.find(';', at) - at));
  }
}

// "sgd_kernel<Only<float>, 0, 4096>" for people
std::string readable(const std::string& name) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (demangled == nullptr) return name;
  std::string text = demangled;
  std::free(demangled);
  if (text.rfind("void ", 0) == 0) text.erase(0, 5);
  int depth = 0;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '<') ++depth;
    if (text[at] == '>') --depth;
    if (text[at] == '(' && depth == 0) return text.substr(0, at);
  }
  return text;
}

// Its length is told by what the ELF header points to.
std::size_t length_of(const void* image) {
  const auto* bytes = static_cast<const unsigned char*>(image);
  if (std::memcmp(bytes, ELFMAG, SELFMAG) != 0)
    fail(cudaErrorNotSupported, "a module that is no cubin (PTX or a fat binary) is not simulated");
  Elf64_Ehdr header;
  std::memcpy(&header, bytes, sizeof header);
  std::size_t length = header.e_shoff + std::size_t{header.e_shnum} * header.e_shentsize;
  length = std::max<std::size_t>(length, header.e_phoff + std::size_t{header.e_phnum} * header.e_phentsize);
  for (unsigned s = 0; s < header.e_shnum; ++s) {
    Elf64_Shdr section;
    std::memcpy(&section, bytes + header.e_shoff + std::size_t{s} * header.e_shentsize, sizeof section);
    if (section.sh_type != SHT_NOBITS) length = std::max<std::size_t>(length, section.sh_offset + section.sh_size);
  }
  return length;
}

void check_shape(const Kernel& kernel, const LaunchShape& shape) {
  const auto text = [](const Dim& d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const std::uint64_t threads = std::uint64_t{shape.block.x} * shape.block.y * shape.block.z;
  const bool grid_fits = shape.grid.x >= 1 && shape.grid.y >= 1 && shape.grid.z >= 1 && shape.grid.x <= 2147483647u &&
                         shape.grid.y <= 65535 && shape.grid.z <= 65535;
  if (!grid_fits || threads == 0 || threads > kThreadsPerBlock || shape.block.z > 64)
    fail(cudaErrorInvalidConfiguration,
         readable(kernel.name) + ": " + text(shape.grid) + " blocks of " + text(shape.block) + " threads");
  if (threads > kernel.max_threads)
    fail(cudaErrorInvalidValue, readable(kernel.name) + " is compiled for at most " +
                                    std::to_string(kernel.max_threads) + " threads a block, not " +
                                    std::to_string(threads));
  if (shape.dynamic_shared_bytes > kernel.dynamic_shared_allowed ||
      shape.dynamic_shared_bytes + kernel.static_shared_bytes > kSharedPerBlockOptIn)
    fail(cudaErrorInvalidValue, readable(kernel.name) + ": " + std::to_string(shape.dynamic_shared_bytes) +
                                    " bytes of dynamic shared memory, " +
                                    std::to_string(kernel.dynamic_shared_allowed) + " are allowed");
}

}  // namespace

void register_kernel(const void* host_function, const char* name) { kernels().names[host_function] = name; }

Kernel& find_kernel(const void* handle) {
  Kernels& all = kernels();
  if (all.errors > 0 && --all.before_error < 0) {
    --all.errors;
    fail(all.error);
  }
  if (all.handles.count(handle) != 0) return *static_cast<Kernel*>(const_cast<void*>(handle));
  auto& kernel = all.by_function[handle];
  if (kernel == nullptr) {
    const auto name = all.names.find(handle);
    if (name == all.names.end()) fail(cudaErrorInvalidDeviceFunction, "no kernel was registered for this function");
    kernel = std::make_unique<Kernel>();
    kernel->name = name->second;
    all.handles.insert(kernel.get());
  }
  return *kernel;
}

void load(Kernel& kernel, int device) {
  if (!kernel.loaded_on.insert(device).second || !kernel.parameters.empty()) return;
  try {
    if (kernel.ptx_path.empty()) kernel.ptx_path = path_with(kernel.name);
    if (kernel.ptx_path.empty())
      fail(cudaErrorNotSupported,
           "no PTX for the kernel " + readable(kernel.name) + " in the files of SIMULATED_GPU_PTX");
    read_head(kernel);
  } catch (...) {
    kernel.loaded_on.erase(device);
    throw;
  }
}

std::unique_ptr<Module> load_module(const void* image) {
  char name[32];
  std::snprintf(name, sizeof name, "%016llx.ptx",
                static_cast<unsigned long long>(simulated_gpu_hash(image, length_of(image))));
  const char* folder = std::getenv("SIMULATED_GPU_TRITON_PTX");
  auto module = std::make_unique<Module>();
  module->ptx_path = std::string(folder == nullptr ? "." : folder) + "/" + name;
  if (!std::ifstream(module->ptx_path))
    fail(cudaErrorNotSupported, "no PTX for a cubin: " + module->ptx_path + " (folder: SIMULATED_GPU_TRITON_PTX)");
  return module;
}

Kernel& kernel_of(Module& module, const std::string& name) {
  for (const auto& kernel : module.kernels)
    if (kernel->name == name) return *kernel;
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name;
  kernel->ptx_path = module.ptx_path;
  load(*kernel, current_device());
  kernels().handles.insert(kernel.get());
  module.kernels.push_back(std::move(kernel));
  return *module.kernels.back();
}

void launch_kernel(Lock& lock, Kernel& kernel, const LaunchShape& shape, void** arguments, cudaStream_t stream_handle) {
  const auto stream = find_stream(stream_handle);
  const int device = current_device();
  need_context(device);
  if (stream->device != device)
    fail(cudaErrorInvalidResourceHandle, readable(kernel.name) + " is launched on " + stream->queue->name +
                                             " while cuda:" + std::to_string(device) + " is current");
  if (stream->capture != nullptr && kernel.loaded_on.count(device) == 0 && is_anything_captured_here()) {
    invalidate(*stream->capture);
    fail(cudaErrorStreamCaptureUnsupported,
         readable(kernel.name) + " is launched in a capture, and was not loaded before it");
  }
  load(kernel, device);
  check_shape(kernel, shape);
  if (kernel.code == nullptr) {
    try {
      kernel.code = &load_kernel(kernel.ptx_path, kernel.name);
    } catch (const std::exception& error) {
      fail(cudaErrorNotSupported, error.what());
    }
  }
  std::vector<char> parameters(std::max<std::size_t>(kernel.parameter_bytes, 1));
  for (std::size_t p = 0; p < kernel.parameters.size(); ++p)
    std::memcpy(parameters.data() + kernel.parameters[p].offset, arguments[p], kernel.parameters[p].bytes);
  Work work;
  work.kind = Kind::kernel;
  work.symbol = kernel.name;
  work.name = "kernel " + readable(kernel.name);
  const auto runs = std::make_shared<std::atomic<std::uint64_t>>(draw());  // each replay has a seed of its own
  work.run = [code = kernel.code, parameters = std::move(parameters), shape, device, runs] {
    Launch launch;
    launch.grid = shape.grid;
    launch.block = shape.block;
    launch.dynamic_shared_bytes = static_cast<unsigned>(shape.dynamic_shared_bytes);
    launch.parameters = parameters.data();
    launch.device = device;
    launch.seed = (*runs)++;
    return run_kernel(*code, launch);
  };
  submit(lock, stream, std::move(work));
}

int blocks_per_processor(Kernel& kernel, int block_threads, std::size_t dynamic_shared_bytes) {
  if (block_threads < 1 || block_threads > kThreadsPerBlock) fail(cudaErrorInvalidValue);
  const std::size_t shared = kernel.static_shared_bytes + dynamic_shared_bytes + 1024;
  const int warps = (block_threads + 31) / 32;
  return std::min(
      {kBlocksPerProcessor, kThreadsPerProcessor / (warps * 32), static_cast<int>(kSharedPerProcessor / shared)});
}

}  // namespace simulated_gpu

extern "C" void simulated_gpu_fail_kernel(int error, int after, int times) {
  const simulated_gpu::Lock lock = simulated_gpu::lock_state();
  simulated_gpu::kernels().error = static_cast<cudaError_t>(error);
  simulated_gpu::kernels().before_error = after;
  simulated_gpu::kernels().errors = times;
}
