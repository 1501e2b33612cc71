"""Divergences and losses: torch only, one value per sample or token; the recipe reduces."""
