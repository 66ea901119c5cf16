"""A step computed: the eager runner, captured decode graphs, captured pieces, warm-up."""
