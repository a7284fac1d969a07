"""How a run goes: the engine, checkpoints, processes, sharding, optimisers, early stopping, the command line, costs.

May import `configs`, `data` and `spectralar`.
It does not know what is minimised.
"""
