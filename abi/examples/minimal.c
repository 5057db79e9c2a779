/* minimal.c - what is the least that a sparsed plugin must do?
 *
 * A complete plugin in plain C11: host memory, the calling thread, every operator (operators.h) the naive way.  Copy
 * it, then move memory and operators to your device one by one; README.md says how to build it.  What comes from the
 * caller is checked by sparsed/kit.h and program.h before it is used.  queue_run allocates nothing.
 */
#define _POSIX_C_SOURCE 200809L /* pread, sysconf */
#include "operators.h"

#include <stdatomic.h>
#include <threads.h>
#include <unistd.h>

#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define NEW(out) SPD_CHECK(*(out) = calloc(1, sizeof **(out)), SPD_E_NOMEM_HOST, "no memory for a handle")

enum { WEIGHTS, KV, WORKSPACE, N_USES };
struct spd_instance { const spd_host *host; };
struct spd_device { uint64_t budget; _Atomic uint64_t used[N_USES]; };
struct spd_queue { spd_device *device; _Atomic uint64_t completed; };
struct spd_kvpool { spd_device *device; pool_rows rows; };
struct spd_weight { spd_device *device; matrices m; int committed; uint8_t uploaded[]; }; /* [batch] */
struct spd_plan {
  spd_device *device;
  spd_program_view program;
  spd_bucket bucket;
  spd_weight **weights;
  spd_kvpool **pools;
  spd_place *places; /* those of INPUT and OUTPUT tensors are this step's */
  float *workspace;  /* the plan's own tensors, then the scratch of an operator */
  uint64_t scratch_at, bytes;
  mtx_t running; /* two queues may run one plan */
};

/* ---- memory: weights and KV pools ---- */

static uint64_t memory_total(void) { return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE); }
static uint64_t memory_used(const spd_device *d) { return d->used[WEIGHTS] + d->used[KV] + d->used[WORKSPACE]; }

/* Zeroed memory that counts against the budget, or NULL. */
static void *hold(spd_device *d, int use, uint64_t bytes, spd_error *e) {
  uint64_t used = memory_used(d), total = memory_total(), cap = d->budget && d->budget < total ? d->budget : total;
  void *memory = used <= cap && bytes <= cap - used ? calloc(bytes ? bytes : 1, 1) : NULL;
  if (memory) d->used[use] += bytes;
  else spd_fail(e, SPD_E_NOMEM_DEVICE, "%.0f bytes more than %.0f pass %.0f", (double)bytes, (double)used, (double)cap);
  return memory;
}

static void release(spd_device *d, int use, uint64_t bytes, void *memory) {
  if (memory) d->used[use] -= bytes;
  free(memory);
}

static void weight_destroy(spd_weight *w) {
  if (w) release(w->device, WEIGHTS, w->m.bytes, w->m.data);
  free(w);
}

static spd_status weight_create(spd_device *d, const spd_weight_desc *desc, spd_weight **out, spd_error *e) {
  matrices m;
  SPD_TRY(spd_take(&m.desc, desc, sizeof m.desc, e));
  SPD_VALID(d && out && m.desc.batch && m.desc.rows && m.desc.cols, "weight: NULL, or without batch, rows or columns");
  const int known = m.desc.flags == 0 && in_set(WEIGHT_DTYPES, m.desc.dtype);
  SPD_HAVE(known, "weight: dtype %u, flags %#x", m.desc.dtype, m.desc.flags);
  m.row_bytes = spd_row_bytes(m.desc.dtype, m.desc.cols);
  SPD_VALID(m.row_bytes, "weight: a row of %llu values is not whole blocks", (unsigned long long)m.desc.cols);
  m.bytes = spd_times(spd_times(m.row_bytes, m.desc.rows), m.desc.batch);
  m.data = hold(d, WEIGHTS, m.bytes, e);
  if (!m.data) return SPD_E_NOMEM_DEVICE;
  *out = calloc(1, sizeof **out + m.desc.batch);
  if (!*out) release(d, WEIGHTS, m.bytes, m.data);
  SPD_CHECK(*out, SPD_E_NOMEM_HOST, "weight: no memory for its handle");
  (*out)->device = d, (*out)->m = m;
  return SPD_OK;
}

