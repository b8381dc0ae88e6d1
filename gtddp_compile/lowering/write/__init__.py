"""What emits instructions, one part of a step a file."""
