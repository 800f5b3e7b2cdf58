"""A whitened start of the first layer, and the spectrum of what it reads."""
