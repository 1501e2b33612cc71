"""Stillroom: model distillation, one program per published system, on one small core."""

__version__ = "0.1.0"
