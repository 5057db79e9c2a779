/* program.h - is a program what abi/OPS.md allows?
 *
 * Reads a program's blob into tables after which every number in it may be used: tensors exist, views lie inside their
 * parents, shapes and attributes are those of OPS.md.  Then what every plan needs: places for its tensors, arenas.
 * What a plugin supports beyond that is the plugin's to say.  The Rust counterpart is abi/src/view.rs.
 */
#ifndef SPARSED_PROGRAM_H
#define SPARSED_PROGRAM_H

#include <sparsed/kit.h>
#include <stdlib.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SPD_PROGRAM_BYTES_MAX (64u << 20)  /* a model of 100 layers has under 1 MiB */
#define SPD_DIM_MAX (1 << 30)              /* a dimension or stride                 */
#define SPD_TENSOR_VALUES_MAX (1ull << 40) /* with 1 for a symbolic dimension       */
#define SPD_ARENA_VALUES_MAX (1ull << 42)  /* of all tensors of a kind in a plan    */

/* ---- programs ------------------------------------------------------------------------------------------------ */

/* A program that has been read: copies of its tensors and operators. */
typedef struct spd_program_view {
  spd_program head;
  spd_tensor *tensors;
  spd_op *ops;
} spd_program_view;

/* Operators as abi/OPS.md has them.  A tensor is five characters: f (f32 rows), i (i32 rows), w (weight) or v (f32
 * vector); three dimensions, where equal letters are equal sizes, T, L and 1 are themselves, and a missing dimension in
 * the middle (rows) or in front (weights) is 1; '?' when it may be absent.  An attribute i[] is one character: a digit
 * is its largest value, a letter the size it equals, '+' anything from 1, '*' anything from 0. */
typedef struct spd_op_form {
  const char *name, *in, *out, *integers;
  int n_floats;
} spd_op_form;

static const spd_op_form SPD_OP_FORMS[] = {
    {NULL, "", "", "", 0},
    {"EMBED", "w1VD", "fT1D", "", 0},
    {"RMS_NORM", "fRhC v11C?fRhC?", "fRhC fRhC?", "", 1},
    {"LAYER_NORM", "fRhC v11C v11C", "fRhC", "", 1},
    {"LINEAR", "fR1C w1OC v11O?", "fR1O", "2", 0},
    {"ROPE", "fThP fT1Q", "fThP", "*Q1", 0},
    {"MLA_ABSORB", "fTHN wHKN", "fTHK", "2", 0},
    {"MLA_EXPAND", "fTHK wHVK", "fT1O", "2", 0},
    {"KV_APPEND", "fT1K fT1P", "", "", 0},
    {"IDX_APPEND", "fT1D", "", "", 0},
    {"IDX_TOPK", "fTHD fT1H", "iT1K", "K1", 1},
    {"SPARSE_MLA", "fTHK?fTHP iT1S", "fTHK", "+", 1},
    {"DENSE_MLA", "fTHK?fTHP", "fTHK", "+", 1},
    {"MOE_ROUTE", "fT1E v11E?", "iT1A fT1A", "A++111", 1},
    {"MOE_LINEAR", "fTXC wEOC iT1A", "fTAO", "12", 0},
    {"MOE_COMBINE", "fTAD fT1A fT1D?", "fT1D", "", 0},
    {"SILU_MUL", "fRhC fRhC", "fRhC", "", 0},
    {"ADD", "fRhC fRhC", "fRhC", "", 0},
    {"GATHER_ROWS", "fThC", "fLhC", "", 0},
    {"HADAMARD", "fRhD", "fRhD", "", 0},
};
#define SPD_OP_KINDS (sizeof SPD_OP_FORMS / sizeof SPD_OP_FORMS[0])

/* Values in one step of dim 0. */
static inline uint64_t spd_row_values(const spd_tensor *t) {
  uint64_t n = 1;
  for (uint32_t i = 1; i < t->rank; i++) n *= (uint64_t)t->dim[i];
  return n;
}

