/* What does a wake-up of another process cost here, with nothing to do in it?  The floor under a step through a plugin
 * host (RESULTS.md).  Two processes, a counter each way in shared memory, and a doorbell each way: eventfd with poll, or
 * a futex.
 *
 * cc -O2 tests/bench/round_trip.c -o /tmp/round_trip && /tmp/round_trip
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 20000 };

typedef struct {
  _Alignas(64) atomic_uint count;
  int eventfd;
} bell;

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void ring(bell *b, unsigned count, int is_futex) {
  atomic_store_explicit(&b->count, count, memory_order_release);
  uint64_t one = 1;
  if (is_futex) syscall(SYS_futex, &b->count, FUTEX_WAKE, 1, NULL, NULL, 0);
  else if (write(b->eventfd, &one, sizeof one) < 0) abort();
}

/* Looks for `spin_us` before it sleeps; between looks it may offer its processor to others. */
static void await(bell *b, unsigned old, int is_futex, double spin_us, int yields) {
  double began = now_us();
  for (;;) {
    if (atomic_load_explicit(&b->count, memory_order_acquire) != old) return;
    if (now_us() - began < spin_us) {
      if (yields) sched_yield();
      continue;
    }
    struct pollfd rung = {.fd = b->eventfd, .events = POLLIN};
    uint64_t read_away;
    if (is_futex) syscall(SYS_futex, &b->count, FUTEX_WAIT, old, NULL, NULL, 0);
    else if (poll(&rung, 1, -1) < 0 || read(b->eventfd, &read_away, sizeof read_away) < 0) continue;
  }
}

static void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  if (sched_setaffinity(0, sizeof set, &set)) perror("sched_setaffinity");
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void measure(int is_futex, double spin_us, int yields, int is_pinned) {
  bell *bells = mmap(NULL, 2 * sizeof *bells, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  static double took[ROUNDS];
  if (bells == MAP_FAILED) abort();
  for (int i = 0; i < 2; i++) bells[i].eventfd = eventfd(0, EFD_NONBLOCK);
  pid_t other = fork();
  if (other < 0) abort();
  if (is_pinned) pin(other ? 0 : 1);
  if (!other)
    for (unsigned i = 0;; i++) await(&bells[0], i, is_futex, spin_us, yields), ring(&bells[1], i + 1, is_futex);
  for (unsigned i = 0; i < ROUNDS; i++) {
    double began = now_us();
    ring(&bells[0], i + 1, is_futex), await(&bells[1], i, is_futex, spin_us, yields);
    took[i] = now_us() - began;
  }
  kill(other, SIGKILL), waitpid(other, NULL, 0);
  qsort(took, ROUNDS, sizeof *took, by_size);
  printf("%s, looks for %3.0f us%s%s: p50 %.1f us, p10 %.1f, p90 %.1f\n", is_futex ? "futex  " : "eventfd", spin_us,
         yields ? ", yielding" : "",
         is_pinned ? ", pinned apart" : "", took[ROUNDS / 2], took[ROUNDS / 10], took[ROUNDS * 9 / 10]);
}

int main(void) {
  const double looks[] = {0, 5, 20};
  for (int is_futex = 0; is_futex < 2; is_futex++)
    for (int i = 0; i < 3; i++) measure(is_futex, looks[i], 0, 0);
  measure(1, 20, 0, 1);
  measure(0, 500, 1, 0);
  return 0;
}
