/* Vectors of 16 floats, which a compiler cuts to what its target has. None crosses a call that is not inlined: the
   width of registers is not part of what functions of different targets agree on. */

#ifndef DISAGG_NATIVE_VECTORS_H
#define DISAGG_NATIVE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* at any float's address */

#define INLINE static inline __attribute__((always_inline))

/* The widest vectors that may be used, in bits: for tests of the narrower ways, on processors that have more. */
extern int disagg_widest_vectors;

INLINE void fold(const vec *x, vec4 *quarter)
{
    vec4 part[LANES / 4];
    memcpy(part, x, sizeof part);
    *quarter = (part[0] + part[1]) + (part[2] + part[3]);
}

INLINE float total(const vec *x)
{
    vec4 sum;
    fold(x, &sum);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* *x to e^x, for x of at most 88; 0 below -87, the least normal number; NaN stays.
   e^x = 2^n e^r with |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7, off by 6e-9. */
INLINE void exponential(vec *x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: added and taken away, it leaves the nearest integer */
    vec value = *x;
    ivec vanishes = value < -87.0f;
    value = (vec)((ivec)value & ~vanishes);
    vec n = (value * 1.44269504f + round) - round;
    vec r = value - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts: the first times n is exact */
    vec e = r * 1.98412698e-4f + 1.38888889e-3f;
    e = e * r + 8.33333333e-3f;
    e = e * r + 4.16666667e-2f;
    e = e * r + 1.66666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    ivec power = (((ivec)(n + round) - 0x4B400000) + 127) << 23; /* the bits of `round` hold n in their lowest */
    *x = (vec)((ivec)(e * (vec)power) & ~vanishes);
}

/* `*max` to the largest of it and `count` floats. `x` is filled up to a whole vector with what has no weight. */
INLINE void raise_to_largest(float *max, float *x, int64_t count)
{
    vec largest = *max - (vec){0};
    for (int64_t i = count; i % LANES; i++)
        x[i] = -INFINITY;
    for (int64_t i = 0; i < count; i += LANES) {
        vec value = *(const loose *)(x + i);
        ivec is_larger = value > largest;
        largest = (vec)(((ivec)value & is_larger) | ((ivec)largest & ~is_larger));
    }
    for (int i = 0; i < LANES; i++)
        *max = largest[i] > *max ? largest[i] : *max;
}

/* exp(x - subtract) of `count` floats, at most 0 (or NaN, which stays), up to a whole vector, and their sum. */
INLINE float exponentials(float *x, int64_t count, float subtract)
{
    vec sums = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vec value = *(const loose *)(x + i) - subtract;
        exponential(&value);
        *(loose *)(x + i) = value;
        sums += value;
    }
    return total(&sums);
}

#endif
