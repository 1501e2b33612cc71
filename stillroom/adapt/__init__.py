"""What changes a network's shape or solves part of it in closed form: ridge heads, masked pre-training models."""
