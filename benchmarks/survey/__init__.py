"""Looks at the first layer of every vision architecture of the installed libraries."""
