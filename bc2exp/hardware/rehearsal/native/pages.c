/* Address ranges and the memory behind them, as torch_npu's allocator asks for them with expandable_segments.
 *
 * A range is reserved without memory; pieces of physical memory, which count against the device's budget, are
 * mapped into it one after the other. Here a mapped piece is a part of the range that may be touched.
 */
#define _GNU_SOURCE
#include "rehearsal.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

typedef struct Extent {
    char *start;
    size_t bytes;
    struct Extent *next;
} Extent;

typedef struct {
    size_t bytes;
    int device;
} Physical;

static Extent *reserved, *mapped;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void keep(Extent **list, char *start, size_t bytes)
{
    Extent *extent = malloc(sizeof *extent);
    pthread_mutex_lock(&lock);
    *extent = (Extent){start, bytes, *list};
    *list = extent;
    pthread_mutex_unlock(&lock);
}

/* Take the extent that starts here off a list and return its bytes, 0 for none. */
static size_t forget(Extent **list, char *start)
{
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (Extent **at = list; *at; at = &(*at)->next) {
        if ((*at)->start == start) {
            Extent *found = *at;
            bytes = found->bytes;
            *at = found->next;
            free(found);
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return bytes;
}

/* Back to a range that may not be touched; what it held is gone. */
static int blank(void *start, size_t bytes)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap(start, bytes, PROT_NONE, flags, -1, 0) != MAP_FAILED;
}

int aclrtReserveMemAddress(void **start, size_t bytes, size_t alignment, void *wanted, uint64_t flags)
{
    int options = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *found = mmap(wanted, bytes, PROT_NONE, options, -1, 0);
    if (found == MAP_FAILED) {
        rehearsal_message("rehearsal: the host cannot reserve %zu bytes of addresses", bytes);
        return ACL_OUT_OF_MEMORY;
    }
    keep(&reserved, found, bytes);
    *start = found;
    return ACL_OK;
}

int aclrtReleaseMemAddress(void *start)
{
    size_t bytes = forget(&reserved, start);
    return bytes && munmap(start, bytes) == 0 ? ACL_OK : ACL_INVALID_PARAM;
}

int aclrtMallocPhysical(void **handle, size_t bytes, const void *properties, uint64_t flags)
{
    int device = device_take(bytes);
    if (device < 0) {
        return ACL_OUT_OF_MEMORY;
    }
    Physical *made = malloc(sizeof *made);
    *made = (Physical){bytes, device};
    *handle = made;
    return ACL_OK;
}

int aclrtFreePhysical(void *handle)
{
    Physical *physical = handle;
    device_give_back(physical->device, physical->bytes);
    free(physical);
    return ACL_OK;
}

int aclrtMapMem(void *start, size_t bytes, size_t offset, void *handle, uint64_t flags)
{
    if (offset || bytes != ((Physical *)handle)->bytes) {
        return rehearsal_refuse("aclrtMapMem of a part of physical memory");
    }
    if (mprotect(start, bytes, PROT_READ | PROT_WRITE)) {
        rehearsal_message("rehearsal: aclrtMapMem into a range that is not reserved");
        return ACL_INVALID_PARAM;
    }
    keep(&mapped, start, bytes);
    return ACL_OK;
}

int aclrtUnmapMem(void *start)
{
    size_t bytes = forget(&mapped, start);
    return bytes && blank(start, bytes) ? ACL_OK : ACL_INVALID_PARAM;
}
