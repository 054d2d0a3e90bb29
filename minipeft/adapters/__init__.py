"""What PEFT is: each method at its one site of the model."""
