/* operators.h - what does each operator of abi/OPS.md compute?
 *
 * All of them the naive way, on host memory, in f32 with sums in double; a row's bits depend on its own sequence only.
 * This is the half of the example that a vendor replaces; minimal.c is the half that stays.  Shapes and attributes have
 * been checked when the plan was made (sparsed/program.h); what is data (tokens, experts, positions) is checked here.
 */
#ifndef OPERATORS_H
#define OPERATORS_H

#include <float.h>
#include <math.h>
#include <sparsed/program.h>

#define BIT(dtype) (1ull << (dtype))
#define ROW_DTYPES (BIT(SPD_DT_F32) | BIT(SPD_DT_F16) | BIT(SPD_DT_BF16) | BIT(SPD_DT_Q8_0))
#define WEIGHT_DTYPES (ROW_DTYPES | BIT(SPD_DT_Q4_0) | BIT(SPD_DT_Q4_1))
#define EACH_ROW(x) for (uint64_t i = 0; i < (x)->n0; i++) for (uint64_t h = 0; h < (x)->n1; h++)

/* ---- numbers ---- */

static int in_set(uint64_t set, uint32_t dtype) { return dtype < 64 && (set >> dtype & 1); }
static uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
static float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static uint32_t load16(const uint8_t *from) { return from[0] | (uint32_t)from[1] << 8; }
static void store16(uint8_t *to, uint32_t bits) { to[0] = (uint8_t)bits, to[1] = (uint8_t)(bits >> 8); }

static float from_f16(uint32_t bits) {
  uint32_t sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest < 0x400) return float_of(sign | bits_of((float)rest * 0x1p-24f)); /* zero and subnormal */
  return float_of(sign | ((rest << 13) + (rest < 0x7c00 ? 112u << 23 : 224u << 23)));
}

