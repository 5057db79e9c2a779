/* plugin.h - the contract between sparsed and a hardware backend plugin.
 *
 * A plugin is a shared library that exports one symbol, spd_get_api.  The daemon asks it for devices, uploads
 * weights, creates a pool for the KV cache, compiles a *program* (a pointer-free blob that describes one step of a
 * model as fused operators) into a *plan*, and replays that plan once per step.  The operators and their arithmetic
 * are defined in abi/OPS.md; this file defines the bytes.
 *
 * Rules that hold everywhere
 *  - Little-endian, 64-bit.  No enum, bool, long, size_t, bit-field, union or struct by value crosses the border.
 *  - A struct passed to or from a call starts with struct_size, the bytes its *caller* knows.  A callee reads the
 *    part it knows, takes what is missing as zero, and answers SPD_E_ABI when the part it does not know is not all
 *    zero (spd_tail_zero).  Into an out-struct it writes min(own size, struct_size) bytes and nothing beyond.
 *    The two tables, spd_host and spd_api, are read as far as they are known: who does not know a function does not
 *    call it.
 *  - Array elements carry no struct_size: the array's container says the stride.
 *  - Zero is the default of every field, and an unknown flag, operator or dtype is refused, never ignored.
 *  - Nobody frees the other side's memory.  Errors are owned by the caller, strings are static or copied.
 *  - No exception, panic or longjmp leaves a plugin.  Host calls never block and never call back in.
 *
 * Tags say who may call: [control] one thread at a time per instance, may take seconds; [queue] one thread at a time
 * per queue, different queues in parallel; [any] any thread at any time.
 *
 * How it grows: from minor to minor, fields are appended to structs, functions to the table, operators and flags take
 * new numbers; nothing moves, is renamed or changes its meaning, and abi/layout.txt records every offset.  A plugin
 * runs under every daemon of its major: SPD_LAYOUT, compiled into its table, tells the daemon that the plugin's
 * compiler saw every field where the daemon sees it.  The major stays 0 until vendor plugins have run on their chips.
 * Compiles as C11 and C++17 without warnings.
 */
#ifndef SPARSED_PLUGIN_H
#define SPARSED_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define SPD_STATIC_ASSERT(condition, message) static_assert(condition, message)
#else
#define SPD_STATIC_ASSERT(condition, message) _Static_assert(condition, message)
#endif
#define SPD_EXPORT __attribute__((visibility("default")))

#define SPD_ABI_MAJOR 0u
#define SPD_ABI_MINOR 6u

SPD_STATIC_ASSERT(sizeof(void *) == 8, "sparsed plugins are 64-bit only");

/* True when the caller of `s` knows the field `f` of type `T`. */
#define SPD_HAS(s, T, f) ((s)->struct_size >= offsetof(T, f) + sizeof(((T *)0)->f))

/* True when all bytes of `s` past `known` are zero, that is, when a callee that knows `known` bytes may go on. */
static inline int spd_tail_zero(const void *s, uint32_t known) {
  const uint8_t *byte = (const uint8_t *)s;
  uint32_t size = *(const uint32_t *)s;
  for (uint32_t i = known; i < size; i++)
    if (byte[i] != 0) return 0;
  return 1;
}

/* ---- status ------------------------------------------------------------------------------------------------ */

typedef int32_t spd_status;
#define SPD_OK 0
#define SPD_NOT_READY 1       /* the only positive status: ask again                                     */
#define SPD_E_INVALID -1      /* the caller broke the contract; nothing has changed                      */
#define SPD_E_UNSUPPORTED -2  /* operator, dtype, shape or flag this plugin does not have                */
#define SPD_E_ABI -3          /* struct_size or version not understood                                   */
#define SPD_E_NOMEM_DEVICE -4 /* would pass the device's memory or mem_budget; nothing has changed       */
#define SPD_E_NOMEM_HOST -5   /* host memory is out; nothing has changed                                 */
#define SPD_E_BUSY -6         /* the object has work in flight                                           */
#define SPD_E_CANCELLED -7    /* the work was cancelled before it finished                               */
#define SPD_E_TIMEOUT -8      /* the wait timed out; the work goes on                                    */
#define SPD_E_DATA -9         /* a checksum, a format or the NaN guard tripped                           */
#define SPD_E_DRIVER -10      /* the driver, firmware or runtime does not fit                            */
#define SPD_E_STEP -11        /* this step failed; the queue can go on, the step may be repeated         */
#define SPD_E_QUEUE_LOST -12  /* the queue is poisoned; the device may be reopened                       */
#define SPD_E_DEVICE_LOST -13 /* the device is gone or hangs                                             */
#define SPD_E_INTERNAL -14    /* a fault in the plugin; treated as SPD_E_DEVICE_LOST                     */

#define SPD_ERR_RETRYABLE 1u
#define SPD_ERR_STICKY 2u

/* What went wrong.  Owned by the caller, filled by the plugin, nothing to free; a NULL error is legal everywhere. */
typedef struct spd_error {
  uint32_t struct_size;
  int32_t status;
  uint32_t flags;      /* SPD_ERR_*                                       */
  uint32_t op_index;   /* the operator that failed, or 0xffffffff         */
  int64_t vendor_code; /* cudaError_t, aclError, cnrtRet_t or errno       */
  uint64_t block;      /* the KV block whose data is bad, or UINT64_MAX   */
  char message[224];   /* UTF-8, always NUL-terminated                    */
} spd_error;
SPD_STATIC_ASSERT(sizeof(spd_error) == 256, "spd_error");

