/* newer.c - does a plugin of the frozen minor run under a daemon that has grown?
 *
 * Wraps the plugin named by SPARSED_WRAPPED and hands it everything as a later minor would: structs with a field more,
 * arrays and tables with a longer stride, longer headers of programs and steps, a longer table of the host's, and, before
 * each plan, a program with an operator that it cannot know.  Knows no struct but by its size: what is longer is copied,
 * and what the plugin wrote is copied back.  What is malformed is passed on as it is, for the plugin to refuse.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <sparsed/plugin.h>
#include <stdlib.h>
#include <string.h>

enum { MORE = 16, ROOM = 1024 };
#define OP_APPENDED 20u

static const spd_api *real;
static spd_api api;

typedef struct { _Alignas(16) uint8_t bytes[ROOM + MORE]; } longer;

/* `from` with MORE bytes that are zero, in `to`; `from` itself where its size cannot be. */
static void *grown(longer *to, const void *from) {
  uint32_t size = from ? *(const uint32_t *)from : 0;
  if (size < 8 || size > ROOM) return (void *)(uintptr_t)from;
  memset(to, 0, sizeof *to);
  memcpy(to, from, size);
  size += MORE;
  memcpy(to, &size, 4);
  return to;
}

/* What the plugin wrote goes back; nothing may have been written behind the `known` bytes that it can know. */
static void give_back(void *to, const longer *from, uint32_t known) {
  uint32_t size = *(uint32_t *)to;
  for (uint32_t k = size > known ? size : known; k < size + MORE; k++)
    if (from->bytes[k]) abort();
  memcpy((uint8_t *)to + 4, from->bytes + 4, size - 4);
}

/* `n` elements with MORE zeros behind each; NULL without memory. */
static void *restrided(const void *from, uint64_t n, uint32_t stride) {
  uint8_t *to = calloc(n + 1, stride + MORE);
  for (uint64_t k = 0; to && k < n; k++) memcpy(to + k * (stride + MORE), (const uint8_t *)from + k * stride, stride);
  return to;
}

/* A program with longer header, tensors and operators, its length in `length`; NULL for one not built like ours. */
static void *grown_program(const void *blob, uint64_t *length) {
  spd_program h;
  if (!blob || *length < sizeof h || *length > 1u << 24) return NULL;
  memcpy(&h, blob, sizeof h);
  const uint64_t tensors = (uint64_t)h.n_tensors * h.tensor_stride, ops = (uint64_t)h.n_ops * h.op_stride;
  if (h.magic != SPD_PROGRAM_MAGIC || h.struct_size != sizeof h || h.total_size != *length ||
      h.tensor_stride != sizeof(spd_tensor) || h.op_stride != sizeof(spd_op) || h.tensor_offset != sizeof h ||
      h.op_offset != h.tensor_offset + tensors || h.op_offset + ops != *length)
    return NULL;
  uint64_t total = sizeof h + MORE + tensors + (uint64_t)h.n_tensors * MORE + ops + (uint64_t)h.n_ops * MORE;
  uint8_t *to = calloc(1, total);
  if (!to) return NULL;
  const uint8_t *from = blob;
  spd_program out = h;
  out.abi_minor = SPD_ABI_MINOR + 1, out.struct_size = sizeof h + MORE, out.total_size = (uint32_t)total;
  out.tensor_stride += MORE, out.op_stride += MORE, out.tensor_offset = sizeof h + MORE;
  out.op_offset = out.tensor_offset + h.n_tensors * out.tensor_stride;
  memcpy(to, &out, sizeof out);
  for (uint32_t k = 0; k < h.n_tensors; k++)
    memcpy(to + out.tensor_offset + k * out.tensor_stride, from + h.tensor_offset + k * h.tensor_stride, h.tensor_stride);
  for (uint32_t k = 0; k < h.n_ops; k++)
    memcpy(to + out.op_offset + k * out.op_stride, from + h.op_offset + k * h.op_stride, h.op_stride);
  *length = total;
  return to;
}

