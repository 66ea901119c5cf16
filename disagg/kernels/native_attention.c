/* Decode attention over a paged pool, K and V read where they lie: nothing is gathered and no row is padded.

   Built with native.c into one library and called by native_attention.py; without it torch operations gather and pad. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native_parts.h"
#include "native_vectors.h"

enum {
    QUERIES = 4,  /* query heads taken together: their sums and a row of K or V stay in registers */
    KEYS = 4,     /* rows of K taken together */
    COLUMNS = 64, /* of V, summed in registers over the keys of a block */
    ROWS = 16,    /* of V, widened at once where they are of 16 bits: 16 KiB at a head of 256 */
    CHUNK = 256,  /* keys between two looks at the largest score: K and V of a chunk stay in the second level cache
                     (512 KiB at a head of 256) while further query heads come to them */
};

typedef uint32_t word __attribute__((may_alias));

const int64_t disagg_layout_nbytes = sizeof(Layout); /* for a test that compares it with native_attention.py's */

/* Consecutive positions within a block. */
typedef struct {
    const char *key, *value;
    int64_t count;
} Span;

/* The query heads of one kv head, and the softmax so far: outputs are not yet divided by `sum`. */
typedef struct {
    const float *query;
    float *out, *max, *sum;
} Group;

INLINE int64_t size_of_element(const Layout *at) { return at->is_bfloat16 ? 2 : 4; }

/* `count` numbers of the pool as floats: where they lie, or widened to `room`. */
INLINE const float *floats(const Layout *at, const char *from, int64_t count, float *room)
{
    const uint16_t *halves = (const uint16_t *)from;
    if (!at->is_bfloat16)
        return (const float *)from;
    for (int64_t i = 0; i < count; i++)
        ((word *)room)[i] = (uint32_t)halves[i] << 16; /* a bfloat16 is the upper half of a float */
    return room;
}

/* The sums of four vectors' lanes, by adding columns of the 4 x 4 matrix that their folds are. */
INLINE void totals(const vec x[4], vec4 *sums)
{
    vec4 a, b, c, d, ab, cd;
    fold(&x[0], &a), fold(&x[1], &b), fold(&x[2], &c), fold(&x[3], &d);
    ab = (vec4){a[0], b[0], a[1], b[1]} + (vec4){a[2], b[2], a[3], b[3]};
    cd = (vec4){c[0], d[0], c[1], d[1]} + (vec4){c[2], d[2], c[3], d[3]};
    *sums = (vec4){ab[0], ab[1], cd[0], cd[1]} + (vec4){ab[2], ab[3], cd[2], cd[3]};
}

/* scores[q][0..num_keys) of consecutive keys: KEYS of them, or one. */
INLINE void score_keys(const Layout *at, const float *query, int num_queries, const float *key, int num_keys,
                       float *scores)
{
    const int64_t dim = at->head_dim, wide = dim / LANES * LANES;
    vec sums[2][KEYS];
    for (int q = 0; q < num_queries; q++)
        for (int k = 0; k < num_keys; k++)
            sums[q][k] = (vec){0};
    for (int64_t d = 0; d < wide; d += LANES)
        for (int k = 0; k < num_keys; k++)
            for (int q = 0; q < num_queries; q++)
                sums[q][k] += *(const loose *)(key + k * dim + d) *
                              *(const loose *)(query + q * at->query_head_stride + d);
    for (int q = 0; q < num_queries; q++, scores += CHUNK) {
        if (num_keys == KEYS) {
            vec4 sum;
            totals(sums[q], &sum);
            memcpy(scores, &sum, sizeof sum);
        } else
            scores[0] = total(&sums[q][0]);
        for (int k = 0; k < num_keys; k++) {
            for (int64_t d = wide; d < dim; d++)
                scores[k] += key[k * dim + d] * query[q * at->query_head_stride + d];
            scores[k] *= at->scale;
        }
    }
}

