/* From logits to tokens, a whole step's rows in one call; what a row means is said in sampling/rows.py.

   Built with native.c into one library and called by sampling/native.py; sampling/plain.py gives the same tokens without.
   Nothing is sorted: a filter looks for the score at which it cuts by halving, over whole passes first and then over the
   few ids that are left. Noise is Philox's words as they come; its two logarithms are taken only of ids that could win.

   Loops are plain and add up integers only, so that compilers make vectors of them as wide as a target has, and so that
   no order of adding changes a token. For the same reason products and sums are not fused. */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    BLOCK = 64,    /* ids whose noise is made at once; scratch rows are filled up to it */
    FEW = 4096,    /* ids between two cuts that are gathered, to go on with them alone */
    HALVINGS = 24, /* then they are gathered however many they are: many equal scores */
    MAX_LOGPROBS = 20,
    EXCLUDED = 0x7F800000, /* the key of a score of -inf */
};

#define HUGE_TEMPERATURE 0x1p-20 /* its inverse */
#define INLINE static inline __attribute__((always_inline))

/* sampling/native.py has the same fields; rows.py says what they mean. */
typedef struct {
    int64_t position;
    uint64_t seed;
    double inverse_temperature, top_p;
    int64_t top_k, num_logprobs;
    double least, repetition, frequency, presence;
    const uint64_t *seen;
    const int64_t *masked, *bias_ids, *used, *counts;
    const double *biases;
    int64_t num_masked, num_biases, num_used;
} SampleRow;

const int64_t disagg_sample_row_nbytes = sizeof(SampleRow); /* for a test that compares it with native.py's */

/* Per row: the token, 0 where a logit is not finite; log-probabilities where asked for. */
typedef struct {
    int64_t token_id, is_finite;
    double logprob;
    int64_t top_ids[MAX_LOGPROBS];
    double top[MAX_LOGPROBS];
} SampledRow;

const int64_t disagg_sampled_row_nbytes = sizeof(SampledRow);

typedef void words_fn(uint64_t block, uint64_t position, uint64_t seed, uint32_t *words);

/* Room for one row, filled up to a multiple of BLOCK: adjusted logits, keys of scores (see `key_of`), their weights. */
typedef struct {
    double *adjusted;
    int32_t *keys, *weights, *few_keys, *few_weights;
    int64_t size; /* of the vocabulary */
    int64_t filled;
} Room;

/* In native_philox.c. */
words_fn disagg_words_anywhere, disagg_words_avx2, disagg_words_avx512;

/* --- numbers ---------------------------------------------------------------------------------------------------- */

INLINE int32_t bits_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(int32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE int64_t long_of(double value)
{
    int64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}

INLINE double double_of(int64_t bits)
{
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* A score's place in falling order, as a whole number: the bits of its magnitude, since no score is above 0. */
INLINE int32_t key_of(float score) { return bits_of(score) & 0x7FFFFFFF; }
INLINE float score_of(int32_t key) { return -float_of(key); }

/* exp of a score in float32, by one stated polynomial (Cephes' expf): the same bits everywhere. 0 below -87. */
INLINE float exp_of(int32_t key)
{
    const float magic = 12582912.f; /* 1.5 * 2**23: adding it rounds to a whole number, in the low bits */
    const int32_t is_in = key < 0x42AE0000 ? -1 : 0;
    float x = score_of(key & is_in), n = x * 1.44269504f + magic, whole = n - magic;
    float r = x - whole * 0.693359375f, p = 1.9875691500e-4f;
    r = r + whole * 2.12194440e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    p = p + 1.f;
    return float_of((int32_t)((uint32_t)bits_of(p) + ((uint32_t)bits_of(n) << 23)) & is_in);
}

/* The same as a whole number, 2**30 for a score of 0: sums of these are exact. */
INLINE int32_t weight_of(int32_t key) { return (int32_t)(exp_of(key) * 0x1p30f + 0.5f); }

/* --- a row's logits --------------------------------------------------------------------------------------------- */

/* The largest logit; `*is_finite` 0 where one is Inf or NaN. Compares as integers in the order of floats. */
INLINE float largest_of(const float *row, int64_t n, int64_t *is_finite)
{
    int32_t most = INT32_MIN, wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits = bits_of(row[i]), ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
        wrong |= (bits & 0x7F800000) == 0x7F800000;
        most = ordered > most ? ordered : most;
    }
    *is_finite = !wrong;
    return float_of(most ^ ((most >> 31) & 0x7FFFFFFF));
}

INLINE int64_t first_at(const float *row, int64_t n, float value)
{
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK) {
        int32_t found = 0;
        for (int j = 0; j < BLOCK; j++)
            found |= row[i + j] == value;
        if (found)
            break;
    }
    while (i < n && row[i] != value)
        i++;
    return i;
}

