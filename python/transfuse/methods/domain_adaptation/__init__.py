"""Unsupervised domain adaptation: labelled source data, unlabelled target data."""