/* Asks for `nbytes` before they are needed. A block's rows of one head are a few KiB: the processor, which guesses
   what is read next, has hardly begun when they end. Measured, long sequences take half the time. */
INLINE void fetch(const char *from, int64_t nbytes)
{
    for (int64_t i = 0; i < nbytes; i += 64)
        __builtin_prefetch(from + i, 0, 2); /* to the second level */
}

/* scores[q][i] = query q . key i, for the keys of all spans. */
INLINE void take_scores(const Layout *at, const float *query, int num_queries, const Span *spans, int num_spans,
                        float scores[QUERIES][CHUNK])
{
    const int64_t row_nbytes = at->head_dim * size_of_element(at);
    float room[at->is_bfloat16 ? KEYS * at->head_dim : 1];
    int64_t i = 0;
    for (int s = 0; s < num_spans; s++)
        for (int64_t k = 0, n; k < spans[s].count; k += n, i += n) {
            n = spans[s].count - k < KEYS ? 1 : KEYS;
            fetch(spans[s].value + k * row_nbytes, n * row_nbytes);
            if (s + 1 < num_spans)
                fetch(spans[s + 1].key + k * row_nbytes, n * row_nbytes);
            const float *key = floats(at, spans[s].key + k * row_nbytes, n * at->head_dim, room);
            for (int q = 0; q < num_queries; q += 2) { /* in pairs: eight sums are what registers hold */
                const float *some = query + q * at->query_head_stride;
                const int pair = num_queries - q < 2 ? 1 : 2;
                if (n == KEYS)
                    score_keys(at, some, pair, key, KEYS, &scores[q][i]);
                else
                    score_keys(at, some, pair, key, 1, &scores[q][i]);
            }
        }
}

/* out[q][0..width) += the sum over keys of weights[q][key] * value[key], for one query or two. */
INLINE void take_columns(int64_t dim, float *out, int num_queries, const float *value, int64_t num_keys, int width,
                         const float *weights)
{
    vec sums[2][COLUMNS / LANES];
    for (int q = 0; q < num_queries; q++)
        for (int c = 0; c < width / LANES; c++)
            sums[q][c] = *(const loose *)(out + q * dim + c * LANES);
    for (int64_t k = 0; k < num_keys; k++, value += dim)
        for (int c = 0; c < width / LANES; c++)
            for (int q = 0; q < num_queries; q++)
                sums[q][c] += weights[q * CHUNK + k] * *(const loose *)(value + c * LANES);
    for (int q = 0; q < num_queries; q++)
        for (int c = 0; c < width / LANES; c++)
            *(loose *)(out + q * dim + c * LANES) = sums[q][c];
}

INLINE void take_rows(int64_t dim, float *out, int num_queries, const float *value, int64_t num_keys,
                      const float *weights)
{
    int64_t d = 0;
    for (; d + COLUMNS <= dim; d += COLUMNS)
        take_columns(dim, out + d, num_queries, value + d, num_keys, COLUMNS, weights);
    for (; d + LANES <= dim; d += LANES)
        take_columns(dim, out + d, num_queries, value + d, num_keys, LANES, weights);
    for (; d < dim; d++)
        for (int q = 0; q < num_queries; q++)
            for (int64_t k = 0; k < num_keys; k++)
                out[q * dim + d] += weights[q * CHUNK + k] * value[k * dim + d];
}

/* out[q] += the sum over keys i of weights[q][i] * value i, for the values of all spans. */
INLINE void take_values(const Layout *at, float *out, int num_queries, const Span *spans, int num_spans,
                        float weights[QUERIES][CHUNK])
{
    const int64_t dim = at->head_dim, row_nbytes = dim * size_of_element(at);
    const int64_t most = at->is_bfloat16 ? ROWS : CHUNK;
    float room[at->is_bfloat16 ? ROWS * dim : 1];
    int64_t i = 0;
    for (int s = 0; s < num_spans; s++)
        for (int64_t k = 0, n; k < spans[s].count; k += n, i += n) {
            n = spans[s].count - k < most ? spans[s].count - k : most;
            const float *value = floats(at, spans[s].value + k * row_nbytes, n * dim, room);
            for (int q = 0; q < num_queries; q += 2)
                take_rows(dim, out + q * dim, num_queries - q < 2 ? 1 : 2, value, n, &weights[q][i]);
        }
}

