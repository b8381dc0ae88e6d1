"""The compiler's passes, in the order they run: pure functions from one immutable structure to the next."""
