"""One worker's engine: `engine` runs steps, `scheduler` decides what a step computes, `sampler` picks tokens.

`model/` is the path from a folder to a loaded model, `run/` computes a step with it: eager, as graphs, or in pieces.
"""
