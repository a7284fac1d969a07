from spectralar.pipeline import SpectralARPipeline  # noqa: F401
