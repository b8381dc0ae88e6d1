"""Stage patterns, their symbolic derivations, and the exact rewriting that proves them."""
