"""What a run needs before a machine is rented: memory and floating-point operations, counted without weights."""