typedef struct spd_instance spd_instance;
typedef struct spd_device spd_device;
typedef struct spd_weight spd_weight;
typedef struct spd_kvpool spd_kvpool;
typedef struct spd_plan spd_plan;
typedef struct spd_queue spd_queue;

/* ---- host services: what the daemon offers to a plugin ------------------------------------------------------ */

/* Priorities of syslog and the journal. */
#define SPD_LOG_ERROR 3
#define SPD_LOG_WARN 4
#define SPD_LOG_INFO 6
#define SPD_LOG_DEBUG 7

/* Lives as long as the instance.  Every function is [any], does not block, and never calls into the plugin. */
typedef struct spd_host {
  uint32_t struct_size;
  uint32_t abi_minor;
  void *context;           /* first argument of every function below      */
  const char *name;        /* "sparsed"                                   */
  const char *version;     /* of the daemon                               */
  int32_t max_log_level;   /* SPD_LOG_*: what is dropped need not be made */
  uint32_t flags;
  /* Copies the message; may drop it under pressure. */
  void (*log)(void *context, int32_t level, const char *target, const char *message, uint64_t length);
  /* Says that `timeline` of the queue with this cookie has completed.  For plugins with SPD_FEAT_NOTIFY. */
  void (*notify)(void *context, uint64_t queue_cookie, uint64_t timeline, spd_status status);
  /* Reports a change of health, a hot-unplug or an ECC event of a device. */
  void (*device_event)(void *context, uint64_t device_cookie, uint32_t kind, int64_t argument);
  /* CLOCK_MONOTONIC in nanoseconds. */
  uint64_t (*now_ns)(void *context);
  /* The operator's setting for this plugin, or NULL; the string lives as long as the instance. */
  const char *(*config)(void *context, const char *key);
  /* An optional capability by id ("sparsed.name/1"), or NULL. */
  const void *(*extension)(void *context, const char *id);
} spd_host;

/* ---- devices -------------------------------------------------------------------------------------------------- */

#define SPD_DEV_CPU 1u
#define SPD_DEV_GPU 2u
#define SPD_DEV_NPU 3u

#define SPD_FEAT_ASYNC (1ull << 0)         /* queue_run only enqueues                                      */
#define SPD_FEAT_NOTIFY (1ull << 1)        /* calls host.notify                                            */
#define SPD_FEAT_GRAPH (1ull << 2)         /* replays captured plans                                       */
#define SPD_FEAT_HOST_WEIGHTS (1ull << 3)  /* SPD_W_HOST_IN_PLACE is taken: weights are read where they lie */
#define SPD_FEAT_UNIFIED_MEM (1ull << 4)   /* device memory is host memory                                 */
#define SPD_FEAT_PROFILE (1ull << 5)       /* fills spd_run.profile                                        */
#define SPD_FEAT_CANCEL_MID (1ull << 6)    /* looks at spd_run.cancel inside a step                        */
#define SPD_FEAT_DETERMINISTIC (1ull << 7) /* the same step gives the same bits                            */
#define SPD_FEAT_INVARIANT (1ull << 8)     /* a row's bits depend on its own sequence only: not on what shares its
                                              batch, nor on how the prompt was cut into chunks */
#define SPD_FEAT_SLOW_FILE (1ull << 9)     /* takes spd_kv_slow.fd                                         */
#define SPD_FEAT_SLOW_HOST (1ull << 10)    /* takes spd_kv_slow.ptr                                        */
#define SPD_FEAT_SLOW_SEALED (1ull << 11)  /* takes spd_kv_slow.key with every cipher; since 0.6           */

#define SPD_DTYPE_WORDS 4
typedef struct spd_device_info {
  uint32_t struct_size;
  uint32_t kind;                           /* SPD_DEV_*                                   */
  char id[64];                             /* stable: PCI address, or "cpu"               */
  char name[64];
  char driver[64];
  uint32_t pci_vendor, pci_device;
  uint32_t score;                          /* 0: cannot run here; higher: prefer          */
  uint32_t compute_major, compute_minor;
  uint32_t numa_node;                      /* 0xffffffff: unknown                         */
  uint64_t mem_total;                      /* bytes                                       */
  uint64_t features;                       /* SPD_FEAT_*                                  */
  uint64_t weight_dtypes[SPD_DTYPE_WORDS]; /* bit d: LINEAR takes weights of dtype d      */
  uint64_t row_dtypes[SPD_DTYPE_WORDS];    /* bit d: KV rows may be stored as dtype d     */
  uint32_t max_tokens, max_seqs;           /* per step; 0: no limit of its own            */
  uint32_t max_context, max_topk;
  uint32_t block_tokens_align;             /* block_tokens must be a multiple of this     */
  uint32_t reserved;
} spd_device_info;

