"""What a run would take on a topology, before it is paid for: memory, traffic, time."""
