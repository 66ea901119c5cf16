/* What lies between the matmuls of a layer, in one pass over each row: norms, gated activations, and the way of a packed
   projection to attention. In float32. In torch operations each of these is five to ten calls, which for few rows take
   longer than the matmuls do.

   Built with native.c into one library and called by native_layers.py. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "native_parts.h"
#include "native_vectors.h"

INLINE float sum_of_squares(const float *x, int64_t width)
{
    vec sums = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        sums += *(const loose *)(x + i) * *(const loose *)(x + i);
    for (; i < width; i++)
        rest += x[i] * x[i];
    return total(&sums) + rest;
}

/* out = x * gain / sqrt(mean of x's squares + epsilon) */
INLINE void norm_row(int64_t width, const float *x, const float *gain, float epsilon, float *out)
{
    const float factor = 1.0f / sqrtf(sum_of_squares(x, width) / (float)width + epsilon);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        *(loose *)(out + i) = *(const loose *)(x + i) * factor * *(const loose *)(gain + i);
    for (; i < width; i++)
        out[i] = x[i] * factor * gain[i];
}

/* *gate to its activation times *up. Both kinds are x / (1 + e^-y): silu with y = x, gelu's tanh form with
   y = 2 sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh(y / 2)) / 2 = 1 / (1 + e^-y). */
INLINE void activate(vec *gate, const vec *up, int kind)
{
    vec x = *gate, y = -x;
    if (kind == GELU_TANH)
        y = x * (x * x * -0.0713548162726f - 1.59576912161f);
    const vec most = 88.0f - (vec){0}; /* e^88 is nearly the largest float, and x over it nearly 0 */
    ivec is_large = y > most;
    y = (vec)(((ivec)most & is_large) | ((ivec)y & ~is_large));
    exponential(&y);
    *gate = x / (1.0f + y) * *up;
}

INLINE void gate_row(int64_t width, const float *gate, const float *up, int kind, float *out)
{
    int64_t i = 0;
    vec x, y;
    for (; i + LANES <= width; i += LANES) {
        x = *(const loose *)(gate + i), y = *(const loose *)(up + i);
        activate(&x, &y, kind);
        *(loose *)(out + i) = x;
    }
    if (i < width) { /* what is left, in a vector of its own */
        x = y = (vec){0};
        memcpy(&x, gate + i, sizeof(float) * (size_t)(width - i));
        memcpy(&y, up + i, sizeof(float) * (size_t)(width - i));
        activate(&x, &y, kind);
        memcpy(out + i, &x, sizeof(float) * (size_t)(width - i));
    }
}

const int64_t disagg_projection_nbytes = sizeof(Projection); /* for a test that compares it with native_layers.py's */