static uint32_t to_f16(float value) {
  uint32_t sign = bits_of(value) >> 16 & 0x8000, rest = bits_of(value) & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;                                     /* NaN       */
  if (rest >= 0x477ff000) return sign | 0x7c00;                                    /* infinity  */
  if (rest < 0x38800000) return sign | (uint32_t)lrintf(float_of(rest) * 0x1p24f); /* subnormal */
  return sign | (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13;
}

/* Decodes n values, a whole number of blocks. */
static void decode(uint32_t dtype, const uint8_t *from, uint64_t n, float *to) {
  spd_block_size block = spd_block_of(dtype);
  for (float *end = to + n; to < end; to += block.values, from += block.bytes) {
    float scale = dtype == SPD_DT_F32 ? 0 : from_f16(load16(from));
    if (dtype == SPD_DT_F32) memcpy(to, from, 4);
    else if (dtype == SPD_DT_BF16) *to = float_of(load16(from) << 16);
    else if (dtype == SPD_DT_F16) *to = scale;
    else if (dtype == SPD_DT_Q8_0)
      for (int k = 0; k < 32; k++) to[k] = scale * (int8_t)from[2 + k];
    else { /* Q4_0 counts from -8 scale, Q4_1 from a value of its own; a byte has the codes of values k and k + 16 */
      float least = dtype == SPD_DT_Q4_0 ? -8 * scale : from_f16(load16(from + 2));
      const uint8_t *codes = from + block.bytes - 16;
      for (int k = 0; k < 32; k++) to[k] = scale * (float)(k < 16 ? codes[k] & 15 : codes[k - 16] >> 4) + least;
    }
  }
}

/* Encodes n values as a row of a KV pool. */
static void encode(uint32_t dtype, const float *from, uint64_t n, uint8_t *to) {
  spd_block_size block = spd_block_of(dtype);
  for (const float *end = from + n; from < end; from += block.values, to += block.bytes) {
    uint32_t bits = bits_of(*from), half = bits >> 16;
    if (dtype == SPD_DT_F32) memcpy(to, from, 4);
    else if (dtype == SPD_DT_BF16) store16(to, isnan(*from) ? half | 64 : (bits + 0x7fff + (half & 1)) >> 16);
    else if (dtype == SPD_DT_F16) store16(to, to_f16(*from));
    else {
      float largest = 0;
      for (int k = 0; k < 32; k++) largest = fmaxf(largest, fabsf(from[k]));
      float scale = largest / 127, inverse = scale == 0 ? 0 : 1 / scale;
      store16(to, to_f16(scale));
      for (int k = 0; k < 32; k++) {
        float code = roundf(from[k] * inverse);
        to[2 + k] = (uint8_t)(int8_t)(isfinite(code) ? code : 0);
      }
    }
  }
}

static double dot(const float *a, const float *b, uint64_t n) {
  double sum[4] = {0};
  for (uint64_t k = 0; k < n / 4 * 4; k += 4)
    for (int lane = 0; lane < 4; lane++) sum[lane] += (double)a[k + lane] * b[k + lane];
  for (uint64_t k = n / 4 * 4; k < n; k++) sum[0] += (double)a[k] * b[k];
  return sum[0] + sum[1] + sum[2] + sum[3];
}

/* How many of n values come before value k, the greatest first and of equals the lower; counts up to `limit`. */
static uint64_t rank(const float *x, uint64_t n, uint64_t k, uint64_t limit) {
  uint64_t before = 0;
  for (uint64_t r = 0; r < n && before < limit; r++) before += x[r] > x[k] || (x[r] == x[k] && r < k);
  return before;
}

/* ---- what operators work on ---- */

/* A weight: `batch` matrices of `rows` encoded rows. */
typedef struct { spd_weight_desc desc; uint64_t row_bytes, bytes; uint8_t *data; } matrices;
/* A KV pool: blocks one after another, each as its host image. */
typedef struct { spd_kv_desc desc; spd_kv_sizes bytes; uint8_t *blocks; } pool_rows;
/* A tensor in a step: rows [n0, n1] of n2 values, or a weight; both NULL where the operator has none. */
typedef struct { float *at; uint64_t n0, n1, n2, s0, s1; const matrices *weight; } tensor;

/* An operator of a step. */
typedef struct {
  const spd_op *op;
  const pool_rows *pool; /* NULL for operators that use none */
  spd_step_view step;
  tensor in[6], out[3];
  float *scratch; /* SCRATCH_ROWS rows as wide as the widest, then a value for each position */
  spd_error *e;
  spd_status status;
} job;
#define SCRATCH_ROWS 3

/* The row of a token in a layer of the index or the latent plane. */
static uint8_t *kv_row(const pool_rows *p, int index, uint32_t layer, uint64_t slot) {
  uint64_t n = (uint64_t)layer * p->desc.block_tokens + slot % p->desc.block_tokens;
  uint8_t *block = p->blocks + slot / p->desc.block_tokens * p->bytes.image;
  return block + (index ? n * p->bytes.index : p->bytes.latent_offset + n * (p->bytes.latent + p->bytes.rope));
}

static void apply_kv_op(const pool_rows *p, const spd_kv_op *op, uint8_t *host) {
  uint8_t *src = p->blocks + op->src_block * p->bytes.image, *dst = p->blocks + op->dst_block * p->bytes.image;
  if (op->kind == SPD_KV_EXPORT) memcpy(host + op->host_offset, src, p->bytes.image);
  if (op->kind == SPD_KV_IMPORT) memcpy(dst, host + op->host_offset, p->bytes.image);
  if (op->kind == SPD_KV_DISCARD) memset(dst, 0, p->bytes.image);
  if (op->kind != SPD_KV_COPY || src == dst) return;
  const uint64_t n = op->n_tokens, src_slot = (uint64_t)op->src_block * p->desc.block_tokens,
                 dst_slot = (uint64_t)op->dst_block * p->desc.block_tokens;
  for (uint32_t k = 0; k < p->desc.n_index_layers; k++)
    memcpy(kv_row(p, 1, k, dst_slot), kv_row(p, 1, k, src_slot), n * p->bytes.index);
  for (uint32_t k = 0; k < p->desc.n_layers; k++)
    memcpy(kv_row(p, 0, k, dst_slot), kv_row(p, 0, k, src_slot), n * (p->bytes.latent + p->bytes.rope));
}

static float *row(const tensor *x, uint64_t i, uint64_t h) { return x->at + i * x->s0 + h * x->s1; }
static int32_t *ids(const tensor *x, uint64_t i) { return (int32_t *)row(x, i, 0); }
static const float *vector(const tensor *x) { return x->weight ? (const float *)x->weight->data : NULL; }

static void embed(job *j) {
  const matrices *w = j->in->weight;
  for (uint64_t t = 0; t < j->out->n0 && !j->status; t++) {
    uint32_t token = j->step.token[t];
    if (token < w->desc.rows) decode(w->desc.dtype, w->data + token * w->row_bytes, w->desc.cols, row(j->out, t, 0));
    else j->status = spd_fail(j->e, SPD_E_INVALID, "token %u is not in the vocabulary", token);
  }
}

/* RMS_NORM, and LAYER_NORM, which has a mean and a bias instead of a residual. */
static void norm(job *j) {
  const int layer = j->op->kind == SPD_OP_LAYER_NORM;
  const float *gain = vector(&j->in[1]), *bias = layer ? vector(&j->in[2]) : NULL;
  const uint64_t n = j->in->n2;
  EACH_ROW(j->in) {
    const float *x = row(j->in, i, h), *residual = j->in[2].at ? row(&j->in[2], i, h) : NULL;
    float *y = row(j->out, i, h);
    double mean = 0;
    for (uint64_t c = 0; c < n; c++) y[c] = x[c] + (residual ? residual[c] : 0);
    if (residual) memcpy(row(&j->out[1], i, h), y, n * 4);
    for (uint64_t c = 0; c < n && layer; c++) mean += y[c] / (double)n;
    for (uint64_t c = 0; c < n; c++) y[c] = (float)(y[c] - mean);
    float scale = (float)(1 / sqrt(dot(y, y, n) / (double)n + j->op->f[0]));
    for (uint64_t c = 0; c < n; c++) y[c] = y[c] * scale * (gain ? gain[c] : 1) + (bias ? bias[c] : 0);
  }
}

/* LINEAR, MLA_ABSORB, MLA_EXPAND and MOE_LINEAR: y[t, a] = W_b x[t, a], where b is ids[t, a] or else a. */
static void multiply(job *j) {
  const tensor *x = j->in, *experts = j->op->kind == SPD_OP_MOE_LINEAR ? &j->in[2] : NULL;
  const float *bias = experts ? NULL : vector(&j->in[2]);
  const matrices *w = j->in[1].weight;
  const uint64_t n_rows = w->desc.rows, n_cols = w->desc.cols;
  for (uint64_t b = 0; b < w->desc.batch; b++)
    for (uint64_t o = 0; o < n_rows; o++) {
      int is_decoded = 0; /* once for all that need it */
      for (uint64_t t = 0; t < x->n0; t++)
        for (uint64_t a = experts ? 0 : b; a < (experts ? experts->n2 : b + 1); a++) {
          int64_t id = experts ? ids(experts, t)[a] : (int64_t)b;
          if (id < 0 || id >= w->desc.batch) {
            j->status = spd_fail(j->e, SPD_E_INVALID, "there is no expert %d", (int)id);
            return;
          }
          if ((uint64_t)id != b) continue;
          if (!is_decoded) decode(w->desc.dtype, w->data + (b * n_rows + o) * w->row_bytes, n_cols, j->scratch);
          is_decoded = 1;
          double product = dot(j->scratch, row(x, t, x->n1 == 1 ? 0 : a), n_cols);
          row(j->out, t, 0)[a * n_rows + o] = (float)(product + (bias ? bias[o] : 0));
        }
    }
}

static void rope(job *j) {
  const uint64_t half = (uint64_t)j->op->i[1] / 2, apart = j->op->i[2] ? half : 1, step = j->op->i[2] ? 1 : 2;
  EACH_ROW(j->in) {
    const float *cosine = row(&j->in[1], i, 0), *sine = cosine + half;
    float *y = memcpy(row(j->out, i, h), row(j->in, i, h), j->in->n2 * 4);
    for (uint64_t k = 0; k < half; k++) {
      float *a = y + j->op->i[0] + k * step, *b = a + apart, old = *a;
      *a = old * cosine[k] - *b * sine[k];
      *b = *b * cosine[k] + old * sine[k];
    }
  }
}

/* KV_APPEND and IDX_APPEND. */
static void append(job *j) {
  const int index = j->op->kind == SPD_OP_IDX_APPEND;
  const spd_kv_desc *kv = &j->pool->desc;
  for (uint64_t t = 0; t < j->in->n0; t++) {
    uint8_t *to = kv_row(j->pool, index, j->op->layer, j->step.slot[t]);
    encode(index ? kv->index.dtype : kv->latent.dtype, row(j->in, t, 0), j->in->n2, to);
    if (!index) encode(kv->rope.dtype, row(&j->in[1], t, 0), kv->rope.width, to + j->pool->bytes.latent);
  }
}

/* The pool's row at a position of token t's sequence. */
static const uint8_t *cached(const job *j, int index, uint64_t t, uint64_t position) {
  uint32_t sequence = 0, block_tokens = j->pool->desc.block_tokens;
  while (j->step.seq[sequence + 1] <= t) sequence++;
  uint64_t block = j->step.block_id[j->step.block[sequence] + position / block_tokens];
  return kv_row(j->pool, index, j->op->layer, block * block_tokens + position % block_tokens);
}

static void idx_topk(job *j) {
  const tensor *q = j->in;
  float *key = j->scratch, *scores = key + q->n2;
  for (uint64_t t = 0; t < q->n0; t++) {
    uint64_t n = j->step.position[t] + 1ull, k = j->out->n2, n_selected = 0;
    for (uint64_t s = 0; s < n && n > k; s++) {
      double score = 0;
      decode(j->pool->desc.index.dtype, cached(j, 1, t, s), q->n2, key);
      for (uint64_t h = 0; h < q->n1; h++) score += row(&j->in[1], t, 0)[h] * fmax(dot(row(q, t, h), key, q->n2), 0);
      scores[s] = fmaxf((float)(j->op->f[0] * score), -FLT_MAX); /* a NaN comes last */
    }
    for (uint64_t s = 0; s < n; s++)
      if (n <= k || rank(scores, n, s, k) < k) ids(j->out, t)[n_selected++] = (int32_t)s;
    while (n_selected < k) ids(j->out, t)[n_selected++] = -1;
  }
}

/* SPARSE_MLA over the positions of a selection, DENSE_MLA over all up to the token's own. */
static void attention(job *j) {
  const tensor *q_latent = j->in, *q_rope = &j->in[1], *sel = &j->in[2], *out = j->out;
  const spd_kv_desc *kv = &j->pool->desc;
  float *latent = j->scratch, *rope_key = latent + kv->latent.width, *z = rope_key + kv->rope.width;
  EACH_ROW(out) {
    const uint64_t group = h * (uint64_t)j->op->i[0] / out->n1, n = sel->at ? sel->n2 : j->step.position[i] + 1ull;
    const float *value = latent + group * out->n2;
    float *o = memset(row(out, i, h), 0, out->n2 * 4);
    double greatest = -INFINITY, sum = 0;
    for (uint64_t k = 0; k < 2 * n; k++) { /* first all logits, then all exponentials */
      int64_t s = sel->at ? ids(sel, i)[k % n] : (int64_t)(k % n);
      if (s > j->step.position[i]) j->status = spd_fail(j->e, SPD_E_INVALID, "position %d is after its token", (int)s);
      if (j->status) return;
      if (s < 0) continue;
      const uint8_t *from = cached(j, 0, i, (uint64_t)s);
      decode(kv->latent.dtype, from, kv->latent.width, latent);
      if (k < n) {
        decode(kv->rope.dtype, from + j->pool->bytes.latent, kv->rope.width, rope_key);
        double product = dot(row(q_rope, i, h), rope_key + group * q_rope->n2, q_rope->n2);
        if (q_latent->at) product += dot(row(q_latent, i, h), value, out->n2);
        z[s] = (float)(j->op->f[0] * product);
        greatest = fmax(greatest, z[s]);
      } else {
        double p = exp(z[s] - greatest);
        sum += p;
        for (uint64_t c = 0; c < out->n2; c++) o[c] += (float)p * value[c];
      }
    }
    for (uint64_t c = 0; c < out->n2; c++) o[c] = sum == 0 ? 0 : (float)(o[c] / sum);
  }
}

static void moe_route(job *j) {
  const uint64_t n = j->in->n2, n_groups = (uint64_t)j->op->i[1], size = n / n_groups, n_kept = (uint64_t)j->op->i[2];
  const float *bias = vector(&j->in[1]);
  float *p = j->scratch, *b = p + n, *group = b + n;
  for (uint64_t t = 0; t < j->in->n0; t++) {
    const float *x = row(j->in, t, 0);
    float *weights = row(&j->out[1], t, 0), greatest = -FLT_MAX;
    double sum = 0, chosen = 0;
    for (uint64_t k = 0; k < n; k++) greatest = fmaxf(greatest, x[k]);
    for (uint64_t k = 0; k < n; k++) sum += exp(x[k] - greatest);
    for (uint64_t k = 0; k < n; k++) {
      p[k] = (float)(j->op->i[3] ? exp(x[k] - greatest) / sum : 1 / (1 + exp(-x[k])));
      b[k] = fmaxf(p[k] + (bias ? bias[k] : 0), -FLT_MAX); /* a NaN comes last */
    }
    memset(group, 0, n_groups * 4);
    for (uint64_t k = 0; k < n; k++)
      if (rank(b + k / size * size, size, k % size, 2) < (j->op->i[5] ? 1 : 2)) group[k / size] += b[k];
    for (uint64_t k = 0; k < n; k++)
      if (rank(group, n_groups, k / size, n_kept) >= n_kept) b[k] = -INFINITY;
    for (uint64_t k = 0; k < n; k++) {
      uint64_t a = rank(b, n, k, j->out->n2);
      if (a < j->out->n2) ids(j->out, t)[a] = (int32_t)k, weights[a] = p[k], chosen += p[k];
    }
    for (uint64_t a = 0; a < j->out->n2; a++) weights[a] *= (float)(j->op->f[0] / (j->op->i[4] ? chosen + 1e-20 : 1));
  }
}

static void moe_combine(job *j) {
  for (uint64_t t = 0; t < j->out->n0; t++)
    for (uint64_t c = 0; c < j->out->n2; c++) {
      double sum = j->in[2].at ? row(&j->in[2], t, 0)[c] : 0;
      for (uint64_t a = 0; a < j->in->n1; a++) sum += (double)row(&j->in[1], t, 0)[a] * row(j->in, t, a)[c];
      row(j->out, t, 0)[c] = (float)sum;
    }
}

/* ADD and SILU_MUL. */
static void pairwise(job *j) {
  EACH_ROW(j->out) for (uint64_t c = 0; c < j->out->n2; c++) {
    float a = row(j->in, i, h)[c], b = row(&j->in[1], i, h)[c];
    row(j->out, i, h)[c] = j->op->kind == SPD_OP_ADD ? a + b : a / (1 + expf(-a)) * b;
  }
}

static void gather_rows(job *j) {
  EACH_ROW(j->out) memcpy(row(j->out, i, h), row(j->in, j->step.row[i], h), j->out->n2 * 4);
}

static void hadamard(job *j) {
  EACH_ROW(j->in) {
    float *y = memcpy(row(j->out, i, h), row(j->in, i, h), j->in->n2 * 4);
    for (uint64_t apart = 1; apart < j->in->n2; apart *= 2)
      for (uint64_t k = 0; k < j->in->n2; k++) {
        float a = y[k], b = y[k ^ apart];
        if (!(k & apart)) y[k] = a + b, y[k ^ apart] = a - b;
      }
    for (uint64_t k = 0; k < j->in->n2; k++) y[k] /= sqrtf((float)j->in->n2);
  }
}

/* In the order of SPD_OP_*. */
static void (*const RUN[])(job *) = {
  NULL, embed, norm, norm, multiply, rope, multiply, multiply, append, append, idx_topk, attention, attention,
  moe_route, multiply, moe_combine, pairwise, pairwise, gather_rows, hadamard,
};

#endif /* OPERATORS_H */
