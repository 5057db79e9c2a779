/* A plugin for the tests of plugin hosts: it tries what it must not do and says how that went; its steps do what the
 * first byte of their input asks for.  Not an example: see abi/examples. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sparsed/plugin.h"

static int object; /* what every handle points to: this plugin keeps nothing */
static const volatile uint8_t *weight;
static uint64_t weight_length;

static spd_status fail(spd_error *error, spd_status status, const char *text) {
  if (error) {
    error->status = status;
    snprintf(error->message, sizeof error->message, "%s", text);
  }
  return status;
}

/* One line to the daemon's log: what was tried, and how it ended. */
static void say(const spd_host *host, const char *what, int result) {
  char line[256];
  int length = snprintf(line, sizeof line, "tried %s: %s", what, result >= 0 ? "done" : strerror(errno));
  host->log(host->context, SPD_LOG_INFO, "probe", line, (uint64_t)length);
}

static int fork_and_go_on(void) {
  pid_t child = fork();
  if (child == 0) for (;;) pause();
  return child;
}
static void *no_work(void *nothing) { return nothing; }

static void escape(const spd_host *host, const char *outside) {
  char *const argv[] = {"/bin/true", NULL};
  say(host, "open-outside", open(outside, O_RDONLY));
  say(host, "write-outside", open(outside, O_WRONLY));
  say(host, "open-usr", open("/usr", O_RDONLY | O_DIRECTORY));
  say(host, "inet", socket(AF_INET, SOCK_STREAM, 0));
  say(host, "inet6", socket(AF_INET6, SOCK_DGRAM, 0));
  say(host, "packet", socket(AF_PACKET, SOCK_RAW, 0));
  say(host, "unix", socket(AF_UNIX, SOCK_STREAM, 0));
  say(host, "kill-parent", kill(getppid(), SIGUSR1));
  say(host, "open-etc", open("/etc/hosts", O_RDONLY));
  say(host, "open-loader-cache", open("/etc/ld.so.cache", O_RDONLY));
  say(host, "fork", fork_and_go_on());
  say(host, "clone", (int)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
  say(host, "setsid", (int)setsid());
  pthread_t thread;
  errno = pthread_create(&thread, NULL, no_work, NULL);
  say(host, "thread", errno ? -1 : pthread_join(thread, NULL));
  say(host, "execve", execve(argv[0], argv, argv + 1));
}

static spd_status instance_create(const spd_host *host, spd_instance **out, spd_error *error) {
  const char *outside = host->config(host->context, "outside");
  if (host->config(host->context, "refuse")) return fail(error, SPD_E_DRIVER, "told to refuse");
  if (host->config(host->context, "linger")) for (;;) pause();
  printf("said on stdout\n");
  fflush(stdout);
  fprintf(stderr, "said on stderr\n");
  if (outside) escape(host, outside);
  if (host->config(host->context, "flood")) for (int i = 1; i <= 20000; i++) fprintf(stderr, "water %d\n", i);
  *out = (spd_instance *)&object;
  return SPD_OK;
}
static void instance_destroy(spd_instance *instance) { (void)instance; }

static spd_status device_count(spd_instance *instance, uint32_t *count, spd_error *error) {
  (void)instance, (void)error;
  *count = 1;
  return SPD_OK;
}
static spd_status device_info(spd_instance *instance, uint32_t index, spd_device_info *info, spd_error *error) {
  (void)instance, (void)index, (void)error;
  uint32_t size = info->struct_size;
  memset(info, 0, size);
  info->struct_size = size;
  info->kind = SPD_DEV_NPU;
  snprintf(info->name, sizeof info->name, "probe");
  snprintf(info->driver, sizeof info->driver, "1.0\033[2J\nerased");
  info->features = SPD_FEAT_HOST_WEIGHTS | SPD_FEAT_ASYNC | SPD_FEAT_DETERMINISTIC;
  return SPD_OK;
}
static spd_status device_open(spd_instance *i, uint32_t n, const spd_open_options *o, spd_device **out, spd_error *e) {
  (void)i, (void)n, (void)o, (void)e;
  *out = (spd_device *)&object;
  return SPD_OK;
}
static void device_close(spd_device *device) { (void)device; }
static spd_status self_test(spd_device *device, uint32_t level, spd_error *error) {
  (void)device;
  return level ? fail(error, SPD_E_DATA, "level 1 always fails here") : SPD_OK;
}
static spd_status mem_info(spd_device *device, spd_mem_info *info, spd_error *error) {
  (void)device, (void)error;
  info->total = 1000;
  info->free = 600;
  info->used_weights = weight_length;
  return SPD_OK;
}
static spd_status health(spd_device *device, spd_health *health, spd_error *error) {
  (void)device, (void)error;
  health->state = SPD_HEALTH_DEGRADED;
  return SPD_OK;
}
static spd_status supports(spd_device *device, const void *blob, uint64_t length, uint32_t op, spd_error *error) {
  (void)device, (void)blob;
  if (error) error->op_index = op;
  return length > 0 && op == 0 ? SPD_OK : fail(error, SPD_E_UNSUPPORTED, "only operator 0");
}

static spd_status host_alloc(spd_device *device, uint64_t length, uint64_t align, void **out, spd_error *error) {
  (void)device, (void)error;
  *out = aligned_alloc(align, length);
  return *out ? SPD_OK : SPD_E_NOMEM_HOST;
}
static void host_free(spd_device *device, void *memory) { (void)device, free(memory); }
static spd_status host_register(spd_device *device, void *memory, uint64_t length, spd_error *error) {
  (void)device, (void)memory, (void)length;
  return fail(error, SPD_E_UNSUPPORTED, "host_register");
}
static void host_unregister(spd_device *device, void *memory) { (void)device, (void)memory; }

static spd_status weight_create(spd_device *device, const spd_weight_desc *desc, spd_weight **out, spd_error *error) {
  (void)device;
  if (!(desc->flags & SPD_W_HOST_IN_PLACE)) return fail(error, SPD_E_INVALID, "the host did not offer its memory");
  *out = (spd_weight *)&object;
  return SPD_OK;
}
/* Reads every page, as a device that works in place would. */
static spd_status weight_upload(spd_weight *w, uint32_t first, uint32_t n, const spd_source *source, spd_error *error) {
  (void)w, (void)first, (void)n, (void)error;
  weight = source->ptr;
  weight_length = source->length;
  for (uint64_t i = 0; i < weight_length; i += 4096) (void)weight[i];
  return SPD_OK;
}
static spd_status weight_commit(spd_weight *w, spd_error *error) {
  (void)w, (void)error;
  return SPD_OK;
}
static void weight_destroy(spd_weight *w) { (void)w; }

static spd_status kv_create(spd_device *d, const spd_kv_desc *desc, spd_kvpool **out, spd_kv_info *i, spd_error *e) {
  (void)d, (void)desc, (void)out, (void)i;
  return fail(e, SPD_E_UNSUPPORTED, "pools");
}
static void kv_destroy(spd_kvpool *pool) { (void)pool; }

static spd_status plan_compile(spd_device *d, const spd_compile *c, spd_plan **out, spd_plan_info *i, spd_error *e) {
  (void)d, (void)c, (void)e;
  i->in_bytes = i->out_bytes = 64;
  *out = (spd_plan *)&object;
  return SPD_OK;
}
static void plan_destroy(spd_plan *plan) { (void)plan; }

static spd_status queue_create(spd_device *d, uint32_t priority, uint64_t cookie, spd_queue **out, spd_error *error) {
  (void)d, (void)priority, (void)cookie, (void)error;
  *out = (spd_queue *)&object;
  return SPD_OK;
}
static void queue_destroy(spd_queue *queue) { (void)queue; }

static spd_status queue_run(spd_queue *q, spd_plan *p, const spd_run *run, uint64_t *timeline, spd_error *error) {
  (void)q, (void)p;
  const char *input = run->in;
  *timeline = 1;
  switch (run->in_length ? input[0] : 0) {
    case 'a': abort();
    case 'c': /* what a plugin can do to the host's own descriptors */
      close_range(3, ~0u, 0);
      return SPD_OK;
    case 'd': fprintf(stderr, "will not end\n"); for (;;) pause();
    case 'e': _exit(7);
    case 'f': error->op_index = 5, error->vendor_code = -719, error->block = 9; return fail(error, SPD_E_STEP, "told to fail");
    case 'w':
      while (!*(const volatile uint32_t *)run->cancel) usleep(1000);
      return fail(error, SPD_E_CANCELLED, "cancelled");
    case '+': return SPD_OK + 1;
    case 's': ((char *)run->out)[0] = weight ? (char)weight[weight_length - 1] : 0; return SPD_OK;
    default: memcpy(run->out, run->in, run->in_length < run->out_length ? run->in_length : run->out_length);
  }
  return SPD_OK;
}
static spd_status queue_kv(spd_queue *q, spd_kvpool *pool, const spd_kv_op *ops, uint32_t n, uint32_t stride, void *host,
                           uint64_t length, uint64_t *timeline, spd_error *error) {
  (void)q, (void)pool, (void)ops, (void)n, (void)stride, (void)host, (void)length, (void)timeline;
  return fail(error, SPD_E_UNSUPPORTED, "pools");
}
static spd_status queue_wait_queue(spd_queue *q, spd_queue *other, uint64_t timeline, spd_error *error) {
  (void)q, (void)other, (void)timeline, (void)error;
  return SPD_OK;
}
static spd_status queue_query(spd_queue *q, uint64_t *completed, spd_error *error) {
  (void)q, (void)error;
  *completed = 1;
  return SPD_OK;
}
static spd_status queue_wait(spd_queue *q, uint64_t timeline, uint64_t timeout_ns, spd_error *error) {
  (void)q, (void)timeline, (void)timeout_ns, (void)error;
  return SPD_OK;
}
static spd_status queue_cancel(spd_queue *q, uint64_t from, spd_error *error) {
  (void)q, (void)from, (void)error;
  return SPD_OK;
}
static const void *extension(spd_instance *instance, const char *id) {
  (void)instance, (void)id;
  return NULL;
}

static const spd_api api = {
    .struct_size = sizeof(spd_api), .abi_minor = SPD_ABI_MINOR, .layout = SPD_LAYOUT,
    .plugin_id = "probe", .plugin_version = PROBE_VERSION,
    .instance_create = instance_create, .instance_destroy = instance_destroy, .device_count = device_count,
    .device_info = device_info, .device_open = device_open, .device_close = device_close, .self_test = self_test,
    .mem_info = mem_info, .health = health, .supports = supports, .host_alloc = host_alloc, .host_free = host_free,
    .host_register = host_register, .host_unregister = host_unregister, .weight_create = weight_create,
    .weight_upload = weight_upload, .weight_commit = weight_commit, .weight_destroy = weight_destroy,
    .kv_create = kv_create, .kv_destroy = kv_destroy, .plan_compile = plan_compile, .plan_destroy = plan_destroy,
    .queue_create = queue_create, .queue_destroy = queue_destroy, .queue_run = queue_run, .queue_kv = queue_kv,
    .queue_wait_queue = queue_wait_queue, .queue_query = queue_query, .queue_wait = queue_wait,
    .queue_cancel = queue_cancel, .extension = extension,
};

const spd_api *spd_get_api(uint32_t abi_major, uint32_t host_minor) {
  (void)host_minor;
  return abi_major == SPD_ABI_MAJOR ? &api : NULL;
}
