"""Which worker holds which blocks of its prefix cache, as workers tell it; kept in a process beside the router's.

worker --BLOCK_EVENTS--> router --> process: BlockIndex     what is held
router: who_holds(prompt)       --> process: chain, index   --> [(worker, tokens)]
"""
