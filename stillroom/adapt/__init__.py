"""Pieces that change a network or what surrounds it: exits, quantizers."""
