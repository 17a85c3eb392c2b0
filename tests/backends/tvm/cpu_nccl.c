/* A libnccl.so.2 for tests: the functions that a package calls, as nccl.h declares them, for ranks of one machine whose
 * tensors are in host memory. They meet in a file of the folder that they are started in. With NCCL_FAILS=<rank> in the
 * environment, that rank cannot connect, and the others wait for it. */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, CUDA_ERROR = 1, INVALID_ARGUMENT = 4 };
enum { UINT8 = 1, FLOAT32 = 7, SUM = 0 };
enum { ROOM = 4 << 20 }; /* bytes that a rank sends at a time, at most */

typedef struct {
  char internal[128];
} UniqueId;

typedef struct {
  _Atomic int ready;
  pthread_barrier_t barrier;
  char sent[][ROOM];
} Meeting;

typedef struct {
  Meeting* meeting;
  int ranks, rank;
} Communicator;

const char* ncclGetErrorString(int result) { return result == CUDA_ERROR ? "unhandled cuda error" : "invalid argument"; }

const char* ncclGetLastError(Communicator* communicator) { return "Cuda failure 'a test's'"; }

int ncclGetUniqueId(UniqueId* id) {
  memset(id, 0, sizeof *id);
  /* After a NUL: an id is bytes, not text. */
  snprintf(id->internal + 1, sizeof id->internal - 1, "nccl-%d", getpid());
  return SUCCESS;
}

int ncclCommInitRank(Communicator** out, int ranks, UniqueId id, int rank) {
  const char* fails = getenv("NCCL_FAILS");
  if (fails && atoi(fails) == rank) return CUDA_ERROR;
  size_t size = sizeof(Meeting) + (size_t)ranks * ROOM;
  int file = open(id.internal + 1, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, size)) return INVALID_ARGUMENT;
  Meeting* meeting = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (meeting == MAP_FAILED) return INVALID_ARGUMENT;
  if (rank == 0) {
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&meeting->barrier, &shared, ranks);
    meeting->ready = 1;
  }
  while (!meeting->ready) usleep(1000);
  pthread_barrier_wait(&meeting->barrier);
  close(file);
  *out = malloc(sizeof **out);
  **out = (Communicator){meeting, ranks, rank};
  return SUCCESS;
}

static void exchange(Communicator* all, const void* send, size_t size) {
  memcpy(all->meeting->sent[all->rank], send, size);
  pthread_barrier_wait(&all->meeting->barrier);
}

int ncclAllReduce(const void* send, void* receive, size_t count, int dtype, int op, Communicator* all, void* stream) {
  if (dtype != FLOAT32 || op != SUM || count * sizeof(float) > ROOM || stream) return INVALID_ARGUMENT;
  exchange(all, send, count * sizeof(float));
  float* sum = receive;
  memset(sum, 0, count * sizeof(float));
  for (int rank = 0; rank < all->ranks; rank++)
    for (size_t i = 0; i < count; i++) sum[i] += ((float*)all->meeting->sent[rank])[i];
  pthread_barrier_wait(&all->meeting->barrier);
  return SUCCESS;
}

int ncclAllGather(const void* send, void* receive, size_t count, int dtype, Communicator* all, void* stream) {
  if (dtype != UINT8 || count > ROOM || stream) return INVALID_ARGUMENT;
  exchange(all, send, count);
  for (int rank = 0; rank < all->ranks; rank++)
    memcpy((char*)receive + rank * count, all->meeting->sent[rank], count);
  pthread_barrier_wait(&all->meeting->barrier);
  return SUCCESS;
}
