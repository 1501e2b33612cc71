"""Few-step generators and other diffusion students."""