typedef struct spd_open_options {
  uint32_t struct_size;
  uint32_t n_threads;       /* 0: the plugin's choice                        */
  uint64_t device_cookie;   /* for host.device_event                         */
  uint64_t mem_budget;      /* bytes, a hard cap; 0: none                    */
  const uint64_t *cpu_mask; /* affinity words, or NULL; read during the call */
  uint32_t cpu_mask_words;
  uint32_t flags;
} spd_open_options;

typedef struct spd_mem_info {
  uint32_t struct_size, reserved;
  uint64_t total, free, budget; /* bytes, as the driver sees them */
  uint64_t used_weights, used_kv, used_workspace, used_plans, used_other;
} spd_mem_info;

#define SPD_HEALTH_OK 0u
#define SPD_HEALTH_DEGRADED 1u
#define SPD_HEALTH_LOST 2u
typedef struct spd_health {
  uint32_t struct_size;
  uint32_t state;                                  /* SPD_HEALTH_*         */
  int32_t temperature_millicelsius, power_milliwatt; /* INT32_MIN: unknown */
  uint32_t utilisation_permille, throttle_bits;
  uint64_t ecc_corrected, ecc_uncorrected;
} spd_health;

/* ---- dtypes: ggml's numbers where ggml has one; ours begin at 128 ---------------------------------------------- */

#define SPD_DT_F32 0u
#define SPD_DT_F16 1u
#define SPD_DT_Q4_0 2u
#define SPD_DT_Q4_1 3u
#define SPD_DT_Q5_0 6u
#define SPD_DT_Q5_1 7u
#define SPD_DT_Q8_0 8u
#define SPD_DT_Q2_K 10u
#define SPD_DT_Q3_K 11u
#define SPD_DT_Q4_K 12u
#define SPD_DT_Q5_K 13u
#define SPD_DT_Q6_K 14u
#define SPD_DT_IQ4_NL 20u
#define SPD_DT_IQ4_XS 23u
#define SPD_DT_I32 26u
#define SPD_DT_BF16 30u
#define SPD_DT_MXFP4 39u
#define SPD_DT_F8E4M3 129u /* e4m3fn, one byte a value, no scale */
#define SPD_DT_W16 130u    /* KV rows: 16-bit words, a power of two for a row; since 0.3 */
#define SPD_DT_F8_128 131u /* KV rows: e4m3fn, a power of two for each 128 values; since 0.4 */
#define SPD_DT_Q6_0 132u   /* KV rows: 6 bits, an f16 scale for each 32 values; since 0.6 */

/* ---- weights --------------------------------------------------------------------------------------------------- */

#define SPD_W_HOST_IN_PLACE 1u /* the uploaded bytes stay valid and unchanged until weight_destroy */

/* `batch` matrices of rows x cols, row-major, each row a whole number of dtype blocks: y[rows] = W[rows, cols] x[cols].
 * A vector is 1 x cols.  batch counts experts or heads and is at least 1. */
typedef struct spd_weight_desc {
  uint32_t struct_size;
  uint32_t dtype;
  uint32_t batch;
  uint32_t flags;      /* SPD_W_*            */
  uint64_t rows, cols;
  char name[64];       /* for messages only  */
} spd_weight_desc;

/* Where bytes come from: at `ptr`, or, when it is NULL, `length` bytes at `offset` of the file `fd`.  With both, they
 * are the same bytes, and whoever passes them on to another process may pass the file.  fd is 0 or less without one. */
typedef struct spd_source {
  uint32_t struct_size;
  int32_t fd;
  const void *ptr;
  uint64_t offset, length;
} spd_source;

/* ---- the KV pool ----------------------------------------------------------------------------------------------- */

/* How one row of a plane is stored: `width` values as `dtype` (abi/OPS.md, "Rows in the pool").  Width 0: no such row.
 * The latent and the rope row may differ: of Q6_0 latents and Q8_0 rope rows, for one. */
typedef struct spd_row {
  uint32_t dtype, width;
} spd_row;

/* The slow tier of a pool: an area, in a file or in host memory, where the latent planes of blocks may lie that have no
 * room on the device.  The daemon writes it, the plugin only reads it, inside a step, and keeps what it read in a row
 * cache of cache_bytes.  SPD_KV_TO_SLOW says where a block lies; abi/OPS.md defines its pages.  The cache may fill bit by
 * bit; SPD_KV_LIMIT_CACHE makes it smaller while memory is short.  With a key the pages are encrypted: they are on a disk,
 * and the key is random, of this area only, and nowhere but in memory. */
#define SPD_SLOW_AES_256_GCM 1u       /* RFC 5116 */
#define SPD_SLOW_CHACHA20_POLY1305 2u /* RFC 8439 */
typedef struct spd_kv_slow {
  uint32_t struct_size, flags;
  int32_t fd;            /* open for reading as long as the pool lives; 0 or less: `ptr`        */
  uint32_t page_bytes;   /* 4096                                                                */
  const void *ptr;       /* host memory, 4096-aligned, as long as the pool lives                */
  uint64_t offset;       /* where the area begins in the file or at ptr, a multiple of a page   */
  uint64_t length;       /* of the area                                                         */
  uint64_t cache_bytes;  /* memory of the row cache, on top of the pool's                       */
  const void *key;       /* 32 bytes, read during the call; NULL: pages are plain               */
  uint32_t cipher;       /* SPD_SLOW_*; 0 without a key                                         */
  uint32_t reserved;
} spd_kv_slow;