static spd_status weight_upload(spd_weight *w, uint32_t first, uint32_t n, const spd_source *source, spd_error *e) {
  spd_source s;
  SPD_TRY(spd_take(&s, source, sizeof s, e));
  SPD_VALID(w && !w->committed, "weight: NULL or committed");
  const uint64_t batch = w->m.desc.batch, matrix = w->m.bytes / batch;
  SPD_VALID(n && first < batch && n <= batch - first, "weight: batches %u + %u of %u", first, n, w->m.desc.batch);
  SPD_VALID(s.length == n * matrix, "weight: a source of another length than %u matrices", n);
  uint8_t *to = w->m.data + first * matrix;
  if (s.ptr) memcpy(to, s.ptr, s.length);
  for (uint64_t done = s.ptr ? s.length : 0; done < s.length;) {
    ssize_t got = pread(s.fd, to + done, s.length - done, (off_t)(s.offset + done));
    SPD_CHECK(got > 0, SPD_E_DATA, "weight: its file cannot be read or is too short");
    done += (uint64_t)got;
  }
  memset(w->uploaded + first, 1, n);
  return SPD_OK;
}

static spd_status weight_commit(spd_weight *w, spd_error *e) {
  SPD_VALID(w && !w->committed, "weight: NULL or committed");
  SPD_VALID(!memchr(w->uploaded, 0, w->m.desc.batch), "weight: a batch has not been uploaded");
  w->committed = 1;
  return SPD_OK;
}

static void kv_destroy(spd_kvpool *p) {
  if (p) release(p->device, KV, p->rows.bytes.pool, p->rows.blocks);
  free(p);
}

static spd_status kv_create(spd_device *d, const spd_kv_desc *desc, spd_kvpool **out, spd_kv_info *info, spd_error *e) {
  spd_kv_desc kv;
  spd_kv_sizes bytes;
  spd_kv_info filled;
  SPD_TRY(spd_take(&kv, desc, sizeof kv, e));
  SPD_TRY(spd_take(&filled, info, sizeof filled, e));
  SPD_VALID(d && out, "pool: NULL");
  SPD_HAVE(!kv.slow, "pool: a slow tier");
  const uint32_t dtypes[3] = {kv.latent.dtype, kv.rope.dtype, kv.index.dtype};
  for (int k = 0; k < 3; k++) SPD_HAVE(in_set(ROW_DTYPES, dtypes[k]), "pool: rows of dtype %u", dtypes[k]);
  SPD_TRY(spd_measure_kv(&bytes, &kv, e));
  uint8_t *blocks = hold(d, KV, bytes.pool, e);
  if (!blocks) return SPD_E_NOMEM_DEVICE;
  *out = calloc(1, sizeof **out);
  if (!*out) release(d, KV, bytes.pool, blocks);
  SPD_CHECK(*out, SPD_E_NOMEM_HOST, "pool: no memory for its handle");
  **out = (spd_kvpool){d, {kv, bytes, blocks}};
  filled.device_bytes = bytes.pool, filled.image_bytes = bytes.image, filled.image_latent_offset = bytes.latent_offset;
  spd_give(info, &filled, sizeof filled);
  return SPD_OK;
}

/* ---- plans ---- */

/* Whether operator k can be run, on the pool that it is bound to if there is one. */
static spd_status check_op(const spd_program_view *p, uint32_t k, spd_kvpool *const *pools, spd_error *e) {
  SPD_VALID(k < p->head.n_ops, "there is no operator %u", k);
  const spd_op *op = &p->ops[k];
  SPD_TRY(spd_check_op(p, k, pools && op->kvpool < p->head.n_kvpools ? &pools[op->kvpool]->rows.desc : NULL, e));
  for (int i = 0; i < 6; i++) {
    const spd_tensor *t = op->in[i] == SPD_NO_TENSOR ? NULL : &p->tensors[op->in[i]];
    if (t && t->kind == SPD_T_WEIGHT && !in_set(WEIGHT_DTYPES, t->dtype))
      return spd_at_op(p, k, spd_fail(e, SPD_E_UNSUPPORTED, "weights of dtype %u", t->dtype), e);
    for (int o = 0; t && o < 3; o++)
      if (op->out[o] == spd_owner(p, op->in[i]))
        return spd_at_op(p, k, spd_fail(e, SPD_E_INVALID, "writes over its own input"), e);
  }
  return SPD_OK;
}

static spd_status supports(spd_device *d, const void *blob, uint64_t length, uint32_t index, spd_error *e) {
  spd_program_view p = {0};
  SPD_VALID(d, "the device is NULL");
  spd_status status = spd_read_program(&p, blob, length, e);
  if (!status) status = check_op(&p, index, NULL, e);
  spd_free_program(&p);
  return status;
}

