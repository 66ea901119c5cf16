/* What the files of the compiled helper ask of one another. Each structure has a twin in Python, of the same fields. */

#ifndef DISAGG_NATIVE_PARTS_H
#define DISAGG_NATIVE_PARTS_H

#include <stdint.h>

/* Layout of one layer's call; strides in elements. See native_attention.py. */
typedef struct {
    int64_t num_kv_heads, queries_per_head, head_dim, block_size, num_slots;
    int64_t slot_stride, kv_stride, head_stride;
    int64_t query_stride, query_head_stride;
    int64_t is_bfloat16; /* the pool; queries and outputs are float32 */
    float scale, softcap; /* softcap 0: none */
} Layout;

/* One query, at `position`: it attends to positions [0, num_sinks) and [first, position]. */
typedef struct {
    int64_t flat, table_at, first, position, num_sinks;
} Row;

/* One layer's call; strides in elements. See native_layers.py. */
typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, half; /* `half` pairs of dimensions are rotated */
    int64_t qkv_stride, kv_stride, head_stride;
    int64_t normed; /* bit k: whether Q, K, V are */
    float epsilon;
} Projection;

enum { SILU = 0, GELU_TANH = 1 };

/* `panels` hold bfloat16 as pairs of outputs i and i + PANEL / 2: one shift makes the first a float, a mask the second. */
typedef struct {
    int64_t depth, num_outputs, is_bfloat16;
    const char *panels;
    const float *bias; /* or NULL */
} Weight;

int64_t disagg_decode_rows(const Layout *at, int64_t first, int64_t last, const Row *rows, const int32_t *tables,
                           const float *query, const char *pool, const float *sinks, float *out);
void disagg_norm_rows(int64_t n, int64_t width, const float *x, int64_t stride, const float *gain, float epsilon,
                      float *out);
void disagg_gate_rows(int64_t n, int64_t width, const float *both, int64_t stride, int64_t kind, float *out);
void disagg_take_qkv(const Projection *of, int64_t n, const float *qkv, const float *bias, const float *gains,
                     const float *cos, const float *sin, const int64_t *at, float *pool, float *query);
void disagg_multiply(const Weight *of, int64_t n, const float *x, int64_t stride, float *out);

#endif
