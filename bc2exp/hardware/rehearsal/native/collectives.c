/* HCCL collectives: every rank puts a piece into its window, meets the others, and reads theirs. */
#define _GNU_SOURCE
#include "hccl.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- element types and reduction */

static float from_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t to_bf16(float value)
{
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    if ((wide & 0x7fffffff) > 0x7f800000) {
        return 0x7fc0; /* not a number */
    }
    return (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

static float from_fp16(uint16_t bits)
{
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

static uint16_t to_fp16(float value)
{
    _Float16 narrow = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &narrow, sizeof bits);
    return bits;
}

#define SAME(x) (x)
#define COMBINE(op, a, b) \
    ((op) == SUM ? (a) + (b) : (op) == PRODUCT ? (a) * (b) : (op) == MAXIMUM ? ((a) > (b) ? (a) : (b)) \
                                                                             : ((a) < (b) ? (a) : (b)))

/* Combine all slots in rank order, so that every rank computes the same bits; half types accumulate in float. */
#define REDUCE_AS(STORED, WIDE, WIDEN, NARROW) \
    for (size_t i = 0; i < count; i++) { \
        WIDE total = WIDEN(((STORED *)slot(comm, 0))[i]); \
        for (uint32_t rank = 1; rank < comm->size; rank++) { \
            WIDE value = WIDEN(((STORED *)slot(comm, rank))[i]); \
            total = COMBINE(op, total, value); \
        } \
        ((STORED *)result)[i] = NARROW(total); \
    } \
    return HCCL_OK

static int reduce_slots(Communicator *comm, void *result, size_t count, int type, int op)
{
    switch (type) {
    case 0: REDUCE_AS(int8_t, int8_t, SAME, SAME);
    case 1: REDUCE_AS(int16_t, int16_t, SAME, SAME);
    case 2: REDUCE_AS(int32_t, int32_t, SAME, SAME);
    case 3: REDUCE_AS(uint16_t, float, from_fp16, to_fp16);
    case 4: REDUCE_AS(float, float, SAME, SAME);
    case 5: REDUCE_AS(int64_t, int64_t, SAME, SAME);
    case 6: REDUCE_AS(uint64_t, uint64_t, SAME, SAME);
    case 7: REDUCE_AS(uint8_t, uint8_t, SAME, SAME);
    case 8: REDUCE_AS(uint16_t, uint16_t, SAME, SAME);
    case 9: REDUCE_AS(uint32_t, uint32_t, SAME, SAME);
    case 10: REDUCE_AS(double, double, SAME, SAME);
    case 11: REDUCE_AS(uint16_t, float, from_bf16, to_bf16);
    default: rehearsal_message("rehearsal HCCL: no reduction of HCCL data type %d", type); return HCCL_NOT_SUPPORTED;
    }
}

/* ---------------------------------------------------------------- collectives, one window at a time */

/* Put `bytes` into my window and meet the others. */
static int publish(Communicator *comm, const void *data, size_t bytes)
{
    memcpy(slot(comm, comm->rank), data, bytes);
    return barrier(comm);
}

/* Reduce `count` elements to rank `root`, or to all ranks when root is -1. */
static int reduce(Communicator *comm, const char *send, char *receive, uint64_t count, int type, int op, int root)
{
    size_t size = hccl_element_size(type);
    char *result = malloc(SLOT_BYTES); /* send and receive may be the same memory */
    int status = HCCL_OK;
    for (size_t done = 0; done < count && status == HCCL_OK;) {
        size_t piece = smaller(count - done, SLOT_BYTES / size);
        status = publish(comm, send + done * size, piece * size);
        int wanted = root < 0 || root == (int)comm->rank;
        if (status == HCCL_OK && wanted) {
            status = reduce_slots(comm, result, piece, type, op);
            memcpy(receive + done * size, result, piece * size);
        }
        if (status == HCCL_OK) {
            status = barrier(comm);
        }
        done += piece;
    }
    free(result);
    return status;
}

int HcclAllReduce(void *send, void *receive, uint64_t count, int type, int op, void *comm, void *stream)
{
    census_collective("all_reduce", type, count, ((Communicator *)comm)->size);
    return reduce(comm, send, receive, count, type, op, -1);
}

int HcclReduce(void *send, void *receive, uint64_t count, int type, int op, uint32_t root, void *comm, void *stream)
{
    census_collective("reduce", type, count, ((Communicator *)comm)->size);
    return reduce(comm, send, receive, count, type, op, (int)root);
}

int HcclReduceScatter(void *send, void *receive, uint64_t count, int type, int op, void *handle, void *stream)
{
    Communicator *comm = handle;
    size_t bytes = count * hccl_element_size(type);
    char *mine = malloc(bytes + 1); /* receive may lie inside send */
    int status = HCCL_OK;
    census_collective("reduce_scatter", type, count * comm->size, comm->size);
    for (uint32_t owner = 0; owner < comm->size && status == HCCL_OK; owner++) {
        status = reduce(comm, (char *)send + owner * bytes, mine, count, type, op, (int)owner);
    }
    memcpy(receive, mine, bytes);
    free(mine);
    return status;
}

int HcclBroadcast(void *buffer, uint64_t count, int type, uint32_t root, void *handle, void *stream)
{
    Communicator *comm = handle;
    size_t bytes = count * hccl_element_size(type);
    int status = HCCL_OK;
    census_collective("broadcast", type, count, comm->size);
    for (size_t done = 0; done < bytes && status == HCCL_OK; done += SLOT_BYTES) {
        size_t piece = smaller(bytes - done, SLOT_BYTES);
        status = publish(comm, (char *)buffer + done, comm->rank == root ? piece : 0);
        if (status == HCCL_OK) {
            memcpy((char *)buffer + done, slot(comm, root), piece);
            status = barrier(comm);
        }
    }
    return status;
}

int HcclAllGather(void *send, void *receive, uint64_t count, int type, void *handle, void *stream)
{
    Communicator *comm = handle;
    size_t bytes = count * hccl_element_size(type);
    int status = HCCL_OK;
    census_collective("all_gather", type, count, comm->size);
    for (size_t done = 0; done < bytes && status == HCCL_OK; done += SLOT_BYTES) {
        size_t piece = smaller(bytes - done, SLOT_BYTES);
        status = publish(comm, (char *)send + done, piece);
        if (status != HCCL_OK) {
            break;
        }
        for (uint32_t rank = 0; rank < comm->size; rank++) {
            memcpy((char *)receive + rank * bytes + done, slot(comm, rank), piece);
        }
        status = barrier(comm);
    }
    return status;
}

int HcclScatter(void *send, void *receive, uint64_t count, int type, uint32_t root, void *handle, void *stream)
{
    Communicator *comm = handle;
    size_t bytes = count * hccl_element_size(type);
    int status = HCCL_OK;
    census_collective("scatter", type, count, comm->size);
    for (size_t done = 0; done < bytes && status == HCCL_OK; done += SLOT_BYTES) {
        size_t piece = smaller(bytes - done, SLOT_BYTES);
        for (uint32_t rank = 0; comm->rank == root && rank < comm->size; rank++) {
            memcpy(slot(comm, rank), (char *)send + rank * bytes + done, piece);
        }
        status = barrier(comm);
        if (status == HCCL_OK) {
            memcpy((char *)receive + done, slot(comm, comm->rank), piece);
            status = barrier(comm);
        }
    }
    return status;
}