/* n_blocks blocks of block_tokens tokens.  Two planes: an index plane with one index row per index layer and token,
 * and a latent plane with one latent row followed by one rope row per layer and token.  Layers of a plane are counted
 * from 0; spd_op.layer names them.  Slot s is token s % block_tokens of block s / block_tokens. */
typedef struct spd_kv_desc {
  uint32_t struct_size, flags;
  uint32_t block_tokens, n_blocks;
  uint32_t n_layers, n_index_layers;
  spd_row latent, rope, index;
  const spd_kv_slow *slow; /* NULL: none; read during the call */
} spd_kv_desc;

/* Sizes of a pool.  The host image of a block is the same for every plugin: for each index layer, for each token, the
 * index row; then for each layer, for each token, the latent row and the rope row; nothing in between.  Rows of
 * quantised dtypes are in ggml's block layout. */
typedef struct spd_kv_info {
  uint32_t struct_size, reserved;
  uint64_t device_bytes;         /* the whole pool, padding included, when every block is in use */
  uint64_t image_bytes;          /* one block's host image                                       */
  uint64_t image_latent_offset;  /* where the latent plane begins in it                          */
} spd_kv_info;

#define SPD_KV_COPY 1u    /* dst_block = src_block, first n_tokens tokens of every layer                */
#define SPD_KV_EXPORT 2u  /* the host image at host_offset = src_block                                  */
#define SPD_KV_IMPORT 3u  /* dst_block = the host image at host_offset                                  */
#define SPD_KV_DISCARD 4u /* dst_block's content is not needed any more: zero it, give its memory back  */
#define SPD_KV_TO_SLOW 5u /* dst_block's latent plane lies at slow_offset: read it there, give its memory back; no
                             token may be appended to it any more.  Its index plane stays.            */
#define SPD_KV_TO_FAST 6u /* dst_block's latent plane is read back into the pool                         */
#define SPD_KV_LIMIT_CACHE 7u /* the row cache takes cache_bytes at most, and no more than it was made with: rows beyond
                                 are forgotten and their memory given back.  Since minor 5; SPD_E_UNSUPPORTED: it keeps
                                 its size.                                                         */
typedef struct spd_kv_op {
  uint32_t kind, src_block, dst_block, n_tokens;
  uint64_t host_offset; /* into the host buffer of the call                       */
  uint64_t slow_offset; /* TO_SLOW: into the slow area, a multiple of a page      */
  uint64_t tag;         /* TO_SLOW: what every page of the block carries          */
  uint64_t cache_bytes; /* LIMIT_CACHE                                            */
} spd_kv_op;

/* EXPORT, COPY and DISCARD take slow blocks too; TO_SLOW of a slow block moves where it is read; IMPORT makes it fast.
 * A page that is not what it should be fails the step or the operation with SPD_E_DATA and spd_error.block; nothing is
 * lost by it, the step may be repeated once the block has been made good. */

/* ---- programs -------------------------------------------------------------------------------------------------- */

/* What a device refuses need not be a program's end: a program may be cut at any tensor, which becomes an OUTPUT of one
 * part and an INPUT of the next, each part compiled where it can run (`supports` says where).  Both parts see the same
 * step.
 *
 * A blob without pointers: header | tensors | operators | attribute bytes, offsets from the start of the blob, all
 * 8-aligned.  The same bytes are compiled, hashed, fuzzed and copied to another process. */
#define SPD_PROGRAM_MAGIC 0x50445053u /* "SPDP" */
typedef struct spd_program {
  uint32_t magic, struct_size;
  uint32_t abi_minor, flags;
  uint32_t n_tensors, tensor_stride, tensor_offset;
  uint32_t n_ops, op_stride, op_offset;
  uint32_t total_size;
  uint32_t n_weights, n_kvpools; /* lengths of the arrays bound at compile */
  uint32_t reserved;
} spd_program;

#define SPD_T_ACTIVATION 0u /* inside the plan; the plugin places it                              */
#define SPD_T_INPUT 1u      /* read from spd_run.in                                               */
#define SPD_T_OUTPUT 2u     /* written to spd_run.out                                             */
#define SPD_T_WEIGHT 3u     /* bind: index into spd_compile.weights; dims: those of the weight    */
#define SPD_T_VIEW 4u       /* bind: the parent tensor (not a view itself); view_offset, stride   */

#define SPD_DIM_TOKENS (-1) /* T: tokens of the step       */
#define SPD_DIM_SEQS (-2)   /* S: sequences of the step    */
#define SPD_DIM_LOGITS (-3) /* L: rows that need logits    */

/* Row-major, slowest dimension first; only dim[0] may be symbolic.  Tensors other than views are packed.  A view may
 * be an operator's input, never its output. */
typedef struct spd_tensor {
  uint32_t kind, dtype;
  uint32_t rank, bind;
  int32_t dim[4];
  int64_t view_offset; /* elements from the parent's start                                   */
  int32_t stride[3];   /* elements between steps of dim 0 .. rank - 2 of a view; 0: packed   */
  uint32_t flags;
} spd_tensor;
SPD_STATIC_ASSERT(sizeof(spd_tensor) == 56, "spd_tensor");

