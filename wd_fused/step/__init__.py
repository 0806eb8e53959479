"""What a step does: its plans, torch's code, the reference, GradScaler, the compiler's graph."""
