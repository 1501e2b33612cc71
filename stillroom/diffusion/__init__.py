"""Noise processes, denoisers, samplers and the pieces that every diffusion recipe calls."""