/* The tensor that holds the values of tensor `id`: itself, or a view's parent. */
static inline uint32_t spd_owner(const spd_program_view *p, uint32_t id) {
  return p->tensors[id].kind == SPD_T_VIEW ? p->tensors[id].bind : id;
}

static inline spd_status spd_check_view_(const spd_program_view *p, const spd_tensor *t, spd_error *e) {
  SPD_VALID(t->bind < p->head.n_tensors && p->tensors[t->bind].kind <= SPD_T_OUTPUT, "view: no such parent");
  const spd_tensor *parent = &p->tensors[t->bind];
  SPD_VALID(parent->dtype == t->dtype && parent->dim[0] == t->dim[0], "view: dtype or dim 0 not the parent's");
  int64_t row = (int64_t)spd_row_values(parent), last = t->dim[t->rank - 1] - 1;
  if (t->stride[0] == 0 && (t->rank == 2 || t->stride[1] == 0)) {
    SPD_VALID(t->view_offset == 0 && (int64_t)spd_row_values(t) == row, "view: packed, but not its parent's row");
    return SPD_OK;
  }
  SPD_VALID(t->stride[0] == row, "view: stride 0 is not the parent's row");
  if (t->rank == 3) {
    SPD_VALID(t->stride[1] > 0 && t->stride[1] <= SPD_DIM_MAX, "view: stride 1 is %d", t->stride[1]);
    last += (int64_t)(t->dim[1] - 1) * t->stride[1];
  }
  SPD_VALID(t->view_offset >= 0 && t->view_offset < row && last < row - t->view_offset, "view: outside its parent");
  return SPD_OK;
}

static inline spd_status spd_check_tensor_(const spd_program_view *p, const spd_tensor *t, spd_error *e) {
  uint64_t values = 1;
  SPD_HAVE(t->kind <= SPD_T_VIEW && t->flags == 0, "tensor: kind %u, flags %#x", t->kind, t->flags);
  SPD_VALID(t->rank >= 1 && t->rank <= 4, "tensor: rank %u", t->rank);
  SPD_HAVE(t->rank <= 3 && (t->rank >= 2 || t->kind == SPD_T_WEIGHT), "tensor: no operator takes rank %u", t->rank);
  for (uint32_t i = 0; i < t->rank; i++) {
    int symbolic = i == 0 && t->kind != SPD_T_WEIGHT && t->dim[0] < 0 && t->dim[0] >= SPD_DIM_LOGITS;
    SPD_VALID(symbolic || (t->dim[i] > 0 && t->dim[i] <= SPD_DIM_MAX), "tensor: a dimension is %d", t->dim[i]);
    uint64_t n = symbolic ? 1 : (uint64_t)t->dim[i];
    SPD_VALID(values <= SPD_TENSOR_VALUES_MAX / n, "tensor: more than 2^40 values");
    values *= n;
  }
  SPD_HAVE(t->kind == SPD_T_VIEW || t->view_offset == 0, "tensor: an offset, but no view");
  if (t->kind == SPD_T_WEIGHT) SPD_VALID(t->bind < p->head.n_weights, "tensor: there is no weight %u", t->bind);
  return SPD_OK;
}

static inline spd_status spd_check_references_(const spd_program_view *p, const spd_op *op, spd_error *e) {
  SPD_HAVE(op->flags == 0 && op->reserved == 0 && op->attr_length == 0, "operator: an unknown flag or attribute");
  SPD_VALID(op->attr_offset <= p->head.total_size, "operator: attributes outside the blob");
  for (int k = 0; k < 6; k++)
    SPD_VALID(op->in[k] == SPD_NO_TENSOR || op->in[k] < p->head.n_tensors, "operator: no input tensor %u", op->in[k]);
  for (int k = 0; k < 3; k++) {
    uint32_t id = op->out[k];
    SPD_VALID(id == SPD_NO_TENSOR || id < p->head.n_tensors, "operator: no output tensor %u", id);
    SPD_VALID(id == SPD_NO_TENSOR || p->tensors[id].kind == SPD_T_ACTIVATION || p->tensors[id].kind == SPD_T_OUTPUT,
              "operator: writes to an input, a weight or a view");
  }
  for (int k = 0; k < 4; k++) SPD_VALID(op->f[k] - op->f[k] == 0, "operator: f[%d] is not finite", k);
  return SPD_OK;
}

