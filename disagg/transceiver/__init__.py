"""Transfer of KV blocks between two workers. The wings, in the order in which they are best read:

`wire`      what two processes say: messages, codec, keys, sockets
`layout`    which layers, heads and tokens each rank holds, and which of them a transfer must move; pure
`protocol`  one transfer as a state machine: events in, actions out; pure
`memory`    bytes gathered, converted, copied and hashed
`planes`    the ways to move bytes: shm, tcp, ucx, zmq, inproc
`peers`     the two sides of a worker that run the protocol over planes; the only code that awaits
`library`   the transfer for engines that are not ours

Each wing imports only wings listed before it.
"""