/* The repetition penalty of one word's ids: all 64 are computed, and those kept whose bit is set. */
INLINE void repeat_word(double *x, uint64_t bits, double factor)
{
    const int64_t largest = 0x7FEFFFFFFFFFFFFF, sign = INT64_MIN; /* of float64, as bits */
    for (int j = 0; j < 64; j++) {
        int64_t old = long_of(x[j]), is_above = ~(old >> 63), divided = long_of(x[j] / factor);
        int64_t new = (divided & is_above) | (long_of(x[j] * factor) & ~is_above);
        int64_t magnitude = new & INT64_MAX;
        magnitude = magnitude < largest ? magnitude : largest;
        int64_t is_seen = -(int64_t)(bits >> j & 1) & -(int64_t)((old & INT64_MAX) <= largest); /* masked: it stays */
        x[j] = double_of((((new & sign) | magnitude) & is_seen) | (old & ~is_seen));
    }
}

/* The place of the first of the largest. */
INLINE int64_t likeliest_of(const double *adjusted, int64_t n)
{
    int64_t most = INT64_MIN, i = 0;
    for (int64_t j = 0; j < n; j++) {
        int64_t bits = long_of(adjusted[j]), ordered = bits ^ ((bits >> 63) & INT64_MAX);
        most = ordered > most ? ordered : most;
    }
    const double largest = double_of(most ^ ((most >> 63) & INT64_MAX));
    while (adjusted[i] != largest)
        i++;
    return i;
}

/* Masks, biases and penalties, in float64; returns the place of the first of the largest. */
INLINE int64_t adjust(const SampleRow *at, const float *row, int64_t n, double *adjusted)
{
    for (int64_t i = 0; i < n; i++)
        adjusted[i] = row[i];
    for (int64_t i = 0; i < at->num_masked; i++)
        adjusted[at->masked[i]] = -INFINITY;
    for (int64_t i = 0; i < at->num_biases; i++)
        adjusted[at->bias_ids[i]] += at->biases[i];
    for (int64_t i = n; i < (n + 63) / 64 * 64; i++)
        adjusted[i] = 0;
    for (int64_t word = 0; at->seen && word * 64 < n; word++)
        if (at->seen[word])
            repeat_word(adjusted + word * 64, at->seen[word], at->repetition);
    for (int64_t i = 0; i < at->num_used; i++)
        adjusted[at->used[i]] -= (double)at->counts[i] * at->frequency + at->presence;
    return likeliest_of(adjusted, n);
}

INLINE void fill_up(const Room *room)
{
    for (int64_t i = room->size; i < room->filled; i++)
        room->keys[i] = EXCLUDED;
}

/* The inverse of a huge temperature, raised until scores keep the logits' order. They are next to 0 then too. */
INLINE double kept_apart(double inverse, double distance)
{
    return inverse * distance < 0x1p-40 && distance > 0 ? fmin(0x1p-40 / distance, DBL_MAX) : inverse;
}

/* Scores: (logit - largest) / temperature, rounded once. */
INLINE void score(const float *row, float largest, double inverse, const Room *room)
{
    const double most = largest;
    float least = largest;
    if (inverse < HUGE_TEMPERATURE) {
        for (int64_t i = 0; i < room->size; i++)
            least = row[i] < least ? row[i] : least;
        inverse = kept_apart(inverse, most - least);
    }
    for (int64_t i = 0; i < room->size; i++)
        room->keys[i] = key_of((float)((row[i] - most) * inverse));
    fill_up(room);
}

/* The same of adjusted logits, whose distance float64 may not hold: half of it does. */
INLINE void score_adjusted(double largest, double inverse, const Room *room)
{
    const double most = largest * 0.5;
    double least = most;
    inverse *= 2;
    if (inverse < HUGE_TEMPERATURE) {
        for (int64_t i = 0; i < room->size; i++) /* what is masked has no distance */
            least = room->adjusted[i] >= -DBL_MAX && room->adjusted[i] * 0.5 < least ? room->adjusted[i] * 0.5 : least;
        inverse = kept_apart(inverse, most - least);
    }
    for (int64_t i = 0; i < room->size; i++)
        room->keys[i] = key_of((float)((room->adjusted[i] * 0.5 - most) * inverse));
    fill_up(room);
}

