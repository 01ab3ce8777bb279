"""Very large images by multi-scale latent diffusion, on a laptop or on a Ray cluster."""

__version__ = "0.1.0"
