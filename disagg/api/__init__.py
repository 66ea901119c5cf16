"""The OpenAI-compatible HTTP API. The wings, each of which imports only wings listed before it:

`http`     connections, bodies, keys, errors and responses, whatever the endpoint
`text`     text to tokens and back: tokenizer, chat template, stop strings
`request`  the one table of request fields, its checks, and a request made ready to run
`helpers`  processes that read large bodies beside the event loop
`answers`  choices as they grow, and their JSON or server-sent events
`processes`  above the endpoints: the same API in processes of its own, the router in another

The endpoints are on top: `generate`, `tokenize` and `status`; `app` joins them, `main` is the router process.
"""