/* A step with a longer header; NULL for one not built like ours. */
static void *grown_step(const spd_step *s) {
  if (!s || s->struct_size != sizeof *s || s->total_size < sizeof *s || s->total_size > 1u << 26) return NULL;
  uint8_t *to = calloc(1, s->total_size + MORE);
  if (!to) return NULL;
  spd_step out = *s;
  uint32_t *offsets[] = {&out.token_offset, &out.position_offset, &out.slot_offset,     &out.seq_offset, &out.context_offset,
                         &out.block_offset, &out.block_id_offset, &out.row_offset};
  for (size_t k = 0; k < sizeof offsets / sizeof *offsets; k++) {
    if (*offsets[k] > s->total_size || *offsets[k] < sizeof *s) return free(to), NULL;
    *offsets[k] += MORE;
  }
  out.struct_size += MORE, out.total_size += MORE;
  memcpy(to, &out, sizeof out);
  memcpy(to + sizeof out + MORE, (const uint8_t *)s + sizeof *s, s->total_size - sizeof *s);
  return to;
}

#define WITH_ERROR(e, call)                        \
  longer error_;                                   \
  void *error = grown(&error_, e);                 \
  spd_status status = (call);                      \
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e); \
  return status

static spd_status instance_create(const spd_host *host, spd_instance **out, spd_error *e) {
  static longer table; /* as long as the instance; there is one host */
  memset(&table, 0xa5, sizeof table); /* functions that the plugin does not know, so does not call */
  memcpy(&table, host, host->struct_size);
  const uint32_t sizes[2] = {host->struct_size + MORE, SPD_ABI_MINOR + 1};
  memcpy(&table, sizes, sizeof sizes);
  WITH_ERROR(e, real->instance_create((const spd_host *)&table, out, error));
}

static spd_status device_info(spd_instance *i, uint32_t index, spd_device_info *out, spd_error *e) {
  longer more;
  void *info = grown(&more, out);
  longer error_;
  void *error = grown(&error_, e);
  spd_status status = real->device_info(i, index, info, error);
  if (info == (void *)&more) give_back(out, &more, sizeof *out);
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e);
  return status;
}

static spd_status device_open(spd_instance *i, uint32_t index, const spd_open_options *o, spd_device **out, spd_error *e) {
  longer more;
  WITH_ERROR(e, real->device_open(i, index, grown(&more, o), out, error));
}

static spd_status mem_info(spd_device *d, spd_mem_info *out, spd_error *e) {
  longer more;
  void *info = grown(&more, out);
  spd_status status = real->mem_info(d, info, e);
  if (info == (void *)&more) give_back(out, &more, sizeof *out);
  return status;
}

static spd_status health(spd_device *d, spd_health *out, spd_error *e) {
  longer more;
  void *info = grown(&more, out);
  spd_status status = real->health(d, info, e);
  if (info == (void *)&more) give_back(out, &more, sizeof *out);
  return status;
}

static spd_status supports(spd_device *d, const void *blob, uint64_t length, uint32_t index, spd_error *e) {
  void *program = grown_program(blob, &length);
  longer error_;
  void *error = grown(&error_, e);
  spd_status status = real->supports(d, program ? program : blob, length, index, error);
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e);
  free(program);
  return status;
}

static spd_status weight_create(spd_device *d, const spd_weight_desc *desc, spd_weight **out, spd_error *e) {
  longer more;
  WITH_ERROR(e, real->weight_create(d, grown(&more, desc), out, error));
}

static spd_status weight_upload(spd_weight *w, uint32_t first, uint32_t n, const spd_source *source, spd_error *e) {
  longer more;
  WITH_ERROR(e, real->weight_upload(w, first, n, grown(&more, source), error));
}

static spd_status kv_create(spd_device *d, const spd_kv_desc *desc, spd_kvpool **out, spd_kv_info *info, spd_error *e) {
  longer more, filled_;
  void *filled = grown(&filled_, info);
  longer error_;
  void *error = grown(&error_, e);
  spd_status status = real->kv_create(d, grown(&more, desc), out, filled, error);
  if (filled == (void *)&filled_) give_back(info, &filled_, sizeof *info);
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e);
  return status;
}