static void plan_destroy(spd_plan *plan) {
  if (!plan) return;
  release(plan->device, WORKSPACE, plan->bytes, plan->workspace);
  spd_free_program(&plan->program);
  free(plan->weights), free(plan->pools), free(plan->places);
  mtx_destroy(&plan->running);
  free(plan);
}

static spd_status prepare(spd_plan *plan, const spd_compile *c, spd_plan_info *info, spd_error *e) {
  const spd_program_view *p = &plan->program;
  const spd_bucket *b = &plan->bucket;
  uint64_t width = 0; /* of the widest row */
  SPD_TRY(spd_read_program(&plan->program, c->blob, c->blob_length, e));
  SPD_TRY(spd_largest_bucket(&plan->bucket, c, e));
  SPD_VALID(c->n_weights == p->head.n_weights && (c->weights || !c->n_weights), "not the weights of the program");
  SPD_VALID(c->n_kvpools == p->head.n_kvpools && (c->kvpools || !c->n_kvpools), "not the pools of the program");
  plan->weights = calloc(c->n_weights + 1ull, sizeof *plan->weights);
  plan->pools = calloc(c->n_kvpools + 1ull, sizeof *plan->pools);
  plan->places = calloc(p->head.n_tensors + 1ull, sizeof *plan->places);
  SPD_CHECK(plan->weights && plan->pools && plan->places, SPD_E_NOMEM_HOST, "no memory for a plan");
  for (uint32_t k = 0; k < c->n_weights; k++) {
    spd_weight *w = plan->weights[k] = c->weights[k];
    SPD_VALID(w && w->committed && w->device == plan->device, "weight %u is not ready on this device", k);
  }
  for (uint32_t k = 0; k < c->n_kvpools; k++) {
    spd_kvpool *pool = plan->pools[k] = c->kvpools[k];
    SPD_VALID(pool && pool->device == plan->device, "pool %u is not on this device", k);
    const spd_kv_desc *kv = &pool->rows.desc;
    width = LARGER(width, LARGER((uint64_t)kv->latent.width + kv->rope.width, kv->index.width));
  }
  for (uint32_t k = 0; k < p->head.n_tensors; k++) {
    const spd_tensor *t = &p->tensors[k];
    int fits = t->kind != SPD_T_WEIGHT || spd_is_weight_of(t, &plan->weights[t->bind]->m.desc);
    SPD_VALID(fits, "weight %u has another shape or dtype than its tensor", t->bind);
    width = LARGER(width, (uint64_t)t->dim[t->rank - 1]);
  }
  for (uint32_t k = 0; k < p->head.n_ops; k++) {
    info->unsupported_op = k;
    SPD_TRY(check_op(p, k, plan->pools, e));
  }
  info->unsupported_op = SPD_NO_OP;
  SPD_TRY(spd_place_tensors(p, b, plan->places, &plan->scratch_at, e));
  info->workspace_bytes = plan->bytes = (plan->scratch_at + SCRATCH_ROWS * width + b->max_context) * 4;
  info->in_bytes = spd_arena(p, SPD_T_INPUT, b->max_tokens, b->max_seqs, b->max_logits, NULL);
  info->out_bytes = spd_arena(p, SPD_T_OUTPUT, b->max_tokens, b->max_seqs, b->max_logits, NULL);
  SPD_VALID(info->in_bytes != UINT64_MAX && info->out_bytes != UINT64_MAX, "the arenas are too large");
  info->n_launches = p->head.n_ops;
  return SPD_OK;
}

static spd_status plan_compile(spd_device *d, const spd_compile *compile, spd_plan **out, spd_plan_info *info,
                               spd_error *e) {
  spd_compile c;
  spd_plan_info filled;
  SPD_TRY(spd_take(&c, compile, sizeof c, e));
  SPD_TRY(spd_take(&filled, info, sizeof filled, e));
  SPD_HAVE((c.flags & ~SPD_COMPILE_DRY_RUN) == 0, "compile: flags %#x", c.flags);
  SPD_VALID(d && (out || c.flags), "compile: NULL");
  spd_plan *plan = calloc(1, sizeof *plan);
  if (plan && mtx_init(&plan->running, mtx_plain) != thrd_success) free(plan), plan = NULL;
  SPD_CHECK(plan, SPD_E_NOMEM_HOST, "no memory for a plan");
  filled = (spd_plan_info){.unsupported_op = SPD_NO_OP};
  plan->device = d;
  spd_status status = prepare(plan, &c, &filled, e);
  if (!status && !c.flags && !(plan->workspace = hold(d, WORKSPACE, plan->bytes, e))) status = SPD_E_NOMEM_DEVICE;
  spd_give(info, &filled, sizeof filled);
  if (status || c.flags) plan_destroy(plan);
  else *out = plan;
  return status;
}

