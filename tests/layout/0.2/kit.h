/* kit.h - how does a plugin in C or C++ keep the rules of the border?
 *
 * Optional: plugin.h is the contract, this and program.h are its checking, written once.  Errors, the rules of
 * struct_size, sizes that cannot overflow, and readers of steps and KV operations after which every number in them may
 * be used.  The Rust counterpart is plugins/kit.  Compiles as C11 and C++17.
 */
#ifndef SPARSED_KIT_H
#define SPARSED_KIT_H

#include <sparsed/plugin.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPD_NO_OP 0xffffffffu
#define SPD_STRUCT_BYTES_MAX 65536u        /* no version of a struct is larger       */
#define SPD_STEP_ROWS_MAX (1u << 20)       /* tokens, sequences or logits of a step  */

/* Return from the calling function, which has `spd_error *e`, when something does not hold or a call has failed. */
#define SPD_CHECK(holds, ...) do { if (!(holds)) return spd_fail(e, __VA_ARGS__); } while (0)
#define SPD_VALID(holds, ...) SPD_CHECK(holds, SPD_E_INVALID, __VA_ARGS__)
#define SPD_HAVE(holds, ...) SPD_CHECK(holds, SPD_E_UNSUPPORTED, __VA_ARGS__)
#define SPD_TRY(call) do { spd_status spd_status_ = (call); if (spd_status_ != SPD_OK) return spd_status_; } while (0)

/* ---- errors and structs ------------------------------------------------------------------------------------- */

/* Writes to the caller's struct what both sides know of it; its struct_size stays. */
static inline void spd_give(void *to, const void *from, uint32_t size) {
  uint32_t known = *(uint32_t *)to < size ? *(uint32_t *)to : size;
  if (known > 4) memcpy((char *)to + 4, (const char *)from + 4, known - 4);
}

/* Fills the caller's error, if there is one; the answer is `status`. */
__attribute__((format(printf, 3, 4)))
static inline spd_status spd_fail(spd_error *e, spd_status status, const char *format, ...) {
  spd_error full;
  va_list arguments;
  memset(&full, 0, sizeof full);
  full.status = status, full.op_index = SPD_NO_OP, full.block = UINT64_MAX;
  va_start(arguments, format);
  vsnprintf(full.message, sizeof full.message, format, arguments);
  va_end(arguments);
  if (e) spd_give(e, &full, sizeof full);
  return status;
}

/* Reads `known` bytes of the other side: what it does not know is zero.  Answers 0 when what we do not know is set. */
static inline int spd_extend(void *to, uint32_t size, const void *from, uint32_t known) {
  memset(to, 0, size);
  memcpy(to, from, known < size ? known : size);
  for (uint32_t k = size; k < known; k++)
    if (((const uint8_t *)from)[k]) return 0;
  return 1;
}

/* Reads the caller's struct. */
static inline spd_status spd_take(void *to, const void *from, uint32_t size, spd_error *e) {
  SPD_VALID(from, "a struct is NULL");
  uint32_t known = *(const uint32_t *)from;
  SPD_CHECK(known >= 8 && known <= SPD_STRUCT_BYTES_MAX, SPD_E_ABI, "struct_size %u is not possible", known);
  SPD_CHECK(spd_extend(to, size, from, known), SPD_E_ABI, "a field that is newer than this plugin is set");
  return SPD_OK;
}

/* ---- sizes, where UINT64_MAX is any that is too large ------------------------------------------------------------ */

static inline uint64_t spd_times(uint64_t a, uint64_t b) { return b && a > UINT64_MAX / b ? UINT64_MAX : a * b; }
static inline uint64_t spd_plus(uint64_t a, uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }

typedef struct spd_block_size {
  uint32_t values, bytes;
} spd_block_size;

/* Values and bytes of a dtype's block; 0 for a dtype that has no block here. */
static inline spd_block_size spd_block_of(uint32_t dtype) {
  static const spd_block_size SIZES[] = {{1, 4},    {1, 2},    {32, 18},  {32, 20}, {0, 0},    {0, 0},
                                         {32, 22},  {32, 24},  {32, 34},  {0, 0},   {256, 84}, {256, 110},
                                         {256, 144}, {256, 176}, {256, 210}};
  const spd_block_size bf16 = {1, 2}, none = {0, 0};
  return dtype == SPD_DT_BF16 ? bf16 : dtype < sizeof SIZES / sizeof SIZES[0] ? SIZES[dtype] : none;
}

/* Bytes of a row of n values; 0 when it is not whole blocks. */
static inline uint64_t spd_row_bytes(uint32_t dtype, uint64_t n) {
  spd_block_size block = spd_block_of(dtype);
  return block.values && n % block.values == 0 ? spd_times(n / block.values, block.bytes) : 0;
}