/* Copies n elements of at least `size` bytes out of the blob. */
static inline spd_status spd_read_table_(void **to, uint32_t size, const uint8_t *blob, uint64_t length, uint32_t n,
                                         uint32_t stride, uint32_t offset, spd_error *e) {
  SPD_VALID(stride > 0 && stride % 8 == 0 && offset % 8 == 0, "program: stride %u, offset %u", stride, offset);
  SPD_VALID(offset + (uint64_t)n * stride <= length, "program: a table reaches past the blob");
  *to = malloc((uint64_t)n * size + 1);
  SPD_CHECK(*to, SPD_E_NOMEM_HOST, "program: no memory for its tables");
  for (uint32_t i = 0; i < n; i++) {
    const uint8_t *from = blob + offset + (uint64_t)i * stride;
    int is_known = spd_extend((uint8_t *)*to + (uint64_t)i * size, size, from, stride);
    SPD_CHECK(is_known, SPD_E_ABI, "program: a field that is newer than this plugin is set");
  }
  return SPD_OK;
}

static inline void spd_free_program(spd_program_view *p) {
  free(p->tensors);
  free(p->ops);
}

/* Reads a blob into a zeroed view; to be freed with spd_free_program, whatever the answer. */
static inline spd_status spd_read_program(spd_program_view *p, const void *blob, uint64_t length, spd_error *e) {
  const uint8_t *bytes = (const uint8_t *)blob;
  spd_program *h = &p->head;
  SPD_VALID(blob && length >= 8 && length <= SPD_PROGRAM_BYTES_MAX, "program: NULL, too short or too long");
  uint32_t known;
  memcpy(&known, bytes + offsetof(spd_program, struct_size), 4);
  SPD_CHECK(known >= 8 && known <= length, SPD_E_ABI, "program: struct_size %u is not possible", known);
  SPD_CHECK(spd_extend(h, sizeof *h, bytes, known), SPD_E_ABI, "program: a field newer than this plugin is set");
  SPD_VALID(h->magic == SPD_PROGRAM_MAGIC && h->total_size == length, "program: wrong magic or total_size");
  SPD_HAVE(h->flags == 0 && h->reserved == 0, "program: flags %#x", h->flags);
  void *tensors = NULL, *ops = NULL;
  spd_status status = spd_read_table_(&tensors, sizeof *p->tensors, bytes, length, h->n_tensors, h->tensor_stride,
                                      h->tensor_offset, e);
  if (!status) status = spd_read_table_(&ops, sizeof *p->ops, bytes, length, h->n_ops, h->op_stride, h->op_offset, e);
  p->tensors = (spd_tensor *)tensors, p->ops = (spd_op *)ops;
  for (uint32_t k = 0; !status && k < h->n_tensors; k++) status = spd_check_tensor_(p, &p->tensors[k], e);
  for (uint32_t k = 0; !status && k < h->n_tensors; k++) /* once every parent has been checked */
    if (p->tensors[k].kind == SPD_T_VIEW) status = spd_check_view_(p, &p->tensors[k], e);
  for (uint32_t k = 0; !status && k < h->n_ops; k++) status = spd_check_references_(p, &p->ops[k], e);
  return status;
}

