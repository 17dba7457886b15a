// A CUDA driver for tests without a GPU: memory is the host's, a stream does its work at once, and
// kernels are those of kernel_host.h in the library that FAKE_DRIVER_KERNELS names. It has the calls
// that cuda-core makes for service/engines/device.py and kernels/launcher.py and no other, so that the real cuda-core runs.
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

typedef int Status;  // CUresult
typedef unsigned long long Address;
enum { SUCCESS = 0, NOT_SUPPORTED = 801, NOT_FOUND = 500 };

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

static thread_local void* current = nullptr;
static int context, pool;

extern "C" {

Status cuInit(unsigned) { return SUCCESS; }
Status cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}
Status cuGetErrorName(Status, const char** text) {
  *text = "FAKE_DRIVER_ERROR";
  return SUCCESS;
}
Status cuGetErrorString(Status, const char** text) {
  *text = "the fake driver does not do this";
  return SUCCESS;
}
Status cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}
Status cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return SUCCESS;
}
Status cuDeviceGetAttribute(int* value, int attribute, int) {
  // 75, 76: compute capability; 115: memory pools
  *value = attribute == 75 ? 9 : attribute == 115 ? 1 : 0;
  return SUCCESS;
}
Status cuDevicePrimaryCtxRetain(void** found, int) {
  *found = &context;
  return SUCCESS;
}
Status cuDevicePrimaryCtxRelease(int) { return SUCCESS; }
Status cuCtxGetCurrent(void** found) {
  *found = current;
  return SUCCESS;
}
Status cuCtxSetCurrent(void* wanted) {
  current = wanted;
  return SUCCESS;
}
Status cuCtxGetDevice(int* device) {
  *device = 0;
  return current ? SUCCESS : 201;
}
Status cuStreamCreateWithPriority(void** stream, unsigned, int) {
  *stream = std::malloc(1);
  return SUCCESS;
}
Status cuStreamDestroy(void* stream) {
  std::free(stream);
  return SUCCESS;
}
Status cuStreamIsCapturing(void*, int* answer) {
  *answer = 0;
  return SUCCESS;
}
Status cuStreamSynchronize(void*) { return SUCCESS; }
Status cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}
Status cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "fake", size);
  return SUCCESS;
}
Status cuEventCreate(void** event, unsigned) {
  *event = std::malloc(1);
  return SUCCESS;
}
Status cuEventDestroy(void* event) {
  std::free(event);
  return SUCCESS;
}
Status cuEventRecord(void*, void*) { return SUCCESS; }
Status cuEventSynchronize(void*) { return SUCCESS; }
Status cuEventElapsedTime(float* ms, void*, void*) {
  *ms = 1;
  return SUCCESS;
}
Status cuDeviceGetDefaultMemPool(void** found, int) {
  *found = &pool;
  return SUCCESS;
}
Status cuDeviceGetMemPool(void** found, int) {
  *found = &pool;
  return SUCCESS;
}
Status cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }
Status cuMemPoolGetAttribute(void*, int, void* value) {
  std::memset(value, 0, 8);
  return SUCCESS;
}
Status cuMemAllocFromPoolAsync(Address* found, std::size_t bytes, void*, void*) {
  if (!current) return 201;
  void* memory = std::malloc(bytes);
  std::memset(memory, 0xff, bytes);
  *found = reinterpret_cast<Address>(memory);
  return SUCCESS;
}
Status cuMemFreeAsync(Address memory, void*) {
  std::free(reinterpret_cast<void*>(memory));
  return SUCCESS;
}
Status cuMemAllocHost(void** found, std::size_t bytes) {
  if (!current) return 201;
  *found = std::malloc(bytes);
  return SUCCESS;
}
Status cuMemFreeHost(void* memory) {
  std::free(memory);
  return SUCCESS;
}
Status cuMemcpyAsync(Address target, Address source, std::size_t bytes, void*) {
  if (!current) return 201;
  std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
  return SUCCESS;
}
Status cuLibraryLoadData(void** library, const void*, void*, void*, unsigned, void*, void*,
                         unsigned) {
  *library = dlopen(std::getenv("FAKE_DRIVER_KERNELS"), RTLD_NOW);
  return *library ? SUCCESS : NOT_FOUND;
}
Status cuLibraryUnload(void*) { return SUCCESS; }
Status cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = dlsym(library, (std::string("run_") + name).c_str());
  return *kernel ? SUCCESS : NOT_FOUND;
}
Status cuLaunchKernelEx(const LaunchConfig* config, void* kernel, void** arguments, void**) {
  if (!current || config->block[1] != 1 || config->block[2] != 1) return 201;
  typedef int (*Run)(const unsigned*, unsigned, void**, unsigned);
  return reinterpret_cast<Run>(kernel)(config->grid, config->block[0], arguments, 0);
}
Status cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned block, unsigned,
                      unsigned, unsigned, void* stream, void** arguments, void** extra) {
  const LaunchConfig config = {{x, y, z}, {block, 1, 1}, 0, stream, nullptr, 0};
  return cuLaunchKernelEx(&config, kernel, arguments, extra);
}

Status cuGetProcAddress(const char* name, void** found, int, std::uint64_t, int* status) {
  Dl_info own;
  dladdr(reinterpret_cast<void*>(cuInit), &own);
  static void* self = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *found = dlsym(self, name);
  if (status) *status = *found ? 0 : 1;
  return *found ? SUCCESS : NOT_FOUND;
}
Status cuGetProcAddress_v2(const char* name, void** found, int version, std::uint64_t flags,
                           int* status) {
  return cuGetProcAddress(name, found, version, flags, status);
}
}
