"""What a configuration will take, told without its devices: memory, traffic, operations, time."""
