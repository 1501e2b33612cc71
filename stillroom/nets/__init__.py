"""Small networks, one file each, that take images in [0, 1] and normalise them themselves."""
