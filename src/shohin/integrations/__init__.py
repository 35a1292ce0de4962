"""Edges to other libraries: thin, and imported only when used."""
