"""What is built on a compiled program: the command line, the demonstration, pictures, exports, comparisons."""