#define SPD_NO_TENSOR 0xffffffffu
/* One operator; what in, out, i and f mean is in abi/OPS.md. */
typedef struct spd_op {
  uint32_t kind, flags;
  uint32_t in[6], out[3]; /* tensor numbers or SPD_NO_TENSOR            */
  uint32_t layer, kvpool; /* plane layer and index into the bound pools */
  int32_t i[6];
  float f[4];
  uint32_t attr_offset, attr_length;
  uint32_t reserved;
} spd_op;
SPD_STATIC_ASSERT(sizeof(spd_op) == 104, "spd_op");

#define SPD_OP_EMBED 1u
#define SPD_OP_RMS_NORM 2u
#define SPD_OP_LAYER_NORM 3u
#define SPD_OP_LINEAR 4u
#define SPD_OP_ROPE 5u
#define SPD_OP_MLA_ABSORB 6u
#define SPD_OP_MLA_EXPAND 7u
#define SPD_OP_KV_APPEND 8u
#define SPD_OP_IDX_APPEND 9u
#define SPD_OP_IDX_TOPK 10u
#define SPD_OP_SPARSE_MLA 11u
#define SPD_OP_DENSE_MLA 12u
#define SPD_OP_MOE_ROUTE 13u
#define SPD_OP_MOE_LINEAR 14u
#define SPD_OP_MOE_COMBINE 15u
#define SPD_OP_SILU_MUL 16u
#define SPD_OP_ADD 17u
#define SPD_OP_GATHER_ROWS 18u
#define SPD_OP_HADAMARD 19u
#define SPD_OP_EXT_BASE 0x80000000u /* vendor operators */

/* ---- compile and run ------------------------------------------------------------------------------------------- */

/* The largest step a plan must take. */
typedef struct spd_bucket {
  uint32_t max_tokens, max_seqs, max_logits, max_context;
} spd_bucket;

#define SPD_COMPILE_DRY_RUN 1u /* fill spd_plan_info, create nothing */
typedef struct spd_compile {
  uint32_t struct_size, flags;
  const void *blob; /* 8-aligned; read during the call */
  uint64_t blob_length;
  spd_weight *const *weights;
  spd_kvpool *const *kvpools;
  uint32_t n_weights, n_kvpools;
  const spd_bucket *buckets;
  uint32_t n_buckets, bucket_stride;
  const char *cache_dir; /* NULL: no cache on disk */
} spd_compile;

typedef struct spd_plan_info {
  uint32_t struct_size, flags;
  uint64_t workspace_bytes, graph_bytes, host_bytes;
  uint64_t in_bytes, out_bytes; /* arenas of the largest step                        */
  uint64_t compile_ns;
  uint32_t unsupported_op;      /* the first operator refused, or 0xffffffff         */
  uint32_t n_launches;          /* after fusion; for information                     */
} spd_plan_info;

/* What one step works on.  The arrays follow in the same buffer, at 8-aligned offsets from the start of this header.
 * Tokens of a sequence are neighbours, in order of position, and sequence q owns tokens seq_offset[q] ..
 * seq_offset[q+1].  Its context is the block ids block_offset[q] .. block_offset[q+1], the first block first. */
typedef struct spd_step {
  uint32_t struct_size, flags;
  uint32_t n_tokens, n_seqs, n_logits, n_blocks;
  uint64_t step_id;
  uint32_t token_offset;    /* u32[T] token ids                                          */
  uint32_t position_offset; /* u32[T] positions in the sequence                          */
  uint32_t slot_offset;     /* u64[T] KV slots for the tokens' rows, no two alike         */
  uint32_t seq_offset;      /* u32[S+1]                                                  */
  uint32_t context_offset;  /* u32[S] tokens in the cache once this step has appended    */
  uint32_t block_offset;    /* u32[S+1] ranges of the block ids                          */
  uint32_t block_id_offset; /* u32[n_blocks]                                             */
  uint32_t row_offset;      /* u32[L] token of each row that needs logits, ascending     */
  uint32_t total_size;      /* header and arrays                                         */
  uint32_t reserved;
} spd_step;

#define SPD_STEP_PROFILE 1u
#define SPD_STEP_NAN_GUARD 2u /* a NaN in an output fails the step with SPD_E_DATA */
/* Operators first_op .. first_op + n_ops, fused or not, took from begin_ns to end_ns of some clock of the device's. */
typedef struct spd_profile {
  uint32_t first_op, n_ops;
  uint64_t begin_ns, end_ns;
} spd_profile;

/* INPUT and OUTPUT tensors lie in their arenas in order of tensor number, each packed and begun at a multiple of 64
 * bytes, with this step's T, S and L.  `in` and `step` may be reused after the call; `out` belongs to the plugin until
 * the step's timeline value completes, and what lies between its tensors may be written.
 *
 * With SPD_STEP_PROFILE the plugin fills, before that, up to profile_capacity records that lie profile_stride bytes
 * apart, in order of begin_ns; a record whose n_ops is 0 follows the last one where there is room. */
