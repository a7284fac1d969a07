"""How tokens are sampled and frames decoded fast: the token loop, one engine for many, CUDA graphs, streaming.

May import the models and what they stand on; `compiled` alone stands below the transformer, and imports only `layers`.
Nothing here changes what is computed.
"""
