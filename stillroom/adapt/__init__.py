"""What changes a network, or solves part of it in closed form: exits, quantizers, ridge heads, masked pre-training models."""