/* Bytes of a pool's rows and host image (spd_kv_info). */
typedef struct spd_kv_sizes {
  uint64_t latent, rope, index, latent_offset, image, pool;
} spd_kv_sizes;

static inline spd_status spd_measure_kv(spd_kv_sizes *to, const spd_kv_desc *kv, spd_error *e) {
  SPD_VALID(kv->block_tokens && kv->n_blocks, "pool: no blocks");
  SPD_HAVE(kv->flags == 0, "pool: flags %#x", kv->flags);
  to->latent = spd_row_bytes(kv->latent.dtype, kv->latent.width);
  to->rope = spd_row_bytes(kv->rope.dtype, kv->rope.width);
  to->index = spd_row_bytes(kv->index.dtype, kv->index.width);
  SPD_VALID((to->latent || !kv->latent.width) && (to->rope || !kv->rope.width) && (to->index || !kv->index.width),
            "pool: a row is not whole blocks of its dtype");
  to->latent_offset = spd_times(spd_times(to->index, kv->n_index_layers), kv->block_tokens);
  to->image = spd_plus(to->latent_offset, spd_times(spd_times(to->latent + to->rope, kv->n_layers), kv->block_tokens));
  to->pool = spd_times(to->image, kv->n_blocks);
  return SPD_OK;
}

/* ---- steps ---------------------------------------------------------------------------------------------------- */

/* A step that has been read; the arrays are the caller's. */
typedef struct spd_step_view {
  spd_step head;
  const uint32_t *token, *position, *seq, *context, *block, *block_id, *row;
  const uint64_t *slot;
} spd_step_view;

static inline const void *spd_step_array_(const void *step, uint32_t total, uint32_t offset, uint64_t n,
                                          uint32_t size) {
  return offset % 8 == 0 && offset + n * size <= total ? (const uint8_t *)step + offset : NULL;
}

static inline int spd_is_partition_(const uint32_t *offsets, uint32_t n, uint32_t end) {
  for (uint32_t k = 0; k < n; k++)
    if (offsets[k] > offsets[k + 1]) return 0;
  return offsets[0] == 0 && offsets[n] == end;
}

/* Reads a step for a plan of this bucket. */
static inline spd_status spd_read_step(spd_step_view *v, const spd_step *s, const spd_bucket *b, spd_error *e) {
  SPD_VALID(s && (uintptr_t)s % 8 == 0, "step: NULL or not 8-aligned");
  SPD_TRY(spd_take(&v->head, s, sizeof *s, e));
  const void *base = s;
  s = &v->head;
  SPD_VALID(s->total_size >= s->struct_size, "step: total_size is less than struct_size");
  SPD_HAVE((s->flags & ~(SPD_STEP_PROFILE | SPD_STEP_NAN_GUARD)) == 0 && s->reserved == 0, "step: flags %#x", s->flags);
  SPD_VALID(s->n_tokens <= b->max_tokens && s->n_seqs <= b->max_seqs && s->n_logits <= b->max_logits,
            "step: %u tokens, %u sequences or %u logits are more than the plan takes", s->n_tokens, s->n_seqs,
            s->n_logits);
  v->token = (const uint32_t *)spd_step_array_(base, s->total_size, s->token_offset, s->n_tokens, 4);
  v->position = (const uint32_t *)spd_step_array_(base, s->total_size, s->position_offset, s->n_tokens, 4);
  v->slot = (const uint64_t *)spd_step_array_(base, s->total_size, s->slot_offset, s->n_tokens, 8);
  v->seq = (const uint32_t *)spd_step_array_(base, s->total_size, s->seq_offset, (uint64_t)s->n_seqs + 1, 4);
  v->context = (const uint32_t *)spd_step_array_(base, s->total_size, s->context_offset, s->n_seqs, 4);
  v->block = (const uint32_t *)spd_step_array_(base, s->total_size, s->block_offset, (uint64_t)s->n_seqs + 1, 4);
  v->block_id = (const uint32_t *)spd_step_array_(base, s->total_size, s->block_id_offset, s->n_blocks, 4);
  v->row = (const uint32_t *)spd_step_array_(base, s->total_size, s->row_offset, s->n_logits, 4);
  SPD_VALID(v->token && v->position && v->slot && v->seq && v->context && v->block && v->block_id && v->row,
            "step: an array is not aligned or reaches past the end");
  SPD_VALID(spd_is_partition_(v->seq, s->n_seqs, s->n_tokens), "step: seq_offset is no partition of the tokens");
  SPD_VALID(spd_is_partition_(v->block, s->n_seqs, s->n_blocks), "step: block_offset is no partition of the blocks");
  for (uint32_t k = 0; k < s->n_logits; k++)
    SPD_VALID(v->row[k] < s->n_tokens && (k == 0 || v->row[k - 1] < v->row[k]), "step: rows are not ascending tokens");
  for (uint32_t q = 0; q < s->n_seqs; q++) {
    uint32_t first = v->seq[q], end = v->seq[q + 1];
    SPD_VALID(v->context[q] <= b->max_context, "step: a context of %u is more than the plan takes", v->context[q]);
    for (uint32_t t = first; t < end; t++) /* token t is end - t places before the end of the context */
      SPD_VALID((uint64_t)v->position[t] + (end - t) == v->context[q], "step: positions do not end with the context");
  }
  return SPD_OK;
}

