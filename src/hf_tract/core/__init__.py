"""The method: second moments of patches, the damped inverse, and the gradient that a layer hands on."""
