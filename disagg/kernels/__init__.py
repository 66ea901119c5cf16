"""Array work on the paged cache: attention, writes, gather and scatter, digests. Compiled C, torch, or Triton."""
