/* One decoder layer over the decode rows of a step in one call: norm, attention, norm, gated layer, with what surrounds
   them. A step of few rows is else more calls than arithmetic.

   Built with native.c into one library and called by native_decoder.py. */

#include <stddef.h>
#include <stdint.h>

#include "native_parts.h"
#include "native_vectors.h"

/* An RMS norm; none where `gain` is NULL. */
typedef struct {
    const float *gain;
    float epsilon;
} Norm;

/* x + after(attention(before(x))), and of that y: y + after(gated(before(y))). See native_decoder.py. */
typedef struct {
    int64_t hidden, gated, activation; /* widths of a row and of what is gated */
    Norm before_attention, after_attention, before_gated, after_gated;
    const Weight *qkv, *output, *gate_up, *down;
    Projection projection;
    Layout attention;
    const float *bias, *gains, *sinks; /* of the projection, of its heads' norms, of the softmax; or NULL */
    char *pool;
    int64_t pool_size; /* elements */
} Decoder;

const int64_t disagg_decoder_nbytes = sizeof(Decoder); /* for a test that compares it with native_decoder.py's */

/* Floats of room that `n` rows need. */
int64_t disagg_decoder_room(const Decoder *of, int64_t n)
{
    const Projection *p = &of->projection;
    const int64_t attended = p->num_heads * p->head_dim, qkv = attended + 2 * p->num_kv_heads * p->head_dim;
    const int64_t widest = qkv > 2 * of->gated ? qkv : 2 * of->gated;
    const int64_t inner = 2 * attended > of->gated ? 2 * attended : of->gated;
    return n * (of->hidden + widest + inner);
}

INLINE void take_norm(const Decoder *of, const Norm *norm, int64_t n, const float *x, float *out)
{
    if (norm->gain)
        disagg_norm_rows(n, of->hidden, x, of->hidden, norm->gain, norm->epsilon, out);
}

INLINE void add(int64_t count, const float *x, const float *y, float *out)
{
    for (int64_t i = 0; i < count; i++)
        out[i] = x[i] + y[i];
}

/* `x` [n, hidden] through the layer to `out`. `cos`, `sin` [n, half]; `at[i]`: the pool's element where K of row i's
   head 0 goes; `rows` and `tables` as disagg_decode_rows takes them. Returns 0; or 1 + the row that needs a block
   without a slot; or -1 - the row whose K and V would go outside the pool, when nothing was written. */
int64_t disagg_decode_layer(const Decoder *of, int64_t n, const float *x, const float *cos, const float *sin,
                            const int64_t *at, const Row *rows, const int32_t *tables, float *room, float *out)
{
    const Projection *p = &of->projection;
    const int64_t attended = p->num_heads * p->head_dim, qkv = attended + 2 * p->num_kv_heads * p->head_dim;
    float *narrow = room, *wide = narrow + n * of->hidden;
    float *query = wide + n * (qkv > 2 * of->gated ? qkv : 2 * of->gated), *made = query + n * attended;
    for (int64_t i = 0; i < n; i++)
        if (at[i] < 0 || at[i] >= of->pool_size)
            return -1 - i;
    take_norm(of, &of->before_attention, n, x, narrow);
    disagg_multiply(of->qkv, n, narrow, of->hidden, wide);
    disagg_take_qkv(p, n, wide, of->bias, of->gains, cos, sin, at, (float *)of->pool, query);
    const int64_t failed =
        disagg_decode_rows(&of->attention, 0, n * p->num_kv_heads, rows, tables, query, of->pool, of->sinks, made);
    if (failed)
        return failed;
    disagg_multiply(of->output, n, made, attended, narrow);
    take_norm(of, &of->after_attention, n, narrow, narrow);
    add(n * of->hidden, x, narrow, out);
    take_norm(of, &of->before_gated, n, out, narrow);
    disagg_multiply(of->gate_up, n, narrow, of->hidden, wide);
    disagg_gate_rows(n, of->gated, wide, 2 * of->gated, of->activation, query);
    disagg_multiply(of->down, n, query, of->gated, narrow);
    take_norm(of, &of->after_gated, n, narrow, narrow);
    add(n * of->hidden, out, narrow, out);
    return 0;
}
