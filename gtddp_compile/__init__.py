"""gtddp_compile: derive an optimal-control optimizer for a torch model, and train with it."""
