"""What is minimised: nested reconstruction, next-token cross-entropy, perceptual and adversarial losses.

May import `configs`, `data` and `spectralar`.
"""
