"""Finds the layer of a model that the pixels meet first."""
