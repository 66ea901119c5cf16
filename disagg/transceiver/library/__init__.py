"""The transfer for engines that are not ours: foreign tensors, plans, ranks."""