typedef struct spd_run {
  uint32_t struct_size, flags;
  const spd_step *step;
  const void *in;
  uint64_t in_length;
  void *out;
  uint64_t out_length;
  const uint32_t *cancel; /* not 0: give up with SPD_E_CANCELLED; NULL: never */
  spd_profile *profile;
  uint32_t profile_capacity, profile_stride;
} spd_run;

/* ---- the table ------------------------------------------------------------------------------------------------- */

/* Static, valid for the life of the process.  Every pointer up to `extension` is set; what later minors append may be
 * NULL.
 *
 * Lifetimes: an instance outlives its devices; a device outlives its weights, pools, plans and queues; weights and
 * pools outlive the plans bound to them.  The host drains a queue before it destroys anything the queue may use.
 * No device memory is allocated after plan_compile: a step cannot run out of it.
 *
 * A step is idempotent: the same tokens into the same slots write the same rows, so a failed step may be repeated. */
typedef struct spd_api {
  uint32_t struct_size, abi_minor;
  uint64_t layout; /* SPD_LAYOUT */
  const char *plugin_id, *plugin_version;
  uint64_t required_host_features;

  /* [control] */
  spd_status (*instance_create)(const spd_host *, spd_instance **, spd_error *);
  void (*instance_destroy)(spd_instance *);
  spd_status (*device_count)(spd_instance *, uint32_t *, spd_error *);
  spd_status (*device_info)(spd_instance *, uint32_t index, spd_device_info *, spd_error *);
  spd_status (*device_open)(spd_instance *, uint32_t index, const spd_open_options *, spd_device **, spd_error *);
  void (*device_close)(spd_device *);
  /* Quick (level 0, under a second) or thorough (level 1) check that the device computes. */
  spd_status (*self_test)(spd_device *, uint32_t level, spd_error *);

  /* [any] */
  spd_status (*mem_info)(spd_device *, spd_mem_info *, spd_error *);
  spd_status (*health)(spd_device *, spd_health *, spd_error *);

  /* [control]  SPD_OK when the operator of this program can be run, else SPD_E_UNSUPPORTED and why. */
  spd_status (*supports)(spd_device *, const void *blob, uint64_t length, uint32_t op_index, spd_error *);
  /* Memory that both sides reach, for arenas. */
  spd_status (*host_alloc)(spd_device *, uint64_t length, uint64_t align, void **, spd_error *);
  void (*host_free)(spd_device *, void *);
  /* Lets the device reach memory of the host's (pinned, mapped) until host_unregister; SPD_E_UNSUPPORTED where it
   * cannot, then arenas there are copied. */
  spd_status (*host_register)(spd_device *, void *, uint64_t length, spd_error *);
  void (*host_unregister)(spd_device *, void *);

  /* [control]  create, upload every batch, commit; only then bind. */
  spd_status (*weight_create)(spd_device *, const spd_weight_desc *, spd_weight **, spd_error *);
  spd_status (*weight_upload)(spd_weight *, uint32_t first_batch, uint32_t n_batch, const spd_source *, spd_error *);
  spd_status (*weight_commit)(spd_weight *, spd_error *);
  void (*weight_destroy)(spd_weight *);

  /* [control]  Rows of a new pool read as zero. */
  spd_status (*kv_create)(spd_device *, const spd_kv_desc *, spd_kvpool **, spd_kv_info *, spd_error *);
  void (*kv_destroy)(spd_kvpool *);

  /* [control] */
  spd_status (*plan_compile)(spd_device *, const spd_compile *, spd_plan **, spd_plan_info *, spd_error *);
  void (*plan_destroy)(spd_plan *);

  /* [control] */
  spd_status (*queue_create)(spd_device *, uint32_t priority, uint64_t cookie, spd_queue **, spd_error *);
  void (*queue_destroy)(spd_queue *);
  /* [queue]  Each gives the work a timeline value greater than any before it; values complete in that order.  Without
   * SPD_FEAT_ASYNC the work is done when the call returns, and its status is the work's.  With it, the call's status
   * says that the work was taken; what became of it is the answer of queue_wait for its value.  Handles that the work
   * uses, `profile` and `cancel` stay valid until then.  A call waits while no more work can be in flight; SPD_E_BUSY
   * says that this took too long, and nothing was taken.  One plan may be in flight on several queues, and its steps
   * may then run one after another.  Without SPD_FEAT_CANCEL_MID, `cancel` is looked at when the work is taken. */
  spd_status (*queue_run)(spd_queue *, spd_plan *, const spd_run *, uint64_t *timeline, spd_error *);
  spd_status (*queue_kv)(spd_queue *, spd_kvpool *, const spd_kv_op *, uint32_t n_ops, uint32_t stride, void *host,
                         uint64_t host_length, uint64_t *timeline, spd_error *);
  /* Work enqueued from now on waits until `timeline` of `other`, a queue of the same device, has completed, well or
   * badly: this orders, it carries no failure.  SPD_E_INVALID for a value that was never given. */
  spd_status (*queue_wait_queue)(spd_queue *, spd_queue *other, uint64_t timeline, spd_error *);
  /* [any]  The greatest value that has completed, well or badly. */
  spd_status (*queue_query)(spd_queue *, uint64_t *completed, spd_error *);
  /* Waits until `timeline` has completed and answers with that work's status and error, SPD_E_TIMEOUT before.  0 asks
   * without waiting, UINT64_MAX waits without end.  A plugin remembers at least the last 1000 values; SPD_E_INVALID for
   * those it has forgotten or never gave. */
  spd_status (*queue_wait)(spd_queue *, uint64_t timeline, uint64_t timeout_ns, spd_error *);
  /* Work in flight from this value on ends with SPD_E_CANCELLED, as soon as the device can, unless it completes first.
   * Work that is taken later is not touched; a value that is in nobody's flight is SPD_OK. */
  spd_status (*queue_cancel)(spd_queue *, uint64_t from_timeline, spd_error *);
  /* [any]  An optional capability by id, or NULL. */
  const void *(*extension)(spd_instance *, const char *id);
} spd_api;

