"""Generalisation to domains that were not trained on: penalties and procedures over domains."""
