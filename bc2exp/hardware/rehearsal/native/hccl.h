/* What the three files of HCCL on one machine share: the segment, the communicator, waiting. */
#ifndef REHEARSAL_HCCL_H
#define REHEARSAL_HCCL_H

#include "rehearsal.h"

#include <stdatomic.h>
#include <sys/types.h>

enum { /* HCCL result codes */
    HCCL_OK = 0,
    HCCL_MEMORY = 3,
    HCCL_NOT_SUPPORTED = 5,
    HCCL_SYSTEM_CALL = 8,
    HCCL_TIMEOUT = 9,
    HCCL_REMOTE = 21,
};

enum { SUM, PRODUCT, MAXIMUM, MINIMUM };
enum { SEND, RECEIVE };

#define SLOT_BYTES (1u << 20)    /* each rank's window for collectives */
#define MAILBOX_BYTES (1u << 20) /* each ordered pair's window for sends; a message up to this size is buffered */
#define MAX_RANKS 64

typedef struct {
    uint64_t nonce;
    atomic_uint arrived;                 /* ranks inside the current barrier */
    atomic_uint generation;              /* barriers completed; a futex */
    atomic_int process[MAX_RANKS];       /* process id, once the rank holds its lock */
    atomic_uint events[MAX_RANKS];       /* counts mailbox changes that concern a rank; a futex */
    atomic_uint filled[MAX_RANKS][MAX_RANKS]; /* bytes in the mailbox from a rank to a rank, plus one */
} Segment;

typedef struct {
    pid_t process;
    int file;
    uint64_t nonce;
} RootInfo; /* the start of HCCL's opaque 4108 bytes */

#define ROOT_INFO_BYTES 4108

typedef struct {
    Segment *segment;
    char *slots;
    char *mailboxes;
    size_t bytes;
    int file;
    int failed;        /* the first error: a communicator does not recover */
    char reason[256];  /* and its message */
    uint32_t rank;
    uint32_t size;
    double patience; /* seconds */
    char name[64];
} Communicator;

HIDDEN char *slot(Communicator *comm, uint32_t rank);
HIDDEN size_t smaller(size_t a, size_t b);

/* Bytes of an element of an HCCL data type, 0 for an unknown one. */
HIDDEN size_t hccl_element_size(int type);

/* Seconds of a clock that only goes forward. */
HIDDEN double now(void);
HIDDEN void wake_all(atomic_uint *word);
HIDDEN void sleep_while_equal(atomic_uint *word, unsigned seen);

/* Whether the process of a rank that had joined has ended. */
HIDDEN int is_gone(Communicator *comm, uint32_t rank);

/* Make the communicator's failure the message of the next error, and return its code. */
HIDDEN int report_failure(Communicator *comm);
HIDDEN int fail_gone(Communicator *comm, uint32_t rank);
HIDDEN int fail_late(Communicator *comm);

/* Wait until every rank has arrived. */
HIDDEN int barrier(Communicator *comm);

#endif