/* A digest of where the compiler put every field above: a field inserted, moved or resized gives another one, a field
 * appended does not.  Compiled into spd_api.layout, so that the daemon refuses a plugin whose header was changed
 * otherwise than by the rules. */
#define SPD_MIX(h, s, a, b, c, d)                                                                              \
  (((h) ^ ((uint64_t)offsetof(s, a) | (uint64_t)offsetof(s, b) << 12 | (uint64_t)offsetof(s, c) << 24 |          \
           (uint64_t)offsetof(s, d) << 36)) *                                                                    \
   0x100000001b3ull)
#define SPD_L0 SPD_MIX(0xcbf29ce484222325ull, spd_error, struct_size, status, flags, op_index)
#define SPD_L1 SPD_MIX(SPD_L0, spd_error, vendor_code, block, message, message)
#define SPD_L2 SPD_MIX(SPD_L1, spd_host, struct_size, abi_minor, context, name)
#define SPD_L3 SPD_MIX(SPD_L2, spd_host, version, max_log_level, flags, log)
#define SPD_L4 SPD_MIX(SPD_L3, spd_host, notify, device_event, now_ns, config)
#define SPD_L5 SPD_MIX(SPD_L4, spd_host, extension, extension, extension, extension)
#define SPD_L6 SPD_MIX(SPD_L5, spd_device_info, struct_size, kind, id, name)
#define SPD_L7 SPD_MIX(SPD_L6, spd_device_info, driver, pci_vendor, pci_device, score)
#define SPD_L8 SPD_MIX(SPD_L7, spd_device_info, compute_major, compute_minor, numa_node, mem_total)
#define SPD_L9 SPD_MIX(SPD_L8, spd_device_info, features, weight_dtypes, row_dtypes, max_tokens)
#define SPD_L10 SPD_MIX(SPD_L9, spd_device_info, max_seqs, max_context, max_topk, block_tokens_align)
#define SPD_L11 SPD_MIX(SPD_L10, spd_device_info, reserved, reserved, reserved, reserved)
#define SPD_L12 SPD_MIX(SPD_L11, spd_open_options, struct_size, n_threads, device_cookie, mem_budget)
#define SPD_L13 SPD_MIX(SPD_L12, spd_open_options, cpu_mask, cpu_mask_words, flags, flags)
#define SPD_L14 SPD_MIX(SPD_L13, spd_mem_info, struct_size, reserved, total, free)
#define SPD_L15 SPD_MIX(SPD_L14, spd_mem_info, budget, used_weights, used_kv, used_workspace)
#define SPD_L16 SPD_MIX(SPD_L15, spd_mem_info, used_plans, used_other, used_other, used_other)
#define SPD_L17 SPD_MIX(SPD_L16, spd_health, struct_size, state, temperature_millicelsius, power_milliwatt)
#define SPD_L18 SPD_MIX(SPD_L17, spd_health, utilisation_permille, throttle_bits, ecc_corrected, ecc_uncorrected)
#define SPD_L19 SPD_MIX(SPD_L18, spd_weight_desc, struct_size, dtype, batch, flags)
#define SPD_L20 SPD_MIX(SPD_L19, spd_weight_desc, rows, cols, name, name)
#define SPD_L21 SPD_MIX(SPD_L20, spd_source, struct_size, fd, ptr, offset)
#define SPD_L22 SPD_MIX(SPD_L21, spd_source, length, length, length, length)
#define SPD_L23 SPD_MIX(SPD_L22, spd_row, dtype, width, width, width)
#define SPD_L24 SPD_MIX(SPD_L23, spd_kv_slow, struct_size, flags, fd, page_bytes)
#define SPD_L25 SPD_MIX(SPD_L24, spd_kv_slow, ptr, offset, length, cache_bytes)
#define SPD_L26 SPD_MIX(SPD_L25, spd_kv_desc, struct_size, flags, block_tokens, n_blocks)
#define SPD_L27 SPD_MIX(SPD_L26, spd_kv_desc, n_layers, n_index_layers, latent, rope)
#define SPD_L28 SPD_MIX(SPD_L27, spd_kv_desc, index, slow, slow, slow)
#define SPD_L29 SPD_MIX(SPD_L28, spd_kv_info, struct_size, reserved, device_bytes, image_bytes)
#define SPD_L30 SPD_MIX(SPD_L29, spd_kv_info, image_latent_offset, image_latent_offset, image_latent_offset, \
                        image_latent_offset)