/* ---- queues ---- */

static spd_status queue_create(spd_device *d, uint32_t priority, uint64_t cookie, spd_queue **out, spd_error *e) {
  (void)priority, (void)cookie; /* one queue is as good as another, and nobody is notified */
  SPD_VALID(d && out, "queue: NULL");
  NEW(out);
  (*out)->device = d;
  return SPD_OK;
}

static void queue_destroy(spd_queue *q) { free(q); }

/* Where tensor `id` is in this step, with its strides. */
static tensor resolve(const spd_plan *plan, const job *j, const spd_run *run, uint32_t id) {
  if (id == SPD_NO_TENSOR) return (tensor){0};
  const spd_tensor *t = &plan->program.tensors[id];
  const uint32_t owner = spd_owner(&plan->program, id), kind = plan->program.tensors[owner].kind;
  if (kind == SPD_T_WEIGHT) return (tensor){.weight = &plan->weights[t->bind]->m};
  tensor x = {.n0 = spd_dim_rows(t->dim[0], j->step.head.n_tokens, j->step.head.n_seqs, j->step.head.n_logits)};
  const int is_view = t->kind == SPD_T_VIEW && t->stride[0] > 0, is_cube = t->rank == 3;
  x.n1 = is_cube ? (uint64_t)t->dim[1] : 1, x.n2 = (uint64_t)t->dim[t->rank - 1];
  x.s0 = is_view ? (uint64_t)t->stride[0] : x.n1 * x.n2, x.s1 = is_view && is_cube ? (uint64_t)t->stride[1] : x.n2;
  x.at = kind == SPD_T_ACTIVATION ? plan->workspace : kind == SPD_T_OUTPUT ? run->out : (float *)(uintptr_t)run->in;
  if (x.n0) x.at += plan->places[owner].at + (uint64_t)(is_view ? t->view_offset : 0);
  return x;
}

static spd_status run_operators(const spd_plan *plan, job *j, const spd_run *run) {
  const spd_program_view *p = &plan->program;
  spd_error *e = j->e;
  for (uint32_t k = 0; k < p->head.n_ops; k++) {
    if (run->cancel && __atomic_load_n(run->cancel, __ATOMIC_RELAXED))
      return spd_at_op(p, k, spd_fail(e, SPD_E_CANCELLED, "cancelled before it"), e);
    j->op = &p->ops[k];
    j->pool = p->head.n_kvpools ? &plan->pools[j->op->kvpool]->rows : NULL;
    for (int i = 0; i < 6; i++) j->in[i] = resolve(plan, j, run, j->op->in[i]);
    for (int i = 0; i < 3; i++) j->out[i] = resolve(plan, j, run, j->op->out[i]);
    RUN[j->op->kind](j);
    if (j->status) return spd_at_op(p, k, j->status, e);
  }
  for (uint32_t id = 0; id < p->head.n_tensors && j->step.head.flags & SPD_STEP_NAN_GUARD; id++) {
    if (p->tensors[id].kind != SPD_T_OUTPUT || p->tensors[id].dtype != SPD_DT_F32) continue;
    const tensor x = resolve(plan, j, run, id);
    EACH_ROW(&x) for (uint64_t c = 0; c < x.n2; c++)
      SPD_CHECK(!isnan(row(&x, i, h)[c]), SPD_E_DATA, "a NaN in output tensor %u", id);
  }
  return SPD_OK;
}

static int is_arena(const void *at, uint64_t length, uint64_t needed) {
  return needed == 0 || (at && (uintptr_t)at % 4 == 0 && length >= needed);
}

