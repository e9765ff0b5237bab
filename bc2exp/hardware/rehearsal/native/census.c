/* What was asked of the devices, counted: collectives by type and size, and refused runtime calls. */
#include "rehearsal.h"

#include <pthread.h>

#define MAX_ENTRIES 8192 /* a run has a few dozen */
#define REFUSAL (-1)

typedef struct {
    const char *name; /* a literal: compared by address */
    int type;
    uint32_t ranks;
    uint64_t elements;
    uint64_t calls;
} Entry;

static Entry entries[MAX_ENTRIES];
static int used;
static uint64_t lost;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void count(const char *name, int type, uint64_t elements, uint32_t ranks)
{
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < used && (entries[i].name != name || entries[i].type != type || entries[i].elements != elements ||
                        entries[i].ranks != ranks)) {
        i++;
    }
    if (i == used && used < MAX_ENTRIES) {
        entries[used++] = (Entry){name, type, ranks, elements, 0};
    }
    if (i < MAX_ENTRIES) {
        entries[i].calls++;
    } else {
        lost++;
    }
    pthread_mutex_unlock(&lock);
}

void census_collective(const char *name, int type, uint64_t elements, uint32_t ranks)
{
    count(name, type, elements, ranks);
}

void census_refusal(const char *name) { count(name, REFUSAL, 0, 0); }

/* Entries so far; they are read one by one, and a name of type -1 is a refused runtime call. */
int rehearsal_census_entries(void) { return used; }

/* Calls that found no room in the table. */
uint64_t rehearsal_census_lost(void) { return lost; }

void rehearsal_census_entry(int i, const char **name, int *type, uint64_t *elements, uint32_t *ranks, uint64_t *calls)
{
    pthread_mutex_lock(&lock);
    *name = entries[i].name;
    *type = entries[i].type;
    *elements = entries[i].elements;
    *ranks = entries[i].ranks;
    *calls = entries[i].calls;
    pthread_mutex_unlock(&lock);
}