INLINE int64_t first_of_score_0(const Room *room)
{
    int64_t i = 0;
    for (; i < room->filled; i += BLOCK) {
        int32_t least = EXCLUDED;
        for (int j = 0; j < BLOCK; j++)
            least = room->keys[i + j] < least ? room->keys[i + j] : least;
        if (least == 0)
            break;
    }
    while (room->keys[i] != 0)
        i++;
    return i;
}

/* --- filters: ids of keys up to a limit -------------------------------------------------------------------------- */

typedef struct {
    int64_t ids, weight;
} Mass;

/* How many ids lie at keys up to `limit`. */
INLINE int64_t count_to(const int32_t *keys, int64_t n, int32_t limit)
{
    int32_t count = 0;
    for (int64_t i = 0; i < n; i++)
        count += keys[i] <= limit;
    return count;
}

/* How many, and what they weigh; without weights each weighs 1. */
INLINE Mass mass_to(const int32_t *keys, const int32_t *weights, int64_t n, int32_t limit)
{
    int32_t count = 0;
    uint64_t sum = 0;
    if (!weights) {
        count = (int32_t)count_to(keys, n, limit);
        return (Mass){count, count};
    }
    for (int64_t i = 0; i < n; i++) {
        int32_t is_in = -(keys[i] <= limit);
        count -= is_in;
        sum += (uint32_t)(weights[i] & is_in);
    }
    return (Mass){count, (int64_t)sum};
}

/* Keys above `low` and up to `high`, gathered with their weights; returns how many. */
INLINE int64_t gather(const Room *room, const int32_t *weights, int32_t low, int32_t high)
{
    int64_t n = 0;
    for (int64_t i = 0; i < room->filled; i += BLOCK) {
        int32_t some = 0;
        for (int j = 0; j < BLOCK; j++)
            some |= (room->keys[i + j] > low) & (room->keys[i + j] <= high);
        if (!some)
            continue;
        for (int64_t j = i; j < i + BLOCK; j++) {
            room->few_keys[n] = room->keys[j];
            room->few_weights[n] = weights ? weights[j] : 1;
            n += (room->keys[j] > low) & (room->keys[j] <= high);
        }
    }
    return n;
}

/* The least limit whose ids weigh `wanted` or more, given that those up to `high` do. `*below`: what the ids before
   that limit weigh. Halves the scores first, from where they usually lie, then the keys of the few that are left. */
INLINE int32_t limit_of(const Room *room, const int32_t *weights, int64_t wanted, int32_t high, int64_t *below)
{
    int32_t low = -1;
    Mass at_low = {0, 0}, at_high = mass_to(room->keys, weights, room->filled, high);
    for (int i = 0; i < HALVINGS && at_high.ids - at_low.ids > FEW; i++) {
        float nearer = low < 0 ? 0 : float_of(low), middle = (nearer + float_of(high)) * 0.5f;
        int32_t key = key_of(middle < 16 * nearer + 16 ? middle : 16 * nearer + 16);
        Mass here = mass_to(room->keys, weights, room->filled, key);
        if (here.weight >= wanted)
            high = key, at_high = here;
        else
            low = key, at_low = here;
    }
    const int64_t n = gather(room, weights, low, high);
    *below = at_low.weight;
    while (high - low > 1) {
        int32_t key = low + (high - low) / 2;
        int64_t here = at_low.weight + mass_to(room->few_keys, room->few_weights, n, key).weight;
        if (here >= wanted)
            high = key;
        else
            low = key, *below = here;
    }
    return high;
}

/* Of which ids the token is drawn: keys up to `limit`, and at the limit itself no id after `last`. */
typedef struct {
    int32_t limit;
    int64_t last;
} Kept;

/* Of the ids at the limit the first few that are needed to reach `wanted`. */
INLINE int64_t last_tie(const Room *room, int32_t limit, int64_t below, int64_t wanted)
{
    const int64_t weight = weight_of(limit);
    for (int64_t i = 0; i < room->filled; i += BLOCK) {
        int32_t some = 0;
        for (int j = 0; j < BLOCK; j++)
            some |= room->keys[i + j] == limit;
        for (int64_t j = i; some && j < i + BLOCK; j++)
            if (room->keys[j] == limit && (below += weight) >= wanted)
                return j;
    }
    return room->size;
}

