"""Holds the method: second moments of patches, the damped inverse, and the preconditioned gradient; see README.md."""
