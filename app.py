"""Builds and launches the demo page: python app.py [--model FOLDER_OR_HUB_ID ...]"""

try:
    import spaces  # noqa: F401  (on ZeroGPU it must come before torch)
except ImportError:
    pass

from spectralar.demo.start import main

if __name__ == "__main__":
    main()
