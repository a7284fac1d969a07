"""Training and evaluation of SpectralAR: one script a command at the top, and what they are made of in rooms.

Rooms from the ground up: `configs`, `data`, then `objectives` and `runs`, then `evaluation`.
Scripts may import all rooms and `spectralar`, but not each other.
"""
