"""Regions: parts of a network that run as one plan (kernels/plan) instead of op by op."""
