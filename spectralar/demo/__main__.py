"""python -m spectralar.demo: the page of an installed package; its models are named by --model."""

from .start import main

main()
