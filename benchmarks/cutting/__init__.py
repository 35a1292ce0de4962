"""Pruning beside its peers: what is cut, how, and with what it is compared."""