/* Compares tensors with a form; sizes[letter] is 0 until the letter has been met. */
static inline spd_status spd_match_(const spd_program_view *p, const uint32_t *ids, int n, const char *form,
                                    int64_t *sizes, spd_error *e) {
  int length = (int)strlen(form);
  for (int k = 0; k < n; k++) {
    const char *cell = form + 5 * k;
    if (5 * k >= length) {
      SPD_VALID(ids[k] == SPD_NO_TENSOR, "tensor %d is one too many", k);
      continue;
    }
    if (ids[k] == SPD_NO_TENSOR) {
      SPD_VALID(cell[4] == '?', "tensor %d (%.4s) is absent", k, cell);
      continue;
    }
    const spd_tensor *t = &p->tensors[ids[k]];
    int weight = cell[0] == 'w' || cell[0] == 'v';
    SPD_VALID(weight == (t->kind == SPD_T_WEIGHT), "tensor %d (%.4s): weight and activation confused", k, cell);
    uint32_t dtype = cell[0] == 'w' ? t->dtype : cell[0] == 'i' ? SPD_DT_I32 : SPD_DT_F32;
    SPD_VALID(t->dtype == dtype, "tensor %d (%.4s) has dtype %u", k, cell, t->dtype);
    int64_t have[3] = {1, 1, t->dim[t->rank - 1]};
    if (t->rank == 3) have[0] = t->dim[0], have[1] = t->dim[1];
    if (t->rank == 2) have[weight ? 1 : 0] = t->dim[0];
    for (int i = 0; i < 3; i++) {
      int64_t *size = &sizes[(int)cell[1 + i]];
      if (*size == 0) *size = have[i];
      SPD_VALID(*size == have[i], "tensor %d (%.4s): %c is %lld, not %lld", k, cell, cell[1 + i], (long long)have[i],
                (long long)*size);
    }
  }
  return SPD_OK;
}

/* What OPS.md asks of single operators beyond their form. */
static inline spd_status spd_check_sizes_(const spd_op *op, const int64_t *sizes, const spd_kv_desc *kv, spd_error *e) {
  const int32_t *i = op->i;
  int64_t n = sizes['E'], groups = 1;
  switch (op->kind) {
    case SPD_OP_RMS_NORM:
      SPD_VALID((op->in[2] == SPD_NO_TENSOR) == (op->out[1] == SPD_NO_TENSOR), "a residual or a sum alone");
      return SPD_OK;
    case SPD_OP_ROPE:
      SPD_VALID(i[1] % 2 == 0 && i[0] + (int64_t)i[1] <= sizes['P'], "cannot rotate values %d + %d", i[0], i[1]);
      return SPD_OK;
    case SPD_OP_MLA_EXPAND:
      SPD_VALID(sizes['O'] == sizes['H'] * sizes['V'], "y is not heads side by side");
      return SPD_OK;
    case SPD_OP_MOE_ROUTE:
      SPD_VALID(n % i[1] == 0 && i[2] <= i[1], "%lld experts in %d groups, %d kept", (long long)n, i[1], i[2]);
      SPD_VALID(i[0] <= n / i[1] * i[2], "more experts are active than are reachable");
      return SPD_OK;
    case SPD_OP_MOE_LINEAR:
      SPD_VALID(sizes['X'] == (i[0] ? sizes['A'] : 1), "x has %lld rows a token", (long long)sizes['X']);
      return SPD_OK;
    case SPD_OP_HADAMARD:
      SPD_VALID((sizes['D'] & (sizes['D'] - 1)) == 0, "width %lld is not a power of two", (long long)sizes['D']);
      return SPD_OK;
    case SPD_OP_IDX_APPEND:
    case SPD_OP_IDX_TOPK:
      SPD_VALID(!kv || op->layer < kv->n_index_layers, "there is no index layer %u", op->layer);
      SPD_VALID(!kv || sizes['D'] == kv->index.width, "not the pool's index row");
      return SPD_OK;
    case SPD_OP_SPARSE_MLA:
    case SPD_OP_DENSE_MLA:
      groups = i[0];
      SPD_VALID(sizes['H'] % groups == 0, "%lld heads in %lld groups", (long long)sizes['H'], (long long)groups);
      /* fall through */
    case SPD_OP_KV_APPEND:
      SPD_VALID(!kv || op->layer < kv->n_layers, "there is no layer %u", op->layer);
      SPD_VALID(!kv || (sizes['K'] * groups == kv->latent.width && sizes['P'] * groups == kv->rope.width),
                "not the pool's latent and rope rows");
      return SPD_OK;
    default: return SPD_OK;
  }
}

