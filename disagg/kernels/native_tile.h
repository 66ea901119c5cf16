/* The inner loops of native_panels.h for vectors of TILE_LANES floats; included once for each width.

   A tile is `num_rows` rows by two vectors of outputs of a panel, [first, first + TILE_LANES) and as many from
   first + PANEL / 2 on. Its sums stay in registers, so `num_rows` is known where this is compiled. */

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAMED(name) JOIN(name, TILE_LANES)

typedef float NAMED(tile_vec) __attribute__((vector_size(4 * TILE_LANES)));
typedef int32_t NAMED(tile_ivec) __attribute__((vector_size(4 * TILE_LANES)));
typedef float NAMED(tile_loose) __attribute__((vector_size(4 * TILE_LANES), aligned(4), may_alias));
typedef int32_t NAMED(tile_iloose) __attribute__((vector_size(4 * TILE_LANES), aligned(4), may_alias));

/* `begins`: what `out` held does not count. */
INLINE void NAMED(take_tile_)(const Slice *of, int is_bfloat16, const char *panel, int64_t first, const float *x,
                              int64_t stride, int num_rows, float *out, int64_t out_stride)
{
    NAMED(tile_vec) sums[MOST_ROWS][2], low, high;
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < 2; v++) {
            sums[r][v] = (NAMED(tile_vec)){0};
            if (!of->begins)
                sums[r][v] += *(const NAMED(tile_loose) *)(out + r * out_stride + first + v * PANEL / 2);
        }
    for (int64_t k = 0; k < of->depth; k++) {
        if (is_bfloat16) {
            const NAMED(tile_ivec) pairs = *(const NAMED(tile_iloose) *)(panel + (k * PANEL / 2 + first) * 4);
            low = (NAMED(tile_vec))(pairs << 16), high = (NAMED(tile_vec))(pairs & (int32_t)0xffff0000);
        } else {
            low = *(const NAMED(tile_loose) *)(panel + (k * PANEL + first) * 4);
            high = *(const NAMED(tile_loose) *)(panel + (k * PANEL + PANEL / 2 + first) * 4);
        }
        for (int r = 0; r < num_rows; r++) {
            sums[r][0] += x[r * stride + k] * low;
            sums[r][1] += x[r * stride + k] * high;
        }
    }
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < 2; v++)
            *(NAMED(tile_loose) *)(out + r * out_stride + first + v * PANEL / 2) = sums[r][v];
}

#define TILE(n)                                                                                     \
    case n:                                                                                         \
        NAMED(take_tile_)(of, is_bfloat16, panel, first, x, stride, n, out, out_stride);            \
        break;

INLINE void NAMED(take_rows_)(const Slice *of, int is_bfloat16, const char *panel, int64_t first, const float *x,
                              int64_t stride, int num_rows, float *out, int64_t out_stride)
{
    switch (num_rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if TILE_ROWS > 6
        TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
    }
}

/* All rows of a block by one panel. */
INLINE void NAMED(take_panel_)(const Slice *of, int is_bfloat16, const char *panel, const float *x, int64_t stride,
                               int64_t num_rows, float *out, int64_t out_stride)
{
    for (int64_t done = 0, n; done < num_rows; done += n) {
        n = num_rows - done;
        if (n > TILE_ROWS) /* two tiles of about the same size where one would leave a small one */
            n = n >= 2 * TILE_ROWS ? TILE_ROWS : (n + 1) / 2;
        for (int64_t first = 0; first < PANEL / 2; first += TILE_LANES)
            NAMED(take_rows_)(of, is_bfloat16, panel, first, x + done * stride, stride, (int)n,
                              out + done * out_stride, out_stride);
    }
}

#undef TILE
#undef TILE_LANES
#undef TILE_ROWS
