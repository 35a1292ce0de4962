"""Distillation beside its peers: equal students, batches and steps."""