static inline spd_status spd_check_form_(const spd_program_view *p, const spd_op *op, const spd_kv_desc *kv,
                                         spd_error *e) {
  SPD_HAVE(op->kind < SPD_OP_KINDS && op->kind > 0, "kind %#x", op->kind);
  const spd_op_form *form = &SPD_OP_FORMS[op->kind];
  int64_t sizes[128] = {0};
  sizes['1'] = 1, sizes['T'] = SPD_DIM_TOKENS, sizes['L'] = SPD_DIM_LOGITS;
  SPD_TRY(spd_match_(p, op->in, 6, form->in, sizes, e));
  SPD_TRY(spd_match_(p, op->out, 3, form->out, sizes, e));
  int n = (int)strlen(form->integers);
  for (int k = 0; k < 6; k++) {
    char rule = k < n ? form->integers[k] : '0';
    int64_t least = rule == '+' ? 1 : 0, most = rule == '+' || rule == '*' ? INT32_MAX : rule - '0';
    if (rule >= 'A') least = most = sizes[(int)rule];
    spd_status refusal = k < n ? SPD_E_INVALID : SPD_E_UNSUPPORTED;
    SPD_CHECK(op->i[k] >= least && op->i[k] <= most, refusal, "i[%d] is %d", k, op->i[k]);
  }
  for (int k = form->n_floats; k < 4; k++) SPD_HAVE(op->f[k] == 0, "f[%d] is set", k);
  if (op->kind >= SPD_OP_KV_APPEND && op->kind <= SPD_OP_DENSE_MLA)
    SPD_VALID(op->kvpool < p->head.n_kvpools, "there is no pool %u", op->kvpool);
  else
    SPD_HAVE(op->kvpool == 0 && op->layer == 0, "no operator of a pool, but layer or kvpool is set");
  return spd_check_sizes_(op, sizes, kv, e);
}

/* Names the operator in an error that has been filled; the answer is `status`. */
static inline spd_status spd_at_op(const spd_program_view *p, uint32_t index, spd_status status, spd_error *e) {
  spd_error full;
  uint32_t kind = p->ops[index].kind;
  if (status == SPD_OK || !e || !SPD_HAS(e, spd_error, message)) return status;
  memcpy(&full, e, sizeof full);
  const char *name = kind > 0 && kind < SPD_OP_KINDS ? SPD_OP_FORMS[kind].name : "unknown";
  spd_fail(e, status, "operator %u (%s): %.160s", index, name, full.message);
  e->op_index = index;
  return status;
}

/* Checks operator `index` against OPS.md, and against the pool that it is bound to if there is one. */
static inline spd_status spd_check_op(const spd_program_view *p, uint32_t index, const spd_kv_desc *kv, spd_error *e) {
  SPD_VALID(index < p->head.n_ops, "there is no operator %u", index);
  return spd_at_op(p, index, spd_check_form_(p, &p->ops[index], kv, e), e);
}

/* ---- plans: what they are bound to, where their tensors lie --------------------------------------------------- */

/* Whether a bound weight is the one that tensor `t` describes. */
static inline int spd_is_weight_of(const spd_tensor *t, const spd_weight_desc *w) {
  uint64_t rows = t->rank > 1 ? (uint64_t)t->dim[t->rank - 2] : 1, batch = t->rank > 2 ? (uint64_t)t->dim[0] : 1;
  return w->dtype == t->dtype && w->batch == batch && w->rows == rows && w->cols == (uint64_t)t->dim[t->rank - 1];
}

