"""What a user chooses: base curvatures, losses, terminal curvatures, and a method's settings."""