#define SPD_L31 SPD_MIX(SPD_L30, spd_kv_op, kind, src_block, dst_block, n_tokens)
#define SPD_L32 SPD_MIX(SPD_L31, spd_kv_op, host_offset, slow_offset, tag, tag)
#define SPD_L33 SPD_MIX(SPD_L32, spd_program, magic, struct_size, abi_minor, flags)
#define SPD_L34 SPD_MIX(SPD_L33, spd_program, n_tensors, tensor_stride, tensor_offset, n_ops)
#define SPD_L35 SPD_MIX(SPD_L34, spd_program, op_stride, op_offset, total_size, n_weights)
#define SPD_L36 SPD_MIX(SPD_L35, spd_program, n_kvpools, reserved, reserved, reserved)
#define SPD_L37 SPD_MIX(SPD_L36, spd_tensor, kind, dtype, rank, bind)
#define SPD_L38 SPD_MIX(SPD_L37, spd_tensor, dim, view_offset, stride, flags)
#define SPD_L39 SPD_MIX(SPD_L38, spd_op, kind, flags, in, out)
#define SPD_L40 SPD_MIX(SPD_L39, spd_op, layer, kvpool, i, f)
#define SPD_L41 SPD_MIX(SPD_L40, spd_op, attr_offset, attr_length, reserved, reserved)
#define SPD_L42 SPD_MIX(SPD_L41, spd_bucket, max_tokens, max_seqs, max_logits, max_context)
#define SPD_L43 SPD_MIX(SPD_L42, spd_compile, struct_size, flags, blob, blob_length)
#define SPD_L44 SPD_MIX(SPD_L43, spd_compile, weights, kvpools, n_weights, n_kvpools)
#define SPD_L45 SPD_MIX(SPD_L44, spd_compile, buckets, n_buckets, bucket_stride, cache_dir)
#define SPD_L46 SPD_MIX(SPD_L45, spd_plan_info, struct_size, flags, workspace_bytes, graph_bytes)
#define SPD_L47 SPD_MIX(SPD_L46, spd_plan_info, host_bytes, in_bytes, out_bytes, compile_ns)
#define SPD_L48 SPD_MIX(SPD_L47, spd_plan_info, unsupported_op, n_launches, n_launches, n_launches)
#define SPD_L49 SPD_MIX(SPD_L48, spd_step, struct_size, flags, n_tokens, n_seqs)
#define SPD_L50 SPD_MIX(SPD_L49, spd_step, n_logits, n_blocks, step_id, token_offset)
#define SPD_L51 SPD_MIX(SPD_L50, spd_step, position_offset, slot_offset, seq_offset, context_offset)
#define SPD_L52 SPD_MIX(SPD_L51, spd_step, block_offset, block_id_offset, row_offset, total_size)
#define SPD_L53 SPD_MIX(SPD_L52, spd_step, reserved, reserved, reserved, reserved)
#define SPD_L54 SPD_MIX(SPD_L53, spd_profile, first_op, n_ops, begin_ns, end_ns)
#define SPD_L55 SPD_MIX(SPD_L54, spd_run, struct_size, flags, step, in)
#define SPD_L56 SPD_MIX(SPD_L55, spd_run, in_length, out, out_length, cancel)
#define SPD_L57 SPD_MIX(SPD_L56, spd_run, profile, profile_capacity, profile_stride, profile_stride)
#define SPD_L58 SPD_MIX(SPD_L57, spd_api, struct_size, abi_minor, layout, plugin_id)
#define SPD_L59 SPD_MIX(SPD_L58, spd_api, plugin_version, required_host_features, instance_create, instance_destroy)
#define SPD_L60 SPD_MIX(SPD_L59, spd_api, device_count, device_info, device_open, device_close)
#define SPD_L61 SPD_MIX(SPD_L60, spd_api, self_test, mem_info, health, supports)
#define SPD_L62 SPD_MIX(SPD_L61, spd_api, host_alloc, host_free, host_register, host_unregister)
#define SPD_L63 SPD_MIX(SPD_L62, spd_api, weight_create, weight_upload, weight_commit, weight_destroy)
#define SPD_L64 SPD_MIX(SPD_L63, spd_api, kv_create, kv_destroy, plan_compile, plan_destroy)
#define SPD_L65 SPD_MIX(SPD_L64, spd_api, queue_create, queue_destroy, queue_run, queue_kv)
#define SPD_L66 SPD_MIX(SPD_L65, spd_api, queue_wait_queue, queue_query, queue_wait, queue_cancel)
#define SPD_L67 SPD_MIX(SPD_L66, spd_api, extension, extension, extension, extension)
#define SPD_LAYOUT SPD_L67

/* The only exported symbol.  Called once per major the host speaks, newest first; answers with a static table or NULL.
 * Touches no device, allocates nothing. */
typedef const spd_api *(*spd_get_api_fn)(uint32_t abi_major, uint32_t host_minor);
SPD_EXPORT const spd_api *spd_get_api(uint32_t abi_major, uint32_t host_minor);

#ifdef __cplusplus
}
#endif
#endif /* SPARSED_PLUGIN_H */
