/* HCCL sends, receives and all-to-all, through a mailbox for each ordered pair of ranks. */
#define _GNU_SOURCE
#include "hccl.h"

#include <stdlib.h>
#include <string.h>

static char *mailbox(Communicator *comm, uint32_t from, uint32_t to)
{
    return comm->mailboxes + ((size_t)from * comm->size + to) * MAILBOX_BYTES;
}
/* ---------------------------------------------------------------- sends and receives through mailboxes */

typedef struct {
    int direction;
    void *buffer;
    uint64_t count;
    int type;
    uint32_t peer;
} SendRecvItem; /* HCCL's own layout */

typedef struct {
    size_t moved;
    int finished;
} Progress;

/* An earlier unfinished transfer in the same direction with the same peer goes first. */
static int must_wait(const SendRecvItem *items, const Progress *progress, uint32_t index)
{
    for (uint32_t earlier = 0; earlier < index; earlier++) {
        if (!progress[earlier].finished && items[earlier].direction == items[index].direction &&
            items[earlier].peer == items[index].peer) {
            return 1;
        }
    }
    return 0;
}

/* Move one mailbox's worth of one transfer, if the mailbox is ready for it. */
static int advance(Communicator *comm, const SendRecvItem *item, Progress *progress)
{
    int sending = item->direction == SEND;
    uint32_t from = sending ? comm->rank : item->peer;
    uint32_t to = sending ? item->peer : comm->rank;
    atomic_uint *filled = &comm->segment->filled[from][to];
    unsigned held = atomic_load(filled);
    if (sending == (held != 0)) {
        return 0;
    }
    size_t total = item->count * hccl_element_size(item->type);
    size_t piece = smaller(total - progress->moved, MAILBOX_BYTES);
    char *mine = (char *)item->buffer + progress->moved;
    if (sending) {
        memcpy(mailbox(comm, from, to), mine, piece);
        atomic_store(filled, (unsigned)piece + 1);
    } else {
        memcpy(mine, mailbox(comm, from, to), smaller(piece, held - 1));
        atomic_store(filled, 0);
    }
    progress->moved += piece;
    progress->finished = progress->moved >= total;
    atomic_fetch_add(&comm->segment->events[item->peer], 1);
    wake_all(&comm->segment->events[item->peer]);
    return 1;
}

static int transfer(Communicator *comm, const SendRecvItem *items, uint32_t count)
{
    atomic_uint *events = &comm->segment->events[comm->rank];
    Progress *progress = calloc(count, sizeof *progress);
    double deadline = now() + comm->patience;
    uint32_t finished = 0;
    int status = comm->failed ? report_failure(comm) : HCCL_OK;
    int gone = -1;
    while (finished < count && status == HCCL_OK) {
        unsigned seen = atomic_load(events);
        int moved = 0;
        for (uint32_t i = 0; i < count; i++) {
            if (!progress[i].finished && !must_wait(items, progress, i)) {
                moved += advance(comm, &items[i], &progress[i]);
                finished += progress[i].finished;
            }
        }
        if (moved || finished == count) {
            continue;
        }
        if (gone >= 0) {
            status = fail_gone(comm, gone);
        } else if (now() > deadline) {
            status = fail_late(comm);
        } else {
            sleep_while_equal(events, seen);
        }
        for (uint32_t i = 0; i < count; i++) {
            gone = !progress[i].finished && is_gone(comm, items[i].peer) ? (int)items[i].peer : gone;
        }
    }
    free(progress);
    return status;
}

int HcclBatchSendRecv(SendRecvItem *items, uint32_t count, void *handle, void *stream)
{
    Communicator *comm = handle;
    for (uint32_t i = 0; i < count; i++) {
        census_collective(items[i].direction == SEND ? "send" : "recv", items[i].type, items[i].count, comm->size);
    }
    return transfer(comm, items, count);
}

int HcclSend(void *buffer, uint64_t count, int type, uint32_t peer, void *comm, void *stream)
{
    SendRecvItem item = {SEND, buffer, count, type, peer};
    return HcclBatchSendRecv(&item, 1, comm, stream);
}

int HcclRecv(void *buffer, uint64_t count, int type, uint32_t peer, void *comm, void *stream)
{
    SendRecvItem item = {RECEIVE, buffer, count, type, peer};
    return HcclBatchSendRecv(&item, 1, comm, stream);
}

int HcclAlltoAllV(const void *send, const uint64_t *send_counts, const uint64_t *send_starts, int send_type,
                  void *receive, const uint64_t *receive_counts, const uint64_t *receive_starts, int receive_type,
                  void *handle, void *stream)
{
    Communicator *comm = handle;
    size_t out = hccl_element_size(send_type);
    size_t in = hccl_element_size(receive_type);
    uint64_t given = 0;
    SendRecvItem items[2 * MAX_RANKS];
    uint32_t count = 0;
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        given += send_counts[peer];
        char *from = (char *)send + send_starts[peer] * out;
        char *to = (char *)receive + receive_starts[peer] * in;
        items[count++] = (SendRecvItem){SEND, from, send_counts[peer], send_type, peer};
        items[count++] = (SendRecvItem){RECEIVE, to, receive_counts[peer], receive_type, peer};
    }
    census_collective("all_to_all", send_type, given, comm->size);
    return transfer(comm, items, count);
}

int HcclAlltoAll(const void *send, uint64_t send_count, int send_type, void *receive, uint64_t receive_count,
                 int receive_type, void *handle, void *stream)
{
    Communicator *comm = handle;
    uint64_t send_counts[MAX_RANKS], send_starts[MAX_RANKS], receive_counts[MAX_RANKS], receive_starts[MAX_RANKS];
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        send_counts[peer] = send_count;
        send_starts[peer] = send_count * peer;
        receive_counts[peer] = receive_count;
        receive_starts[peer] = receive_count * peer;
    }
    return HcclAlltoAllV(send, send_counts, send_starts, send_type, receive, receive_counts, receive_starts,
                         receive_type, handle, stream);
}
