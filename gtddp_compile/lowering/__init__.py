"""What the passes write down, and what they write it down with: the plan, instructions, layers."""
