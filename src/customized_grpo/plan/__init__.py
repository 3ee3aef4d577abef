"""Memory and floating-point operations of a run, counted without weights, to plan it before a machine is rented."""