/* Checks a step's slots and blocks against a pool. */
static inline spd_status spd_check_blocks(const spd_step_view *v, const spd_kv_desc *kv, spd_error *e) {
  for (uint32_t t = 0; t < v->head.n_tokens; t++)
    SPD_VALID(v->slot[t] < (uint64_t)kv->n_blocks * kv->block_tokens, "step: a slot is outside the pool");
  for (uint32_t k = 0; k < v->head.n_blocks; k++)
    SPD_VALID(v->block_id[k] < kv->n_blocks, "step: there is no block %u", v->block_id[k]);
  for (uint32_t q = 0; q < v->head.n_seqs; q++)
    SPD_VALID((uint64_t)(v->block[q + 1] - v->block[q]) * kv->block_tokens >= v->context[q], "step: too few blocks");
  return SPD_OK;
}

/* The component-wise largest bucket. */
static inline spd_status spd_largest_bucket(spd_bucket *to, const spd_compile *c, spd_error *e) {
  memset(to, 0, sizeof *to);
  SPD_VALID(c->buckets && c->n_buckets && c->bucket_stride >= 8, "no buckets");
  for (uint32_t k = 0; k < c->n_buckets; k++) {
    const uint8_t *from = (const uint8_t *)c->buckets + (uint64_t)k * c->bucket_stride;
    spd_bucket b;
    SPD_CHECK(spd_extend(&b, sizeof b, from, c->bucket_stride), SPD_E_ABI, "bucket: an unknown field is set");
    if (to->max_tokens < b.max_tokens) to->max_tokens = b.max_tokens;
    if (to->max_seqs < b.max_seqs) to->max_seqs = b.max_seqs;
    if (to->max_logits < b.max_logits) to->max_logits = b.max_logits;
    if (to->max_context < b.max_context) to->max_context = b.max_context;
  }
  SPD_VALID(to->max_tokens > 0 && to->max_tokens <= SPD_STEP_ROWS_MAX && to->max_seqs <= SPD_STEP_ROWS_MAX &&
            to->max_logits <= SPD_STEP_ROWS_MAX && to->max_context <= INT32_MAX, "bucket: no tokens, or too large");
  return SPD_OK;
}

/* ---- KV operations --------------------------------------------------------------------------------------------- */

/* Reads operation k of an array, and checks it against its pool and the host buffer. */
static inline spd_status spd_read_kv_op(spd_kv_op *op, const void *ops, uint32_t stride, uint32_t k,
                                        const spd_kv_desc *kv, uint64_t image_bytes, const void *host,
                                        uint64_t host_length, spd_error *e) {
  SPD_VALID(ops && stride >= 8, "KV operations: NULL, or a stride of %u", stride);
  const uint8_t *from = (const uint8_t *)ops + (uint64_t)k * stride;
  SPD_CHECK(spd_extend(op, sizeof *op, from, stride), SPD_E_ABI, "KV operation %u: an unknown field is set", k);
  SPD_HAVE(op->kind >= SPD_KV_COPY && op->kind <= SPD_KV_DISCARD, "KV operation %u: kind %u", k, op->kind);
  int reads = op->kind == SPD_KV_COPY || op->kind == SPD_KV_EXPORT, writes = op->kind != SPD_KV_EXPORT;
  SPD_VALID(!reads || op->src_block < kv->n_blocks, "KV operation %u: there is no block %u", k, op->src_block);
  SPD_VALID(!writes || op->dst_block < kv->n_blocks, "KV operation %u: there is no block %u", k, op->dst_block);
  SPD_VALID(op->kind != SPD_KV_COPY || op->n_tokens <= kv->block_tokens, "KV operation %u: %u tokens", k, op->n_tokens);
  int image = op->kind == SPD_KV_EXPORT || op->kind == SPD_KV_IMPORT;
  SPD_VALID(!image || (host && op->host_offset <= host_length && image_bytes <= host_length - op->host_offset),
            "KV operation %u: its host image is outside the buffer", k);
  return SPD_OK;
}

#ifdef __cplusplus
}
#endif
#endif /* SPARSED_KIT_H */