static spd_status queue_run(spd_queue *q, spd_plan *plan, const spd_run *run, uint64_t *timeline, spd_error *e) {
  spd_run r;
  job j = {.e = e};
  SPD_TRY(spd_take(&r, run, sizeof r, e));
  SPD_VALID(q && plan && timeline && q->device == plan->device, "run: NULL, or a plan of another device");
  SPD_HAVE(r.flags == 0, "run: flags %#x", r.flags);
  SPD_TRY(spd_read_step(&j.step, r.step, &plan->bucket, e));
  const spd_step *s = &j.step.head;
  SPD_HAVE((s->flags & SPD_STEP_PROFILE) == 0, "step: profiles");
  for (uint32_t k = 0; k < plan->program.head.n_kvpools; k++)
    SPD_TRY(spd_check_blocks(&j.step, &plan->pools[k]->rows.desc, e));
  mtx_lock(&plan->running);
  uint64_t in = spd_arena(&plan->program, SPD_T_INPUT, s->n_tokens, s->n_seqs, s->n_logits, plan->places);
  uint64_t out = spd_arena(&plan->program, SPD_T_OUTPUT, s->n_tokens, s->n_seqs, s->n_logits, plan->places);
  spd_status status;
  j.scratch = plan->workspace + plan->scratch_at;
  if (is_arena(r.in, r.in_length, in) && is_arena(r.out, r.out_length, out)) status = run_operators(plan, &j, &r);
  else status = spd_fail(e, SPD_E_INVALID, "run: no aligned arenas of %.0f and %.0f bytes", (double)in, (double)out);
  mtx_unlock(&plan->running);
  if (!status) *timeline = ++q->completed;
  return status;
}

static spd_status queue_kv(spd_queue *q, spd_kvpool *p, const spd_kv_op *ops, uint32_t n_ops, uint32_t stride,
                           void *host, uint64_t host_length, uint64_t *timeline, spd_error *e) {
  SPD_VALID(q && p && timeline && q->device == p->device, "KV operations: NULL, or a pool of another device");
  for (int pass = 0; pass < 2; pass++) /* nothing is done before all has been checked */
    for (uint32_t k = 0; k < n_ops; k++) {
      spd_kv_op op;
      SPD_TRY(spd_read_kv_op(&op, ops, stride, k, &p->rows.desc, p->rows.bytes.image, host, host_length, e));
      if (pass == 1) apply_kv_op(&p->rows, &op, host);
    }
  *timeline = ++q->completed;
  return SPD_OK;
}

/* Work is done when its call returns, so a value that was given has completed. */
static spd_status queue_wait(spd_queue *q, uint64_t timeline, uint64_t timeout_ns, spd_error *e) {
  (void)timeout_ns;
  SPD_VALID(q && timeline <= q->completed, "wait: NULL, or a value that was never given");
  return SPD_OK;
}

static spd_status queue_wait_queue(spd_queue *q, spd_queue *other, uint64_t timeline, spd_error *e) {
  return q ? queue_wait(other, timeline, 0, e) : spd_fail(e, SPD_E_INVALID, "wait: NULL");
}

static spd_status queue_query(spd_queue *q, uint64_t *completed, spd_error *e) {
  SPD_VALID(q && completed, "query: NULL");
  *completed = q->completed;
  return SPD_OK;
}

static spd_status queue_cancel(spd_queue *q, uint64_t from_timeline, spd_error *e) {
  (void)from_timeline; /* nothing waits; a running step looks at spd_run.cancel */
  SPD_VALID(q, "cancel: NULL");
  return SPD_OK;
}

/* ---- the instance and its device ---- */

static spd_status instance_create(const spd_host *host, spd_instance **out, spd_error *e) {
  SPD_VALID(out, "instance: NULL");
  NEW(out);
  (*out)->host = host;
  return SPD_OK;
}

static void instance_destroy(spd_instance *instance) { free(instance); }

static spd_status device_count(spd_instance *instance, uint32_t *out, spd_error *e) {
  SPD_VALID(instance && out, "device_count: NULL");
  *out = 1;
  return SPD_OK;
}

static spd_status device_info(spd_instance *instance, uint32_t index, spd_device_info *out, spd_error *e) {
  spd_device_info info;
  SPD_TRY(spd_take(&info, out, sizeof info, e));
  SPD_VALID(instance && index == 0, "there is no device %u", index);
  info = (spd_device_info){
      .kind = SPD_DEV_CPU, .id = "minimal", .name = "one thread of the host", .driver = "C", .score = 1,
      .numa_node = UINT32_MAX, .mem_total = memory_total(),
      .features = SPD_FEAT_UNIFIED_MEM | SPD_FEAT_CANCEL_MID | SPD_FEAT_DETERMINISTIC | SPD_FEAT_INVARIANT,
      .weight_dtypes = {WEIGHT_DTYPES}, .row_dtypes = {ROW_DTYPES}, .block_tokens_align = 1};
  spd_give(out, &info, sizeof info);
  return SPD_OK;
}

