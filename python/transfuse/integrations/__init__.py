"""One module per model library. Each imports its library lazily and names the extra it needs."""
