/* Attention of a run of consecutive queries of one sequence over a paged pool in float32.

   Keys are taken in chunks: K and V of a chunk are laid out in panels once, then every tile of queries that sees some of
   it multiplies with them and goes on with its softmax. Panels that no query of a tile sees are left out, so that
   nothing is computed above the diagonal or before the window but what a panel and a tile have beside them.

   Built with native.c into one library and called by native_prefill.py. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "native_panels.h"
#include "native_parts.h"
#include "native_vectors.h"

enum {
    CHUNK = 256, /* keys: K and V of a head of 64 take 128 KiB, scores of a tile 13 */
    TILE = 12,   /* queries; one tile of registers in AVX-512, two in AVX2 */
    ROW = CHUNK + LANES, /* scores: the last vector of a row may pass its end */
};

typedef struct {
    int64_t num_queries, start, window; /* position of the first; 0: no window */
} Queries;

const int64_t disagg_queries_nbytes = sizeof(Queries); /* for a test that compares it with native_prefill.py's */

/* Floats of room for heads of `head_dim`: K and V of a chunk, and the largest score and the sum of each query. */
int64_t disagg_prefill_room(int64_t head_dim, int64_t num_queries) { return 2 * CHUNK * head_dim + 2 * num_queries; }

/* K of keys [first, last) as [panel][dim][PANEL], V as [dim / PANEL][CHUNK][PANEL]; zeros behind the last. Returns 0, or
   1 where a block has no slot. */
INLINE int lay_out(const Layout *at, const char *pool, const int32_t *table, int64_t first, int64_t last, float *key,
                   float *value)
{
    const int64_t dim = at->head_dim;
    for (int64_t i = 0; i < CHUNK; i++) {
        float *k = key + i / PANEL * dim * PANEL + i % PANEL, *v = value + i * PANEL;
        const int64_t position = first + i;
        if (position >= last) {
            if (i % PANEL == 0)
                break; /* panels behind the last key are not looked at */
            for (int64_t d = 0; d < dim; d++)
                k[d * PANEL] = v[d / PANEL * CHUNK * PANEL + d % PANEL] = 0;
            continue;
        }
        const int32_t slot = table[position / at->block_size];
        if (slot <= 0 || slot >= at->num_slots) /* 0 is padding's */
            return 1;
        const float *from = (const float *)pool + slot * at->slot_stride + position % at->block_size * dim;
        for (int64_t d = 0; d < dim; d++)
            k[d * PANEL] = from[d];
        for (int64_t d = 0; d < dim; d += PANEL)
            memcpy(v + d * CHUNK, from + at->kv_stride + d, sizeof(float) * PANEL);
    }
    return 0;
}

/* Scores [begin, end) of a row to weights, 0 in the rest of [from, to), and what was summed before to the new largest
   score. */
INLINE void weigh(const Layout *at, float *scores, int64_t from, int64_t to, int64_t begin, int64_t end, float *max,
                  float *sum, float *out)
{
    const float before = *max;
    for (int64_t i = begin; i < end; i++)
        scores[i] *= at->scale;
    if (at->softcap > 0)
        for (int64_t i = begin; i < end; i++)
            scores[i] = at->softcap * tanhf(scores[i] / at->softcap);
    raise_to_largest(max, scores + begin, end - begin);
    if (*max != before) {
        const float factor = expf(before - *max); /* 0 at the first keys, where `before` is -inf */
        *sum *= factor;
        for (int64_t d = 0; d < at->head_dim; d++)
            out[d] *= factor;
    }
    *sum += exponentials(scores + begin, end - begin, *max == -INFINITY ? 0 : *max);
    memset(scores + from, 0, sizeof(float) * (size_t)(begin - from));
    memset(scores + end, 0, sizeof(float) * (size_t)(to - end));
}

/* Queries [0, n) of a tile, the first at `position`, over keys [first, last) as `lay_out` left them. */
INLINE void take_tile(int lanes, const Layout *at, int64_t window, int64_t position, int64_t n, const float *query,
                      int64_t first, int64_t last, const float *key, const float *value, float *max, float *sum,
                      float *out, int64_t out_stride)
{
    const int64_t dim = at->head_dim, end = last < position + n ? last : position + n;
    int64_t begin = window && position - window + 1 > first ? position - window + 1 : first;
    if (begin >= end)
        return;
    const int64_t from = (begin - first) / PANEL * PANEL, to = (end - first + PANEL - 1) / PANEL * PANEL;
    const Slice whole = {0, dim, 1}, more = {0, to - from, 0};
    float scores[TILE * ROW];
    for (int64_t i = from; i < to; i += PANEL)
        take_panel(lanes, &whole, 0, (const char *)(key + i * dim), query, at->query_stride, n, scores + i, ROW);
    for (int64_t r = 0; r < n; r++) {
        const int64_t own = position + r + 1 < last ? position + r + 1 : last;
        begin = window && position + r - window + 1 > first ? position + r - window + 1 : first;
        if (begin < own)
            weigh(at, scores + r * ROW, from, to, begin - first, own - first, &max[r], &sum[r], out + r * out_stride);
        else
            memset(scores + r * ROW + from, 0, sizeof(float) * (size_t)(to - from));
    }
    for (int64_t d = 0; d < dim; d += PANEL)
        take_panel(lanes, &more, 0, (const char *)(value + d * CHUNK + from * PANEL), scores + from, ROW, n, out + d,
                   out_stride);
}

