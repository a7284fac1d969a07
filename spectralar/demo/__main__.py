"""python -m spectralar.demo: the page, as `python app.py` and the installed command `spectralar-demo`."""

from .start import main

main()