/* Dimensions i and i + half of x are turned by the i-th angle. */
INLINE void rotate(int64_t half, float *x, const float *cos, const float *sin)
{
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vec c = *(const loose *)(cos + i), s = *(const loose *)(sin + i);
        const vec a = *(const loose *)(x + i), b = *(const loose *)(x + half + i);
        *(loose *)(x + i) = a * c - b * s;
        *(loose *)(x + half + i) = b * c + a * s;
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

/* One head of a row to `out`, which is no part of `x`. `kind`: 0 Q, 1 K, 2 V. */
INLINE void take_head(const Projection *of, int kind, const float *x, const float *bias, const float *gains,
                      const float *cos, const float *sin, float *out)
{
    const int64_t dim = of->head_dim;
    for (int64_t i = 0; i < dim; i++)
        out[i] = bias ? x[i] + bias[i] : x[i];
    if (of->normed >> kind & 1)
        norm_row(dim, out, gains + kind * dim, of->epsilon, out);
    if (kind < 2)
        rotate(of->half, out, cos, sin);
}

#define QKV_PARAMETERS                                                                                                \
    const Projection *of, int64_t n, const float *qkv, const float *bias, const float *gains, const float *cos,       \
        const float *sin, const int64_t *at, float *pool, float *query
#define QKV_ARGUMENTS of, n, qkv, bias, gains, cos, sin, at, pool, query

INLINE void take_qkv(QKV_PARAMETERS)
{
    const int64_t dim = of->head_dim, total_heads = of->num_heads + 2 * of->num_kv_heads;
    for (int64_t row = 0; row < n; row++, qkv += of->qkv_stride, cos += of->half, sin += of->half)
        for (int64_t head = 0; head < total_heads; head++) {
            const int64_t of_kv = head - of->num_heads, kv_head = of_kv % of->num_kv_heads;
            const int kind = of_kv < 0 ? 0 : of_kv < of->num_kv_heads ? 1 : 2;
            float *to = kind ? pool + at[row] + kv_head * of->head_stride + (kind == 2 ? of->kv_stride : 0)
                             : query + (row * of->num_heads + head) * dim;
            take_head(of, kind, qkv + head * dim, bias ? bias + head * dim : NULL, gains, cos, sin, to);
        }
}

#define NORM_PARAMETERS \
    int64_t n, int64_t width, const float *x, int64_t stride, const float *gain, float epsilon, float *out
#define NORM_ARGUMENTS n, width, x, stride, gain, epsilon, out

INLINE void norm_rows(NORM_PARAMETERS)
{
    for (int64_t i = 0; i < n; i++)
        norm_row(width, x + i * stride, gain, epsilon, out + i * width);
}

#define GATE_PARAMETERS int64_t n, int64_t width, const float *both, int64_t stride, int64_t kind, float *out
#define GATE_ARGUMENTS n, width, both, stride, kind, out

INLINE void gate_rows(GATE_PARAMETERS)
{
    for (int64_t i = 0; i < n; i++, both += stride, out += width)
        if (kind == SILU)
            gate_row(width, both, both + width, SILU, out);
        else
            gate_row(width, both, both + width, GELU_TANH, out);
}

/* Each in three widths, of which the widest that the processor has and a test allows is taken. */
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx2,fma,prefer-vector-width=512")))
#define IN_EVERY_WIDTH(name, PARAMETERS, ARGUMENTS)                                                                  \
    AVX2 static void name##_avx2(PARAMETERS) { name(ARGUMENTS); }                                                    \
    AVX512 static void name##_avx512(PARAMETERS) { name(ARGUMENTS); }                                                \
    static void name##_anywhere(PARAMETERS) { name(ARGUMENTS); }                                                     \
    void disagg_##name(PARAMETERS)                                                                                   \
    {                                                                                                                \
        if (disagg_widest_vectors >= 512 && __builtin_cpu_supports("avx512f"))                                       \
            name##_avx512(ARGUMENTS);                                                                                \
        else if (disagg_widest_vectors >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))    \
            name##_avx2(ARGUMENTS);                                                                                  \
        else                                                                                                         \
            name##_anywhere(ARGUMENTS);                                                                              \
    }
#else
#define IN_EVERY_WIDTH(name, PARAMETERS, ARGUMENTS) \
    void disagg_##name(PARAMETERS) { name(ARGUMENTS); }
#endif

/* `x` [n, width] at `stride`, normed to `out` [n, width]. */
IN_EVERY_WIDTH(norm_rows, NORM_PARAMETERS, NORM_ARGUMENTS)

/* `both` [n, 2 width] at `stride`, gates before what they gate, to `out` [n, width]. */
IN_EVERY_WIDTH(gate_rows, GATE_PARAMETERS, GATE_ARGUMENTS)

/* `qkv` [n, (num_heads + 2 num_kv_heads) head_dim]: Q to `query` [n, num_heads, head_dim], K and V to the pool, where
   K of row i's head 0 goes to element `at[i]`. */
IN_EVERY_WIDTH(take_qkv, QKV_PARAMETERS, QKV_ARGUMENTS)
