/* HCCL on one machine: collectives between processes over shared memory.
 *
 * A communicator is one anonymous memory file (memfd). Rank 0 creates it, the others open it through
 * /proc/<pid>/fd, the address that the root info carries. It has no name anywhere, so nothing can be left
 * behind: the kernel frees it when the last rank is gone, however that rank ended, and two jobs cannot meet.
 *
 * Every rank holds a file lock on its own byte of the segment. The kernel drops the lock when the process
 * ends, also by SIGKILL, so a waiting rank learns within a fraction of a second that a peer is gone and
 * returns an error. A peer that lives but never arrives is a time-out: HCCL_CONNECT_TIMEOUT (default 120 s)
 * while a communicator is built, HCCL_EXEC_TIMEOUT (default here 300 s, on an NPU 1836 s) after that.
 *
 * Calls block the calling thread until the operation is complete.
 */
#define _GNU_SOURCE
#include "hccl.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLICE_NANOSECONDS 100000000 /* how often a waiting rank looks whether its peers still live */

char *slot(Communicator *comm, uint32_t rank) { return comm->slots + (size_t)rank * SLOT_BYTES; }

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

size_t hccl_element_size(int type)
{
    static const size_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
    return type >= 0 && (size_t)type < sizeof sizes / sizeof *sizes ? sizes[type] : 0;
}

/* ---------------------------------------------------------------- waiting without hanging */

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

void wake_all(atomic_uint *word) { syscall(SYS_futex, word, FUTEX_WAKE, MAX_RANKS, NULL, NULL, 0); }

void sleep_while_equal(atomic_uint *word, unsigned seen)
{
    struct timespec slice = {0, SLICE_NANOSECONDS};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &slice, NULL, 0);
}

static struct flock lock_of(uint32_t rank)
{
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
}

