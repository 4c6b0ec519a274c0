"""Readers, samplers, datasets and the DataModule."""