INLINE void rescale(float *out, int64_t dim, float factor)
{
    for (int64_t d = 0; d < dim; d++)
        out[d] *= factor;
}

/* Scores to weights, and what was summed before to the new largest score. */
INLINE void take_softmax(const Layout *at, Group *group, int first, int num_queries, int64_t count,
                         float scores[QUERIES][CHUNK])
{
    for (int q = 0; q < num_queries; q++) {
        float *max = &group->max[first + q], before = *max;
        if (at->softcap > 0)
            for (int64_t i = 0; i < count; i++)
                scores[q][i] = at->softcap * tanhf(scores[q][i] / at->softcap);
        raise_to_largest(max, scores[q], count);
        if (*max != before) {
            float factor = expf(before - *max); /* 0 at the first chunk, where `before` is -inf */
            group->sum[first + q] *= factor;
            rescale(group->out + (first + q) * at->head_dim, at->head_dim, factor);
        }
        group->sum[first + q] += exponentials(scores[q], count, *max == -INFINITY ? 0 : *max);
    }
}

INLINE void take_some(const Layout *at, Group *group, int first, int num_queries, const Span *spans, int num_spans,
                      int64_t count)
{
    float scores[QUERIES][CHUNK];
    take_scores(at, group->query + first * at->query_head_stride, num_queries, spans, num_spans, scores);
    take_softmax(at, group, first, num_queries, count, scores);
    take_values(at, group->out + first * at->head_dim, num_queries, spans, num_spans, scores);
}

INLINE void take_chunk(const Layout *at, Group *group, const Span *spans, int num_spans, int64_t count)
{
    const int num_queries = (int)at->queries_per_head;
    for (int first = 0; first < num_queries; first += QUERIES)
        switch (num_queries - first) { /* the number is known where the loops over it are compiled */
        case 1: take_some(at, group, first, 1, spans, num_spans, count); break;
        case 2: take_some(at, group, first, 2, spans, num_spans, count); break;
        case 3: take_some(at, group, first, 3, spans, num_spans, count); break;
        default: take_some(at, group, first, QUERIES, spans, num_spans, count);
        }
}

INLINE void begin(const Layout *at, Group *group, const float *sinks)
{
    for (int64_t q = 0; q < at->queries_per_head; q++) { /* a sink logit is a key that was seen, with no value */
        group->max[q] = sinks ? sinks[q] : -INFINITY;
        group->sum[q] = sinks ? 1 : 0;
    }
    memset(group->out, 0, sizeof(float) * (size_t)(at->queries_per_head * at->head_dim));
}

/* The queries of one row and kv head; 0, or 1 where a block that they need has no slot. */
INLINE int attend(const Layout *at, const Row *row, const int32_t *table, const char *pool, Group *group)
{
    const int64_t size = size_of_element(at);
    Span spans[CHUNK];
    int num_spans = 0;
    int64_t count = 0;
    for (int64_t position = row->num_sinks > 0 ? 0 : row->first; position <= row->position;) {
        const int64_t ordinal = position / at->block_size, offset = position % at->block_size;
        const int64_t end = position < row->num_sinks ? row->num_sinks : row->position + 1;
        int64_t n = at->block_size - offset;
        const int32_t slot = table[row->table_at + ordinal];
        if (slot <= 0 || slot >= at->num_slots) /* 0 is padding's */
            return 1;
        n = n < end - position ? n : end - position;
        n = n < CHUNK - count ? n : CHUNK - count;
        const char *key = pool + (slot * at->slot_stride + offset * at->head_dim) * size;
        spans[num_spans++] = (Span){key, key + at->kv_stride * size, n};
        count += n;
        position += n;
        if (position == row->num_sinks && position < row->first)
            position = row->first;
        if (count == CHUNK || position > row->position) {
            take_chunk(at, group, spans, num_spans, count);
            num_spans = 0, count = 0;
        }
    }
    return 0;
}

