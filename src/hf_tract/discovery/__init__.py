"""Which layer of a model the pixels meet first."""
