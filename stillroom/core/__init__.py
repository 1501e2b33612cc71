"""Runs, roles, engines, checkpoints, the store: everything a training loop is given. It knows no recipe, no domain and no catalogue."""