/* Items [begin_at, end): row * num_kv_heads + kv head. Returns 0, or 1 + the row that needs a block without a slot. */
INLINE int64_t take_items(const Layout *at, int64_t begin_at, int64_t end, const Row *rows, const int32_t *tables,
                          const float *query, const char *pool, const float *sinks, float *out)
{
    float state[2 * at->queries_per_head];
    Group group = {NULL, NULL, state, state + at->queries_per_head};
    for (int64_t item = begin_at; item < end; item++) {
        const Row *row = &rows[item / at->num_kv_heads];
        const int64_t head = item % at->num_kv_heads, first = head * at->queries_per_head;
        group.query = query + row->flat * at->query_stride + first * at->query_head_stride;
        group.out = out + (row->flat * at->num_kv_heads * at->queries_per_head + first) * at->head_dim;
        begin(at, &group, sinks ? sinks + first : NULL);
        if (attend(at, row, tables, pool + head * at->head_stride * size_of_element(at), &group))
            return 1 + item / at->num_kv_heads;
        for (int64_t q = 0; q < at->queries_per_head; q++)
            rescale(group.out + q * at->head_dim, at->head_dim, 1 / group.sum[q]);
    }
    return 0;
}

#define PARAMETERS                                                                                             \
    const Layout *at, int64_t first, int64_t last, const Row *rows, const int32_t *tables, const float *query, \
        const char *pool, const float *sinks, float *out
#define ARGUMENTS at, first, last, rows, tables, query, pool, sinks, out

static int64_t take_items_anywhere(PARAMETERS) { return take_items(ARGUMENTS); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static int64_t take_items_avx2(PARAMETERS) { return take_items(ARGUMENTS); }

__attribute__((target("avx512f,avx2,fma,prefer-vector-width=512"))) static int64_t take_items_avx512(PARAMETERS)
{
    return take_items(ARGUMENTS);
}
#endif

/* The widest vectors that may be used, in bits: for tests of the narrower ways, on processors that have more. */
int disagg_widest_vectors = 512;

/* Items [first, last) of the rows, numbered row * num_kv_heads + kv head: `out`, contiguous, is written at each row's
   `flat`. Returns 0, or 1 + the row that needs a block without a slot. */
int64_t disagg_decode_rows(PARAMETERS)
{
#if defined(__x86_64__)
    if (disagg_widest_vectors >= 512 && __builtin_cpu_supports("avx512f"))
        return take_items_avx512(ARGUMENTS);
    if (disagg_widest_vectors >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return take_items_avx2(ARGUMENTS);
#endif
    return take_items_anywhere(ARGUMENTS);
}

/* K and V of n tokens to their places. `at[i]`: where token i's K of head 0 goes, in bytes from `pool`; the heads' lie
   `head_stride` apart and V `kv_stride` after K. `strides`: bytes between tokens and heads of `key`, then of `value`. */
void disagg_write_rows(int64_t n, const int64_t *at, char *pool, int64_t kv_stride, int64_t head_stride,
                       const char *key, const char *value, const int64_t *strides, int64_t num_heads, int64_t nbytes)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t head = 0; head < num_heads; head++) {
            char *to = pool + at[i] + head * head_stride;
            memcpy(to, key + i * strides[0] + head * strides[1], (size_t)nbytes);
            memcpy(to + kv_stride, value + i * strides[2] + head * strides[3], (size_t)nbytes);
        }
}
