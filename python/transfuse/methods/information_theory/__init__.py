"""Information-theoretic losses and measurements."""