/* A limit to begin with: all ids beyond it together weigh less than `spare`, though rounding made each half heavier. */
INLINE int32_t beginning(const Room *room, int64_t spare, int32_t limit)
{
    const double each = (double)spare / (double)room->size - 1;
    if (each < 1)
        return limit;
    const float least = (float)log(each / 0x1p30) - 1e-3f;
    return least < 0 && key_of(least) < limit ? key_of(least) : limit;
}

INLINE Kept keep_top_p(const Room *room, double top_p, int32_t limit)
{
    for (int64_t i = 0; i < room->filled; i++)
        room->weights[i] = weight_of(room->keys[i]);
    const int64_t all = mass_to(room->keys, room->weights, room->filled, limit).weight;
    int64_t wanted = (int64_t)ceil(top_p * (double)all), below;
    wanted = wanted < 1 ? 1 : wanted > all ? all : wanted;
    limit = limit_of(room, room->weights, wanted, beginning(room, all - wanted, limit), &below);
    return (Kept){limit, last_tie(room, limit, below, wanted)};
}

INLINE Kept keep(const SampleRow *at, const Room *room)
{
    int32_t limit = at->least > -FLT_MAX ? key_of((float)at->least) : EXCLUDED - 1;
    if (at->top_k && count_to(room->keys, room->filled, limit) > at->top_k) {
        int64_t below;
        limit = limit_of(room, NULL, at->top_k, limit, &below);
    }
    return at->top_p < 1 ? keep_top_p(room, at->top_p, limit) : (Kept){limit, room->size};
}

/* --- drawing: the largest of score + Gumbel noise ------------------------------------------------------------------ */

INLINE double with_noise(int32_t key, uint32_t word) { return score_of(key) - log(-log((word + 0.5) * 0x1p-32)); }

/* Which ids could reach `best`. u = 1 - v wins only if -log(u) < exp(score - best), and v <= -log(1 - v); of that exp a
   float made from the bits of its exponent is an upper bound, since 1 + f >= 2**f. The slack is for the rounding, the
   least score (-100) for whole numbers that hold it. Floats above 0 compare as their bits do. */
INLINE int32_t could_win(const int32_t *keys, const uint32_t *words, float best, int32_t limit, int32_t *hits)
{
    int32_t some = 0;
    best -= 1e-3f;
    for (int i = 0; i < BLOCK; i++) {
        int32_t key = keys[i] < 0x42C80000 ? keys[i] : 0x42C80000;
        int32_t bound = (int32_t)(((score_of(key) - best) * 1.44269504f + 127.f) * 8388608.f);
        bound = bound > 0 ? bound : 0;
        bound = bound < 0x7F000000 ? bound : 0x7F000000;
        int32_t v = bits_of((float)(int32_t)(~words[i] >> 1) * 0x1p-31f);
        hits[i] = (v <= bound) & (keys[i] <= limit);
        some |= hits[i];
    }
    return some;
}

INLINE int64_t draw(const SampleRow *at, const Room *room, Kept kept, words_fn *words_of)
{
    uint32_t words[BLOCK];
    int32_t hits[BLOCK];
    int64_t drawn = first_of_score_0(room);
    words_of((uint64_t)drawn / BLOCK, (uint64_t)at->position, at->seed, words);
    double best = with_noise(0, words[drawn % BLOCK]);
    for (int64_t begin = 0; begin < room->filled; begin += BLOCK) {
        const int32_t *keys = room->keys + begin;
        if (count_to(keys, BLOCK, kept.limit) == 0)
            continue;
        words_of((uint64_t)begin / BLOCK, (uint64_t)at->position, at->seed, words);
        if (!could_win(keys, words, (float)best, kept.limit, hits))
            continue;
        for (int i = 0; i < BLOCK; i++) {
            if (!hits[i] || (keys[i] == kept.limit && begin + i > kept.last))
                continue;
            double value = with_noise(keys[i], words[i]);
            if (value > best || (value == best && begin + i < drawn))
                best = value, drawn = begin + i;
        }
    }
    return drawn;
}

/* --- log-probabilities of the raw logits ---------------------------------------------------------------------------- */

/* log of the sum of exps. Sums are of pieces whose length is fixed, so that they do not depend on a vector's. */
INLINE double log_sum_exp(const float *row, int64_t n, float largest)
{
    double sums[8] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            sums[j] += exp_of(key_of(row[i + j] - largest));
    for (; i < n; i++)
        sums[i % 8] += exp_of(key_of(row[i] - largest));
    for (int j = 0; j < 8; j++)
        sum += sums[j];
    return log(sum) + largest;
}

