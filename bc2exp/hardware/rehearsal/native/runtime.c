/* The ACL runtime on host memory.
 *
 * A device is a number with a memory budget. Device memory is host memory, copies are memmove, kernels run on
 * the calling thread before the launch returns (streams.c).
 * A function missing here is either generated as a refusal (symbols.py) or absent, and torch_npu then says
 * "Failed to find function ...". The signatures are those of the ACL headers inside the torch_npu wheel.
 */
#define _GNU_SOURCE
#include "rehearsal.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---------------------------------------------------------------- settings and messages */

#define MAX_DEVICES 64
#define GIB (1ull << 30)

static __thread char message[1024];

void rehearsal_message(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
}

int rehearsal_refuse(const char *name)
{
    rehearsal_message("the rehearsal refuses %s: it is not implemented on host memory", name);
    census_refusal(name);
    return ACL_NOT_SUPPORTED;
}

void rehearsal_refuse_and_abort(const char *name)
{
    rehearsal_refuse(name);
    fprintf(stderr, "%s; it cannot return an error, so the process stops\n", message);
    abort();
}

uint64_t rehearsal_setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

static int device_count(void)
{
    uint64_t devices = rehearsal_setting("BC2EXP_REHEARSAL_DEVICES", 8);
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (visible && *visible) { /* all devices are alike, so only their number matters */
        uint64_t listed = 1;
        for (const char *c = visible; *c; c++) {
            listed += *c == ',';
        }
        devices = listed < devices ? listed : devices;
    }
    return devices < MAX_DEVICES ? (int)devices : MAX_DEVICES;
}

static size_t memory_budget(void)
{
    return rehearsal_setting("BC2EXP_REHEARSAL_BYTES", 64 * GIB);
}

const char *aclGetRecentErrMsg(void)
{
    static __thread char reported[sizeof message];
    memcpy(reported, message, sizeof message);
    message[0] = 0; /* a message belongs to one error */
    return reported[0] ? reported : "the rehearsal (rehearsal) has nothing to add";
}

const char *aclrtGetSocName(void)
{
    const char *name = getenv("BC2EXP_REHEARSAL_SOC");
    return name && *name ? name : "Ascend910B1";
}

int aclInit(const char *config) { return ACL_OK; }
int aclFinalize(void) { return ACL_OK; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {}
int aclrtPeekAtLastError(int level) { return ACL_OK; }
int aclrtGetLastError(int level) { return ACL_OK; }

/* ---------------------------------------------------------------- devices and contexts */

static __thread int current = -1;
static int active[MAX_DEVICES];
static char contexts[MAX_DEVICES]; /* only their addresses are used */

int aclrtGetDeviceCount(uint32_t *count)
{
    *count = device_count();
    return ACL_OK;
}

int aclrtSetDevice(int32_t device)
{
    if (device < 0 || device >= device_count()) {
        rehearsal_message("rehearsal: device %d of %d", device, device_count());
        return ACL_INVALID_DEVICE;
    }
    current = device;
    active[device] = 1;
    return ACL_OK;
}

int aclrtGetDevice(int32_t *device)
{
    if (current < 0) {
        return ACL_NO_CONTEXT;
    }
    *device = current;
    return ACL_OK;
}

int aclrtResetDevice(int32_t device)
{
    if (device >= 0 && device < MAX_DEVICES) {
        active[device] = 0;
    }
    if (current == device) {
        current = -1;
    }
    return ACL_OK;
}

int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *is_active)
{
    if (flags) {
        *flags = 0;
    }
    if (is_active) {
        *is_active = device >= 0 && device < MAX_DEVICES && active[device];
    }
    return ACL_OK;
}

int aclrtGetCurrentContext(void **context)
{
    if (current < 0) {
        return ACL_NO_CONTEXT;
    }
    *context = &contexts[current];
    return ACL_OK;
}

int aclrtSetCurrentContext(void *context)
{
    long device = (char *)context - contexts;
    if (device < 0 || device >= MAX_DEVICES) {
        return ACL_NO_CONTEXT;
    }
    current = (int)device;
    return ACL_OK;
}

