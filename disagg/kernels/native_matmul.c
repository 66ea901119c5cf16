/* Rows times a linear layer's weight, in float32, the weight packed once: for one thread, and for the few rows of a
   decode step above all. A weight whose numbers are all of bfloat16, as most checkpoints' are, is held in that type and
   widened in registers: the same numbers, half the memory to read.

   Built with native.c into one library and called by native_matmul.py. */

#include <stddef.h>
#include <stdint.h>

#include "native_parts.h"
#include "native_vectors.h"

enum {
    PANEL = 32,       /* outputs that lie together: [depth][PANEL] numbers of the weight */
    DEPTH = 512,      /* of a panel that is taken at once: 64 KiB, which stay near while all rows of a block meet them */
    BLOCK_ROWS = 256, /* rows that meet one panel after the other: 512 KiB, half a second level cache or less */
    MOST_ROWS = 12,   /* of a tile */
};

const int64_t disagg_weight_nbytes = sizeof(Weight); /* for a test that compares it with native_matmul.py's */

/* Part of the depth. `begins`: outputs hold nothing yet. */
typedef struct {
    int64_t first, depth;
    int begins;
} Slice;

#define PARAMETERS const Weight *of, int64_t n, const float *x, int64_t stride, float *out
#define ARGUMENTS of, n, x, stride, out

/* Sums in registers: 24 of the 32 that AVX-512 has, 12 of AVX2's 16. */
#define TILE_LANES 16
#define TILE_ROWS 12
#include "native_tile.h"
#undef TILE_LANES
#undef TILE_ROWS
#define TILE_LANES 8
#define TILE_ROWS 6
#include "native_tile.h"

#if defined(__x86_64__)
__attribute__((target("avx512f,avx2,fma,prefer-vector-width=512"))) static void multiply_avx512(PARAMETERS)
{
    multiply_16(ARGUMENTS);
}

__attribute__((target("avx2,fma"))) static void multiply_avx2(PARAMETERS) { multiply_8(ARGUMENTS); }
#endif

static void multiply_anywhere(PARAMETERS) { multiply_8(ARGUMENTS); }

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
