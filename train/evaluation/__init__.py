"""How good a model is: judges, metrics, measurements, the bank of samples, neighbours, and the report of all this.

May import all other rooms and `spectralar`.
"""
