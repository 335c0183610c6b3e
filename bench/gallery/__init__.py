"""Pictures of what the methods do: one runnable module per method, each writes one PNG."""
