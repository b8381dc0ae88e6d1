"""Demonstrations that ``gtddp-compile demo`` runs; they need the packages of ``pip install 'gtddp-compile[demo]'``."""
