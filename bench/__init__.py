"""Speed of Stillroom against hand-written loops and against its peers: `python -m bench` (see README.md here)."""