/* Rows of a tensor with this dim 0. */
static inline uint64_t spd_dim_rows(int32_t dim, uint32_t n_tokens, uint32_t n_seqs, uint32_t n_logits) {
  if (dim > 0) return (uint64_t)dim;
  return dim == SPD_DIM_TOKENS ? n_tokens : dim == SPD_DIM_SEQS ? n_seqs : n_logits;
}

/* Where a tensor lies, in values of four bytes: in the workspace, until operator `last`, or in its arena. */
typedef struct spd_place {
  uint64_t at, end;
  uint32_t last, written;
} spd_place;

/* Gives each tensor inside the plan a range that no tensor alive at the same time has: `places` has a zeroed element
 * for each tensor, `*end` becomes the values needed.  Refuses a program that reads what it has not written. */
static inline spd_status spd_place_tensors(const spd_program_view *p, const spd_bucket *b, spd_place *places,
                                           uint64_t *end, spd_error *e) {
  *end = 0;
  for (int pass = 0; pass < 2; pass++)
    for (uint32_t k = 0; k < p->head.n_ops * 9; k++) {
      const spd_op *op = &p->ops[k / 9];
      uint32_t id = k % 9 < 6 ? op->in[k % 9] : op->out[k % 9 - 6];
      if (id == SPD_NO_TENSOR) continue;
      id = spd_owner(p, id);
      const spd_tensor *t = &p->tensors[id];
      spd_place *own = &places[id];
      if (pass == 0) own->last = k / 9;
      if (pass == 0 || t->kind == SPD_T_INPUT || t->kind == SPD_T_WEIGHT) continue;
      SPD_VALID(own->written || k % 9 >= 6, "operator %u reads tensor %u, which nothing has written", k / 9, id);
      if (own->written++ || t->kind == SPD_T_OUTPUT) continue;
      uint64_t n = spd_dim_rows(t->dim[0], b->max_tokens, b->max_seqs, b->max_logits) * spd_row_values(t), at = 0;
      for (uint32_t i = 0; i < p->head.n_tensors; i++) {
        const spd_place *other = &places[i];
        if (other->last < k / 9 || other->end <= at || other->at >= at + n) continue;
        at = other->end, i = UINT32_MAX; /* behind it, and from the start again */
      }
      SPD_VALID(at + n <= SPD_ARENA_VALUES_MAX, "the plan's tensors are too large");
      own->at = at, own->end = (at + n + 15) / 16 * 16;
      if (*end < own->end) *end = own->end;
    }
  return SPD_OK;
}

/* Bytes of the arena with the tensors of a kind (SPD_T_INPUT, SPD_T_OUTPUT) in a step; UINT64_MAX: too large.  When
 * `places` is not NULL it has an element for each tensor, and those of this kind are given theirs. */
static inline uint64_t spd_arena(const spd_program_view *p, uint32_t kind, uint32_t n_tokens, uint32_t n_seqs,
                                 uint32_t n_logits, spd_place *places) {
  uint64_t end = 0;
  for (uint32_t k = 0; k < p->head.n_tensors; k++) {
    const spd_tensor *t = &p->tensors[k];
    if (t->kind != kind) continue;
    end = (end + 63) / 64 * 64;
    if (places) places[k].at = end / 4;
    uint64_t n = spd_dim_rows(t->dim[0], n_tokens, n_seqs, n_logits) * spd_row_values(t);
    if (n > SPD_ARENA_VALUES_MAX || (end += n * 4) > SPD_ARENA_VALUES_MAX * 4) return UINT64_MAX;
  }
  return end;
}

#ifdef __cplusplus
}
#endif
#endif /* SPARSED_PROGRAM_H */