/* A plugin that takes an operator it cannot know would compute something else than its program says. */
static int refuses_what_is_new(spd_device *d, void *program, uint64_t length) {
  spd_program h;
  spd_op op;
  memcpy(&h, program, sizeof h);
  if (!h.n_ops) return 1;
  uint8_t *at = (uint8_t *)program + h.op_offset;
  memcpy(&op, at, sizeof op);
  const uint32_t kind = op.kind;
  op.kind = OP_APPENDED;
  memcpy(at, &op, sizeof op);
  spd_status status = real->supports(d, program, length, 0, NULL);
  op.kind = kind;
  memcpy(at, &op, sizeof op);
  return status != SPD_OK;
}

static spd_status plan_compile(spd_device *d, const spd_compile *c, spd_plan **out, spd_plan_info *info, spd_error *e) {
  longer more, filled_, error_;
  spd_compile *compile = grown(&more, c);
  void *filled = grown(&filled_, info), *error = grown(&error_, e), *program = NULL, *buckets = NULL;
  if (compile == (void *)&more && c->struct_size >= offsetof(spd_compile, cache_dir)) {
    uint64_t length = c->blob_length;
    program = grown_program(c->blob, &length);
    if (program && !refuses_what_is_new(d, program, length)) abort();
    if (program) compile->blob = program, compile->blob_length = length;
    if (c->buckets && c->n_buckets < 64 && c->bucket_stride == sizeof(spd_bucket))
      buckets = restrided(c->buckets, c->n_buckets, c->bucket_stride);
    if (buckets) compile->buckets = buckets, compile->bucket_stride += MORE;
  }
  spd_status status = real->plan_compile(d, compile, out, filled, error);
  if (filled == (void *)&filled_) give_back(info, &filled_, sizeof *info);
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e);
  free(program), free(buckets);
  return status;
}

static spd_status queue_run(spd_queue *q, spd_plan *p, const spd_run *r, uint64_t *timeline, spd_error *e) {
  longer more, error_;
  spd_run *run = grown(&more, r);
  void *error = grown(&error_, e), *step = NULL;
  if (run == (void *)&more && r->struct_size >= offsetof(spd_run, in) && (step = grown_step(r->step))) run->step = step;
  spd_status status = real->queue_run(q, p, run, timeline, error); /* synchronous: step and run are not kept */
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e);
  free(step);
  return status;
}

static spd_status queue_kv(spd_queue *q, spd_kvpool *p, const spd_kv_op *ops, uint32_t n, uint32_t stride, void *host,
                           uint64_t host_length, uint64_t *timeline, spd_error *e) {
  void *list = ops && n < 1u << 20 && stride >= sizeof *ops && stride < ROOM ? restrided(ops, n, stride) : NULL;
  longer error_;
  void *error = grown(&error_, e);
  spd_status status = real->queue_kv(q, p, list ? list : (void *)(uintptr_t)ops, n, list ? stride + MORE : stride, host,
                                     host_length, timeline, error);
  if (error == (void *)&error_) give_back(e, &error_, sizeof *e);
  free(list);
  return status;
}

const spd_api *spd_get_api(uint32_t abi_major, uint32_t host_minor) {
  const char *path = getenv("SPARSED_WRAPPED");
  void *library = !real && path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  spd_get_api_fn entry;
  void *symbol = library ? dlsym(library, "spd_get_api") : NULL;
  memcpy(&entry, &symbol, sizeof entry);
  if (symbol) real = entry(SPD_ABI_MAJOR, SPD_ABI_MINOR + 1);
  (void)host_minor;
  if (!real || abi_major != SPD_ABI_MAJOR || api.struct_size) return real && abi_major == SPD_ABI_MAJOR ? &api : NULL;
  api = *real;
  api.instance_create = instance_create, api.device_info = device_info, api.device_open = device_open;
  api.mem_info = mem_info, api.health = health, api.supports = supports, api.weight_create = weight_create;
  api.weight_upload = weight_upload, api.kv_create = kv_create, api.plan_compile = plan_compile;
  api.queue_run = queue_run, api.queue_kv = queue_kv;
  return &api;
}