#define PARAMETERS                                                                                                    \
    const Layout *at, const Queries *of, int64_t first_head, int64_t last_head, const int32_t *table,                 \
        const float *query, const char *pool, const float *sinks, float *room, float *out
#define ARGUMENTS at, of, first_head, last_head, table, query, pool, sinks, room, out

/* One chunk of keys of one kv head, for its query heads. */
INLINE void take_chunk(int lanes, const Layout *at, const Queries *of, int64_t first, int64_t last, const float *query,
                       const float *key, const float *value, float *max, float *sum, float *out)
{
    const int64_t out_stride = at->num_kv_heads * at->queries_per_head * at->head_dim;
    int64_t begin = first > of->start ? first - of->start : 0; /* queries before these keys do not see them */
    int64_t end = of->num_queries;
    if (of->window && last + of->window - 1 < of->start + end)
        end = last + of->window - 1 - of->start;
    for (int64_t i = begin / TILE * TILE; i < end; i += TILE) {
        const int64_t n = of->num_queries - i < TILE ? of->num_queries - i : TILE;
        take_tile(lanes, at, of->window, of->start + i, n, query + i * at->query_stride, first, last, key, value,
                  max + i, sum + i, out + i * out_stride, out_stride);
    }
}

/* Each query head of a kv head goes through all keys by itself: chunks are laid out once more for each, which for
   hundreds of queries is little beside what they are multiplied with. */
INLINE int64_t take_head(int lanes, const Layout *at, const Queries *of, const int32_t *table, const float *query,
                         const char *pool, const float *sink, float *room, float *out)
{
    const int64_t dim = at->head_dim, n = of->num_queries, stop = of->start + n;
    const int64_t out_stride = at->num_kv_heads * at->queries_per_head * dim;
    float *key = room, *value = key + CHUNK * dim, *max = value + CHUNK * dim, *sum = max + n;
    for (int64_t i = 0; i < n; i++) { /* a sink logit is a key that was seen, with no value */
        max[i] = sink ? *sink : -INFINITY;
        sum[i] = sink ? 1 : 0;
        memset(out + i * out_stride, 0, sizeof(float) * (size_t)dim);
    }
    int64_t first = of->window && of->start - of->window + 1 > 0 ? of->start - of->window + 1 : 0;
    for (; first < stop; first += CHUNK) {
        const int64_t last = first + CHUNK < stop ? first + CHUNK : stop;
        if (lay_out(at, pool, table, first, last, key, value))
            return 1;
        take_chunk(lanes, at, of, first, last, query, key, value, max, sum, out);
    }
    for (int64_t i = 0; i < n; i++) {
        const float factor = 1 / sum[i];
        for (int64_t d = 0; d < dim; d++)
            out[i * out_stride + d] *= factor;
    }
    return 0;
}

INLINE int64_t take_heads(int lanes, PARAMETERS)
{
    for (int64_t head = first_head; head < last_head; head++)
        if (take_head(lanes, at, of, table, query + head * at->query_head_stride,
                      pool + head / at->queries_per_head * at->head_stride * 4, sinks ? sinks + head : NULL, room,
                      out + head * at->head_dim))
            return 1;
    return 0;
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx2,fma,prefer-vector-width=512"))) static int64_t take_heads_avx512(PARAMETERS)
{
    return take_heads(16, ARGUMENTS);
}

__attribute__((target("avx2,fma"))) static int64_t take_heads_avx2(PARAMETERS) { return take_heads(8, ARGUMENTS); }
#endif

static int64_t take_heads_anywhere(PARAMETERS) { return take_heads(8, ARGUMENTS); }

/* Query heads [first_head, last_head) of the run, of which `query` and `out`, contiguous, hold all heads, to `out`. A
   head's dimensions are a multiple of PANEL. `table`: the run's own. Returns 0, or 1 where a block that is needed has
   no slot. */
int64_t disagg_attend_run(PARAMETERS)
{
#if defined(__x86_64__)
    if (disagg_widest_vectors >= 512 && __builtin_cpu_supports("avx512f"))
        return take_heads_avx512(ARGUMENTS);
    if (disagg_widest_vectors >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return take_heads_avx2(ARGUMENTS);
#endif
    return take_heads_anywhere(ARGUMENTS);
}
