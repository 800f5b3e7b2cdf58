"""Holds what recomputes the documents' figures from stored runs."""
