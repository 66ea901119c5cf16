"""Which layers, heads and tokens each rank holds, and what a transfer must move. Pure, without torch."""
