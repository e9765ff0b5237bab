/* Streams and events of the ACL runtime: kernels have run when a launch returns, so that streams are always
 * empty and events always complete. And the options that mean nothing on a host.
 */
#define _GNU_SOURCE
#include "rehearsal.h"

#include <stdlib.h>
#include <time.h>

/* ---------------------------------------------------------------- streams: always empty */

typedef struct {
    int32_t id;
} Stream;

int aclrtCreateStream(void **stream)
{
    static int32_t next_id;
    Stream *created = malloc(sizeof *created);
    created->id = __atomic_fetch_add(&next_id, 1, __ATOMIC_RELAXED);
    *stream = created;
    return ACL_OK;
}

int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return aclrtCreateStream(stream); }

int aclrtDestroyStream(void *stream)
{
    free(stream);
    return ACL_OK;
}

int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }

int aclrtStreamQuery(void *stream, int *status)
{
    *status = 0; /* complete */
    return ACL_OK;
}

int aclrtStreamGetId(void *stream, int32_t *id)
{
    *id = stream ? ((Stream *)stream)->id : 0;
    return ACL_OK;
}

int aclrtSynchronizeStream(void *stream) { return ACL_OK; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) { return ACL_OK; }
int aclrtSynchronizeDevice(void) { return ACL_OK; }
int aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) { return ACL_OK; }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return ACL_OK; }
int aclrtSetStreamAttribute(void *stream, int attribute, void *value) { return ACL_OK; }
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return ACL_OK; }

int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag)
{
    *flag = 0;
    return ACL_OK;
}

int aclrtSubscribeReport(uint64_t thread, void *stream) { return ACL_OK; }
int aclrtUnSubscribeReport(uint64_t thread, void *stream) { return ACL_OK; }
int aclrtProcessReport(int32_t timeout) { return ACL_OK; }

/* ---------------------------------------------------------------- events: always complete */

typedef struct {
    struct timespec recorded;
} Event;

int aclrtCreateEventWithFlag(void **event, uint32_t flag)
{
    *event = calloc(1, sizeof(Event));
    return ACL_OK;
}

int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }

int aclrtDestroyEvent(void *event)
{
    free(event);
    return ACL_OK;
}

int aclrtRecordEvent(void *event, void *stream)
{
    clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->recorded);
    return ACL_OK;
}

int aclrtResetEvent(void *event, void *stream) { return ACL_OK; }
int aclrtSynchronizeEvent(void *event) { return ACL_OK; }
int aclrtStreamWaitEvent(void *stream, void *event) { return ACL_OK; }

int aclrtQueryEventStatus(void *event, int *status)
{
    *status = 1; /* complete */
    return ACL_OK;
}

int aclrtQueryEventWaitStatus(void *event, int *status)
{
    *status = 0; /* complete, in this call's own numbering */
    return ACL_OK;
}

int aclrtEventElapsedTime(float *milliseconds, void *start, void *end)
{
    struct timespec a = ((Event *)start)->recorded;
    struct timespec b = ((Event *)end)->recorded;
    *milliseconds = (b.tv_sec - a.tv_sec) * 1e3f + (b.tv_nsec - a.tv_nsec) / 1e6f;
    return ACL_OK;
}

/* ---------------------------------------------------------------- options without any effect on the host */

int aclrtSetDeviceSatMode(int mode) { return ACL_OK; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return ACL_OK; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return ACL_OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return ACL_OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return ACL_OK; }
int aclSetCompileopt(int option, const char *value) { return ACL_OK; }
size_t aclGetCompileoptSize(int option) { return 1; }

int aclGetCompileopt(int option, char *value, size_t room)
{
    if (room) {
        value[0] = 0;
    }
    return ACL_OK;
}

int aclrtGetSysParamOpt(int option, int64_t *value)
{
    *value = 0;
    return ACL_OK;
}