int aclGetDeviceCapability(uint32_t device, int what, int64_t *value)
{
    *value = 0; /* core counts and cache size: there is no such hardware */
    return ACL_OK;
}

int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer)
{
    *can = 1;
    return ACL_OK;
}

int aclrtDeviceEnablePeerAccess(int32_t device, uint32_t flags) { return ACL_OK; }

/* ---------------------------------------------------------------- memory */

#define HEADER_BYTES 4096 /* one page, so that the memory handed out is page-aligned */
#define BLOCK_MAGIC 0x4e50555354414e44ull

typedef struct {
    uint64_t magic;
    size_t bytes;
    int device;
} Block; /* stored one page before the memory handed out */

static size_t used[MAX_DEVICES]; /* by this process: a device is not shared between processes */
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

static Block *block_of(void *memory) { return (Block *)((char *)memory - HEADER_BYTES); }

void device_give_back(int device, size_t bytes)
{
    pthread_mutex_lock(&memory_lock);
    used[device] -= bytes;
    pthread_mutex_unlock(&memory_lock);
}

int device_take(size_t bytes)
{
    int device = current < 0 ? 0 : current;
    size_t budget = memory_budget();
    pthread_mutex_lock(&memory_lock);
    int fits = bytes <= budget && used[device] <= budget - bytes;
    used[device] += fits ? bytes : 0;
    pthread_mutex_unlock(&memory_lock);
    if (!fits) {
        rehearsal_message("rehearsal: device %d has %zu bytes and %zu are in use", device, budget, used[device]);
    }
    return fits ? device : -1;
}

int aclrtMalloc(void **memory, size_t bytes, int policy)
{
    int device = device_take(bytes);
    if (device < 0) {
        return ACL_OUT_OF_MEMORY;
    }
    /* Without reservation: only pages that are touched need host memory, so a device may be larger than the host. */
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *raw = mmap(NULL, HEADER_BYTES + bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (raw == MAP_FAILED) {
        device_give_back(device, bytes);
        rehearsal_message("rehearsal: the host cannot map %zu bytes", bytes);
        return ACL_OUT_OF_MEMORY;
    }
    *memory = raw + HEADER_BYTES;
    *block_of(*memory) = (Block){BLOCK_MAGIC, bytes, device};
    return ACL_OK;
}

int aclrtMallocAlign32(void **memory, size_t bytes, int policy) { return aclrtMalloc(memory, bytes, policy); }

int aclrtFree(void *memory)
{
    if (!memory) {
        return ACL_OK;
    }
    Block *block = block_of(memory);
    if (block->magic != BLOCK_MAGIC) {
        rehearsal_message("rehearsal: aclrtFree of memory that is not the device's");
        return ACL_INVALID_PARAM;
    }
    device_give_back(block->device, block->bytes);
    munmap(block, HEADER_BYTES + block->bytes);
    return ACL_OK;
}

int aclrtMallocHost(void **memory, size_t bytes)
{
    return posix_memalign(memory, 64, bytes ? bytes : 64) ? ACL_OUT_OF_MEMORY : ACL_OK;
}

int aclrtFreeHost(void *memory)
{
    free(memory);
    return ACL_OK;
}

int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes)
{
    int device = current < 0 ? 0 : current;
    *total_bytes = memory_budget();
    *free_bytes = *total_bytes - used[device];
    return ACL_OK;
}

int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind)
{
    if (bytes > room) {
        return ACL_INVALID_PARAM;
    }
    memmove(to, from, bytes);
    return ACL_OK;
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream)
{
    return aclrtMemcpy(to, room, from, bytes, kind);
}

int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes)
{
    if (bytes > room) {
        return ACL_INVALID_PARAM;
    }
    memset(to, value, bytes);
    return ACL_OK;
}

int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream)
{
    return aclrtMemset(to, room, value, bytes);
}
