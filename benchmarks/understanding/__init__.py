"""Shohin's understanding of a model beside that of a peer; run with ``python benchmarks/understand.py``."""