static spd_status device_open(spd_instance *instance, uint32_t index, const spd_open_options *options, spd_device **out,
                              spd_error *e) {
  spd_open_options o;
  SPD_TRY(spd_take(&o, options, sizeof o, e));
  SPD_VALID(instance && out && index == 0, "there is no device %u", index);
  SPD_HAVE(o.flags == 0, "open: flags %#x", o.flags);
  NEW(out);
  (*out)->budget = o.mem_budget;
  return SPD_OK;
}

static void device_close(spd_device *d) { free(d); }

static spd_status self_test(spd_device *d, uint32_t level, spd_error *e) {
  float x[32], y[32];
  uint8_t block[34];
  (void)level;
  SPD_VALID(d, "self_test: NULL");
  for (int k = 0; k < 32; k++) x[k] = (float)(k - 13);
  encode(SPD_DT_Q8_0, x, 32, block);
  decode(SPD_DT_Q8_0, block, 32, y);
  SPD_CHECK(fabs(dot(x, y, 32) - 2928) < 20, SPD_E_DATA, "a product is %g, not 2928", dot(x, y, 32));
  return SPD_OK;
}

static spd_status mem_info(spd_device *d, spd_mem_info *out, spd_error *e) {
  spd_mem_info info;
  SPD_TRY(spd_take(&info, out, sizeof info, e));
  SPD_VALID(d, "mem_info: NULL");
  info = (spd_mem_info){.total = memory_total(), .free = memory_total() - memory_used(d), .budget = d->budget,
                        .used_weights = d->used[WEIGHTS], .used_kv = d->used[KV], .used_workspace = d->used[WORKSPACE]};
  spd_give(out, &info, sizeof info);
  return SPD_OK;
}

static spd_status health(spd_device *d, spd_health *out, spd_error *e) {
  spd_health now;
  SPD_TRY(spd_take(&now, out, sizeof now, e));
  SPD_VALID(d, "health: NULL");
  now = (spd_health){.temperature_millicelsius = INT32_MIN, .power_milliwatt = INT32_MIN};
  spd_give(out, &now, sizeof now);
  return SPD_OK;
}

static spd_status host_alloc(spd_device *d, uint64_t length, uint64_t align, void **out, spd_error *e) {
  SPD_VALID(d && out && (align & (align - 1)) == 0 && align <= 1u << 21, "host_alloc: NULL, or an alignment");
  uint64_t unit = align < 64 ? 64 : align;
  *out = length <= memory_total() ? aligned_alloc(unit, (length / unit + 1) * unit) : NULL;
  SPD_CHECK(*out, SPD_E_NOMEM_HOST, "host_alloc: %llu bytes", (unsigned long long)length);
  memset(*out, 0, length);
  return SPD_OK;
}

static spd_status host_register(spd_device *d, void *memory, uint64_t length, spd_error *e) {
  (void)d, (void)memory, (void)length;
  return spd_fail(e, SPD_E_UNSUPPORTED, "host_register: the host's memory is read as it is");
}

static void host_unregister(spd_device *d, void *memory) { (void)d, (void)memory; }
static void host_free(spd_device *d, void *memory) { (void)d, free(memory); }

static const void *extension(spd_instance *instance, const char *id) { return (void)instance, (void)id, NULL; }

static const spd_api API = {
  .struct_size = sizeof(spd_api), .abi_minor = SPD_ABI_MINOR, .layout = SPD_LAYOUT, .plugin_id = "minimal",
  .plugin_version = PLUGIN_VERSION, .instance_create = instance_create, .instance_destroy = instance_destroy,
  .device_count = device_count, .device_info = device_info, .device_open = device_open, .device_close = device_close,
  .self_test = self_test, .mem_info = mem_info, .health = health, .supports = supports, .host_alloc = host_alloc,
  .host_free = host_free, .host_register = host_register, .host_unregister = host_unregister,
  .weight_create = weight_create, .weight_upload = weight_upload, .weight_commit = weight_commit,
  .weight_destroy = weight_destroy, .kv_create = kv_create, .kv_destroy = kv_destroy, .plan_compile = plan_compile,
  .plan_destroy = plan_destroy, .queue_create = queue_create, .queue_destroy = queue_destroy, .queue_run = queue_run,
  .queue_kv = queue_kv, .queue_wait_queue = queue_wait_queue, .queue_query = queue_query, .queue_wait = queue_wait,
  .queue_cancel = queue_cancel, .extension = extension,
};

const spd_api *spd_get_api(uint32_t abi_major, uint32_t host_minor) {
  (void)host_minor;
  return abi_major == SPD_ABI_MAJOR ? &API : NULL;
}