int is_gone(Communicator *comm, uint32_t rank)
{
    int process = atomic_load(&comm->segment->process[rank]);
    if (process == 0 || process == getpid()) {
        return 0; /* not here yet, or this process itself, whose own lock is invisible to it */
    }
    struct flock lock = lock_of(rank);
    return fcntl(comm->file, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

int report_failure(Communicator *comm)
{
    rehearsal_message("rehearsal HCCL: %s", comm->reason);
    return comm->failed;
}

int fail_gone(Communicator *comm, uint32_t rank)
{
    snprintf(comm->reason, sizeof comm->reason, "rank %u (process %d) of %s is gone; rank %u was waiting for it",
             rank, atomic_load(&comm->segment->process[rank]), comm->name, comm->rank);
    comm->failed = HCCL_REMOTE;
    return report_failure(comm);
}

int fail_late(Communicator *comm)
{
    snprintf(comm->reason, sizeof comm->reason, "rank %u of %s waited more than %.0f s for the other %u",
             comm->rank, comm->name, comm->patience, comm->size - 1);
    comm->failed = HCCL_TIMEOUT;
    return report_failure(comm);
}

static double patience(const char *name, uint64_t otherwise)
{
    uint64_t seconds = rehearsal_setting(name, otherwise);
    return seconds ? (double)seconds : 1e12; /* 0 means for ever */
}

/* Wait until every rank has arrived. */
int barrier(Communicator *comm)
{
    Segment *segment = comm->segment;
    if (comm->failed) {
        return report_failure(comm);
    }
    unsigned generation = atomic_load(&segment->generation);
    if (atomic_fetch_add(&segment->arrived, 1) + 1 == comm->size) {
        atomic_store(&segment->arrived, 0);
        atomic_fetch_add(&segment->generation, 1);
        wake_all(&segment->generation);
        return HCCL_OK;
    }
    double deadline = now() + comm->patience;
    int gone = -1;
    while (atomic_load(&segment->generation) == generation) {
        if (gone >= 0) {
            return fail_gone(comm, gone);
        }
        if (now() > deadline) {
            return fail_late(comm);
        }
        sleep_while_equal(&segment->generation, generation);
        for (uint32_t rank = 0; rank < comm->size; rank++) {
            gone = is_gone(comm, rank) ? (int)rank : gone;
        }
    }
    return HCCL_OK;
}

/* ---------------------------------------------------------------- communicators */

int HcclGetRootInfo(void *opaque)
{
    RootInfo root = {.process = getpid(), .file = memfd_create("bc2exp_rehearsal", MFD_CLOEXEC)};
    if (root.file < 0 || ftruncate(root.file, sizeof(Segment)) ||
        getentropy(&root.nonce, sizeof root.nonce) ||
        pwrite(root.file, &root.nonce, sizeof root.nonce, offsetof(Segment, nonce)) != sizeof root.nonce) {
        rehearsal_message("rehearsal HCCL: cannot create a memory file: %m");
        return HCCL_SYSTEM_CALL;
    }
    memset(opaque, 0, ROOT_INFO_BYTES);
    memcpy(opaque, &root, sizeof root);
    return HCCL_OK;
}

static int open_segment_file(const RootInfo *root)
{
    if (root->process == getpid()) {
        return root->file;
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", root->process, root->file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    uint64_t nonce = 0;
    if (file < 0 || pread(file, &nonce, sizeof nonce, offsetof(Segment, nonce)) != sizeof nonce ||
        nonce != root->nonce) {
        rehearsal_message("rehearsal HCCL: cannot reach rank 0 (process %d): it has ended, or the ranks are not "
                        "on one machine", root->process);
        return -1;
    }
    return file;
}

int HcclCommInitRootInfo(uint32_t size, const void *opaque, uint32_t rank, void **created)
{
    RootInfo root;
    memcpy(&root, opaque, sizeof root);
    if (size > MAX_RANKS || rank >= size) {
        rehearsal_message("rehearsal HCCL: rank %u of %u (at most %d)", rank, size, MAX_RANKS);
        return HCCL_NOT_SUPPORTED;
    }
    Communicator *comm = calloc(1, sizeof *comm);
    comm->file = open_segment_file(&root);
    if (comm->file < 0) {
        free(comm);
        return HCCL_REMOTE;
    }
    comm->rank = rank;
    comm->size = size;
    comm->patience = patience("HCCL_CONNECT_TIMEOUT", 120);
    snprintf(comm->name, sizeof comm->name, "rehearsal_%d_%d", root.process, root.file);
    size_t slots = (size_t)size * SLOT_BYTES;
    comm->bytes = sizeof(Segment) + slots + (size_t)size * size * MAILBOX_BYTES; /* untouched pages cost nothing */
    struct flock lock = lock_of(rank);
    if (ftruncate(comm->file, comm->bytes) || fcntl(comm->file, F_SETLK, &lock)) {
        rehearsal_message("rehearsal HCCL: cannot join %s as rank %u: %m", comm->name, rank);
        free(comm);
        return HCCL_SYSTEM_CALL;
    }
    char *base = mmap(NULL, comm->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, comm->file, 0);
    if (base == MAP_FAILED) {
        free(comm);
        return HCCL_MEMORY;
    }
    comm->segment = (Segment *)base;
    comm->slots = base + sizeof(Segment);
    comm->mailboxes = comm->slots + slots;
    atomic_store(&comm->segment->process[rank], getpid());
    int status = barrier(comm);
    comm->patience = patience("HCCL_EXEC_TIMEOUT", 300);
    *created = comm;
    return status;
}

int HcclCommInitRootInfoConfig(uint32_t size, const void *root, uint32_t rank, const void *config, void **created)
{
    return HcclCommInitRootInfo(size, root, rank, created);
}

int HcclCommDestroy(void *handle)
{
    Communicator *comm = handle;
    munmap(comm->segment, comm->bytes);
    close(comm->file); /* drops this rank's lock as well */
    free(comm);
    return HCCL_OK;
}

uint32_t HcclGetCommConfigCapability(void) { return 12; } /* configurations are accepted and have no effect */
int HcclSetConfig(int option, int64_t value) { return HCCL_OK; }

int HcclGetCommAsyncError(void *handle, int *error)
{
    Communicator *comm = handle;
    *error = comm->failed;
    if (comm->failed) {
        report_failure(comm); /* for torch_npu's watchdog thread, which then ends the process */
    }
    return HCCL_OK;
}

int HcclGetCommName(void *handle, char *name)
{
    strcpy(name, ((Communicator *)handle)->name);
    return HCCL_OK;
}

int HcclGetRankId(void *handle, uint32_t *rank)
{
    *rank = ((Communicator *)handle)->rank;
    return HCCL_OK;
}

int HcclGetRankSize(void *handle, uint32_t *size)
{
    *size = ((Communicator *)handle)->size;
    return HCCL_OK;
}

const char *HcclGetErrorString(int code)
{
    switch (code) {
    case HCCL_OK: return "no error";
    case HCCL_NOT_SUPPORTED: return "rehearsal HCCL: not supported";
    case HCCL_TIMEOUT: return "rehearsal HCCL: a rank did not arrive in time";
    case HCCL_REMOTE: return "rehearsal HCCL: a rank is gone";
    default: return "rehearsal HCCL: system error";
    }
}