/* The `count` largest, of equal ones the first, largest first. */
INLINE void top_of(const float *row, int64_t n, int64_t count, int64_t *ids)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        const float least = found < count ? -INFINITY : row[ids[count - 1]];
        for (int32_t some = 0; i + BLOCK <= n && !some; i += some ? 0 : BLOCK)
            for (int j = 0; j < BLOCK; j++)
                some |= row[i + j] > least;
        while (i < n && !(row[i] > least))
            i++;
        if (i >= n)
            return;
        int64_t at = found < count ? found++ : count - 1;
        for (; at > 0 && row[i] > row[ids[at - 1]]; at--)
            ids[at] = ids[at - 1];
        ids[at] = i;
    }
}

INLINE void report(const float *row, int64_t n, float largest, int64_t count, SampledRow *out)
{
    double all = log_sum_exp(row, n, largest);
    out->logprob = row[out->token_id] - all;
    if (count > 0)
        top_of(row, n, count, out->top_ids);
    for (int64_t i = 0; i < count; i++)
        out->top[i] = row[out->top_ids[i]] - all;
}

/* --- rows ------------------------------------------------------------------------------------------------------------- */

INLINE int is_adjusted(const SampleRow *at) { return at->num_masked || at->num_biases || at->seen || at->num_used; }

INLINE void sample_row(const SampleRow *at, const float *row, const Room *room, words_fn *words_of, SampledRow *out)
{
    float largest = largest_of(row, room->size, &out->is_finite);
    out->token_id = 0;
    if (!out->is_finite)
        return;
    const int adjusts = is_adjusted(at);
    int64_t likeliest = adjusts ? adjust(at, row, room->size, room->adjusted) : first_at(row, room->size, largest);
    out->token_id = likeliest;
    if (at->inverse_temperature > 0) {
        if (adjusts)
            score_adjusted(room->adjusted[likeliest], at->inverse_temperature, room);
        else
            score(row, largest, at->inverse_temperature, room);
        out->token_id = draw(at, room, keep(at, room), words_of);
    }
    if (at->num_logprobs >= 0)
        report(row, room->size, largest, at->num_logprobs, out);
}

#define PARAMETERS                                                                                                  \
    int64_t first, int64_t last, const SampleRow *rows, const float *logits, int64_t stride, int64_t size, char *place, \
        SampledRow *out
#define ARGUMENTS first, last, rows, logits, stride, size, place, out

/* Bytes of `place` for a vocabulary of `size`. */
int64_t disagg_sample_scratch_nbytes(int64_t size)
{
    int64_t filled = (size + BLOCK - 1) / BLOCK * BLOCK;
    return filled * (8 + 4 * 4) + 2 * BLOCK * 4;
}

INLINE void sample_rows(PARAMETERS, words_fn *words_of)
{
    Room room = {.size = size, .filled = (size + BLOCK - 1) / BLOCK * BLOCK};
    room.adjusted = (double *)place;
    room.keys = (int32_t *)(room.adjusted + room.filled);
    room.weights = room.keys + room.filled;
    room.few_keys = room.weights + room.filled; /* BLOCK more: what is gathered may be written one past its end */
    room.few_weights = room.few_keys + room.filled + BLOCK;
    for (int64_t i = first; i < last; i++)
        sample_row(&rows[i], logits + i * stride, &room, words_of, &out[i]);
}

static void sample_rows_anywhere(PARAMETERS) { sample_rows(ARGUMENTS, disagg_words_anywhere); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void sample_rows_avx2(PARAMETERS) { sample_rows(ARGUMENTS, disagg_words_avx2); }

__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512"))) static void
sample_rows_avx512(PARAMETERS)
{
    sample_rows(ARGUMENTS, disagg_words_avx512);
}
#endif

extern int disagg_widest_vectors;

/* Rows [first, last): `logits` float32, rows `stride` numbers apart; `place`: room that no other call uses meanwhile. */
void disagg_sample_rows(PARAMETERS)
{
#if defined(__x86_64__)
    if (disagg_widest_vectors >= 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return sample_rows_avx512(ARGUMENTS);
    if (disagg_widest_vectors >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return sample_rows_avx2(ARGUMENTS);
#endif
    return sample_rows_anywhere(ARGUMENTS);
}
