// Kernels by file and name: the translator is run for what is not in the folder of compiled ones yet.
#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "block.h"

extern char** environ;

namespace simulated_gpu {

static std::string setting(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0')
    throw std::runtime_error(std::string(name) + " is not set: tests/simulated_gpu/README.md");
  return value;
}

static void hash(uint64_t& state, const std::string& text) {  // FNV-1a
  for (const char c : text) state = (state ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
}

// What a kernel's library depends on in its file: its own text, and what stands outside of all kernels.
static std::string key_of(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  uint64_t first = 0xcbf29ce484222325u, second = 0x84222325cbf29ce4u;
  const auto add = [&](const std::string& text) {
    hash(first, text);
    hash(second, text + '\n');
  };
  bool is_inside = false, is_wanted = false, was_named = false;
  for (std::string line; std::getline(file, line);) {
    if (!is_inside && line.find(".entry") != std::string::npos)
      was_named = line.find(" " + name + "(") != std::string::npos;
    if (!is_inside && !line.empty() && line[0] == '{') {
      is_inside = true;
      is_wanted = was_named;
    }
    if (!is_inside || is_wanted) add(line);
    if (is_inside && line[0] == '}') is_inside = false;
  }
  add(name);
  char text[40];
  std::snprintf(text, sizeof text, "%016llx%016llx", static_cast<unsigned long long>(first),
                static_cast<unsigned long long>(second));
  return text;
}

// Without what puts the simulated GPU under a process.
static void run(const std::vector<std::string>& command) {
  const std::string folder = setting("SIMULATED_GPU_ROOT");
  std::vector<std::string> environment;
  for (char** each = environ; *each != nullptr; ++each)
    if (std::strncmp(*each, "LD_PRELOAD=", 11) != 0 && std::strncmp(*each, "LD_LIBRARY_PATH=", 16) != 0)
      environment.emplace_back(*each);
  std::vector<char*> arguments, variables;
  for (const auto& each : command) arguments.push_back(const_cast<char*>(each.c_str()));
  for (const auto& each : environment) variables.push_back(const_cast<char*>(each.c_str()));
  arguments.push_back(nullptr);
  variables.push_back(nullptr);

  char said_in[] = "/tmp/simulated-gpu-XXXXXX";
  const int said = mkstemp(said_in);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addchdir_np(&actions, folder.c_str());
  posix_spawn_file_actions_adddup2(&actions, said, 1);
  posix_spawn_file_actions_adddup2(&actions, said, 2);
  pid_t child = 0;
  const int error = posix_spawn(&child, arguments[0], &actions, nullptr, arguments.data(), variables.data());
  posix_spawn_file_actions_destroy(&actions);
  int status = -1;
  if (error == 0)
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
  std::ifstream file(said_in);
  std::stringstream text;
  text << file.rdbuf();
  close(said);
  unlink(said_in);
  if (error != 0) throw std::runtime_error(command[0] + ": " + std::strerror(error));
  if (status != 0) throw std::runtime_error("a kernel cannot be translated:\n" + text.str());
}

static KernelFacts read_facts(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  KernelFacts facts;
  facts.name = name;
  std::string key;
  for (unsigned value = 0; file >> key >> value;) {
    if (key == "parameter_bytes") facts.parameter_bytes = value;
    if (key == "max_threads") facts.max_threads_per_block = value;
  }
  return facts;
}

static std::unique_ptr<KernelCode> load(const std::string& path, const std::string& name) {
  const std::string stem = setting("SIMULATED_GPU_KERNELS") + "/" + key_of(path, name);
  const std::string library = stem + ".so";
  struct stat found{};
  if (stat(library.c_str(), &found) != 0) {
    mkdir(setting("SIMULATED_GPU_KERNELS").c_str(), 0777);
    const int lock = open((stem + ".lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666);
    flock(lock, LOCK_EX);
    const auto unlock = std::unique_ptr<const int, void (*)(const int*)>(&lock, [](const int* file) { close(*file); });
    if (stat(library.c_str(), &found) != 0)
      run({setting("SIMULATED_GPU_PYTHON"), "-m", "tests.simulated_gpu.translator", path, name, library});
  }
  auto code = std::make_unique<KernelCode>();
  code->facts = read_facts(stem + ".facts", name);
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  code->table = static_cast<const KernelTable*>(dlsym(handle, "simulated_gpu_kernel"));
  if (code->table == nullptr) throw std::runtime_error(dlerror());
  code->facts.static_shared_bytes = code->table->shared_bytes;
  code->facts.local_bytes = code->table->local_bytes;
  return code;
}

const KernelCode& load_kernel(const std::string& path, const std::string& name) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, std::string>, std::unique_ptr<KernelCode>> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& code = loaded[{path, name}];
  if (!code) code = load(path, name);
  return *code;
}

}  // namespace simulated_gpu
