/* Rows times a linear layer's weight, in float32, the weight packed once: for one thread, and for the few rows of a
   decode step above all. A weight whose numbers are all of bfloat16, as most checkpoints' are, is held in that type and
   widened in registers: the same numbers, half the memory to read.

   Built with native.c into one library and called by native_matmul.py. */

#include <stddef.h>
#include <stdint.h>

#include "native_panels.h"
#include "native_parts.h"
#include "native_vectors.h"

enum {
    DEPTH = 512,      /* of a panel that is taken at once: 64 KiB, which stay near while all rows of a block meet them */
    BLOCK_ROWS = 256, /* rows that meet one panel after the other: 512 KiB, half a second level cache or less */
};

const int64_t disagg_weight_nbytes = sizeof(Weight); /* for a test that compares it with native_matmul.py's */

#define PARAMETERS const Weight *of, int64_t n, const float *x, int64_t stride, float *out
#define ARGUMENTS of, n, x, stride, out

/* All rows of a block by every panel; the last may have fewer outputs than it has room for. */
INLINE void take_block(int lanes, const Slice *slice, int is_bfloat16, PARAMETERS)
{
    float room[MOST_ROWS * PANEL];
    for (int64_t at = 0; at < of->num_outputs; at += PANEL) {
        const int64_t nbytes = is_bfloat16 ? 2 : 4, width = of->num_outputs - at;
        const char *panel = of->panels + (at * of->depth + slice->first * PANEL) * nbytes;
        if (width >= PANEL) {
            take_panel(lanes, slice, is_bfloat16, panel, x, stride, n, out + at, of->num_outputs);
            continue;
        }
        for (int64_t done = 0, count; done < n; done += count) {
            count = n - done < MOST_ROWS ? n - done : MOST_ROWS;
            for (int64_t r = 0; r < count; r++)
                memcpy(room + r * PANEL, out + (done + r) * of->num_outputs + at, sizeof(float) * (size_t)width);
            take_panel(lanes, slice, is_bfloat16, panel, x + done * stride, stride, count, room, PANEL);
            for (int64_t r = 0; r < count; r++)
                memcpy(out + (done + r) * of->num_outputs + at, room + r * PANEL, sizeof(float) * (size_t)width);
        }
    }
}

INLINE void multiply(int lanes, PARAMETERS)
{
    for (int64_t done = 0, count; done < n; done += count) {
        count = n - done < BLOCK_ROWS ? n - done : BLOCK_ROWS;
        const float *rows = x + done * stride;
        float *to = out + done * of->num_outputs;
        for (int64_t first = 0; first < of->depth; first += DEPTH) {
            const int64_t left = of->depth - first;
            const Slice slice = {first, left < DEPTH ? left : DEPTH, first == 0};
            if (of->is_bfloat16)
                take_block(lanes, &slice, 1, of, count, rows + first, stride, to);
            else
                take_block(lanes, &slice, 0, of, count, rows + first, stride, to);
        }
        for (int64_t r = 0; of->bias && r < count; r++)
            for (int64_t i = 0; i < of->num_outputs; i++)
                to[r * of->num_outputs + i] += of->bias[i];
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx2,fma,prefer-vector-width=512"))) static void multiply_avx512(PARAMETERS)
{
    multiply(16, ARGUMENTS);
}

__attribute__((target("avx2,fma"))) static void multiply_avx2(PARAMETERS) { multiply(8, ARGUMENTS); }
#endif

static void multiply_anywhere(PARAMETERS) { multiply(8, ARGUMENTS); }

/* `x` [n, depth] at `stride` times the weight: `out` [n, num_outputs]. */
void disagg_multiply(PARAMETERS)
{
#if defined(__x86_64__)
    if (disagg_widest_vectors >= 512 && __builtin_cpu_supports("avx512f")) {
        multiply_avx512(ARGUMENTS);
        return;
    }
    if (disagg_widest_vectors >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        multiply_avx2(ARGUMENTS);
        return;
    }
#endif
    multiply_anywhere(ARGUMENTS);
}

/* Whether this processor has vectors for which the above is fast. */
int disagg_multiplies_fast(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}
