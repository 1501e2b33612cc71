"""What teachers say, and how it is kept."""
