"""Gives the first layer a whitened start, and measures the spectrum of what it reads."""
