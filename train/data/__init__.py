"""Images and codes to train on: sources, streams, decoding, the order of the images, augmentation, stored codes.

May import `configs` and `spectralar`.
What a step sees is a function of the seed and the step alone.
"""
