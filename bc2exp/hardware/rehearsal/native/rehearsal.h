/* What the C files of a rehearsal and the generated refusals share. */
#ifndef REHEARSAL_H
#define REHEARSAL_H

#include <stddef.h>
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))

enum { /* status codes of the ACL runtime */
    ACL_OK = 0,
    ACL_INVALID_PARAM = 100000,
    ACL_INVALID_DEVICE = 107001,
    ACL_NO_CONTEXT = 107002,
    ACL_NOT_SUPPORTED = 207000,
    ACL_OUT_OF_MEMORY = 207001,
};

/* Keep a message for aclGetRecentErrMsg(), which torch_npu appends to the exception it raises. */
void rehearsal_message(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Record and return the refusal of a runtime call that the rehearsal does not implement. */
int rehearsal_refuse(const char *name);

/* The same for a function that has no way to report an error: print it and abort. */
void rehearsal_refuse_and_abort(const char *name) __attribute__((noreturn));

/* An integer environment variable, or a default. */
uint64_t rehearsal_setting(const char *name, uint64_t otherwise);

/* Count a collective of one process: its name, HCCL data type, the elements that this rank gives (of a
 * scatter or receive: gets), and the ranks of its communicator. */
HIDDEN void census_collective(const char *name, int type, uint64_t elements, uint32_t ranks);

/* Take bytes of the current device's memory; returns the device, -1 (with a message) where they do not fit. */
HIDDEN int device_take(size_t bytes);
HIDDEN void device_give_back(int device, size_t bytes);

/* Count a refused runtime call. */
HIDDEN void census_refusal(const char *name);

#endif
