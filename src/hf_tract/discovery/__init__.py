"""Finds the layer of a model that the pixels reach first."""
