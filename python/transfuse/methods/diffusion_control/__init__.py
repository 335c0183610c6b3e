"""Control of diffusion models at sampling time: attention injection, windows, guidance."""
