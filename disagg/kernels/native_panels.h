/* Products of rows with panels: what native_matmul.c multiplies with, and native_prefill.c attends with. */

#ifndef DISAGG_NATIVE_PANELS_H
#define DISAGG_NATIVE_PANELS_H

#include <stdint.h>

#include "native_vectors.h"

enum {
    PANEL = 32,     /* outputs that lie together: [depth][PANEL] numbers */
    MOST_ROWS = 12, /* of a tile */
};

/* Part of a depth. `begins`: outputs hold nothing yet. */
typedef struct {
    int64_t first, depth;
    int begins;
} Slice;

/* Sums in registers: 24 of the 32 that AVX-512 has, 12 of AVX2's 16. */
#define TILE_LANES 16
#define TILE_ROWS 12
#include "native_tile.h"
#define TILE_LANES 8
#define TILE_ROWS 6
#include "native_tile.h"

/* out [num_rows, PANEL] at `out_stride` = (what it holds +) rows of x by one panel. `lanes`: 16 or 8. */
INLINE void take_panel(int lanes, const Slice *of, int is_bfloat16, const char *panel, const float *x, int64_t stride,
                       int64_t num_rows, float *out, int64_t out_stride)
{
    if (lanes == 16)
        take_panel_16(of, is_bfloat16, panel, x, stride, num_rows, out, out_stride);
    else
        take_panel_8(of, is_bfloat16, panel, x, stride, num_rows, out, out_stride);
}

#endif
