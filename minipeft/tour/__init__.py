"""The guided tour and the exercises: how parameter-efficient fine-tuning works, shown and tried on this library."""
