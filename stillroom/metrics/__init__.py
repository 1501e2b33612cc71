"""Quality and cost of a model, computed from plain tensors."""
