"""The dense backend: the derived equations with explicit matrices, the reference for the generated program."""
