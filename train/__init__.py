"""Training and evaluation of SpectralAR: data, losses, metrics and one script a stage."""
