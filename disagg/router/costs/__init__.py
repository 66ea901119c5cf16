"""What each way to serve a request costs, in seconds, and which is cheapest. Pure: no clock, no socket, no worker.

The router and the simulator decide by these same functions: `ways.legal_ways` lists, `decide.decide` chooses.
"""
