"""Which slot holds which block: layout, pools, block tables, windows, prefix reuse, scratch, admission, budget."""
