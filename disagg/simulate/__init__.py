"""A cluster that computes nothing: requests of a trace meet the router's own decisions, and rates stand for the model.

trace, generate: what arrives. rates: how fast workers, links and front end are. fleet: how many workers of what kind.
agenda, cores, network, blocks, worker: the parts that take time or hold blocks. front: the router's admission and
placing. simulation: puts them together. figures, report, plots: what comes out.
"""
