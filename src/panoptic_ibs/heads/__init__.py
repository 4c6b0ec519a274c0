"""Heads: one file each. A head knows nothing of IBS, Lightning or Hydra."""
